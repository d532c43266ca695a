"""Make the demo data: python -m mrjax.demo --output=data/demo."""

import dataclasses

from absl import flags

from mrjax import cli, demo


def main(argv: list[str]) -> None:
    """Make the demo data as the flags say."""
    cli.expect_no_arguments(argv)
    settings = {field.name: getattr(flags.FLAGS, field.name) for field in dataclasses.fields(demo.Settings)}
    demo.make(flags.FLAGS.output, demo.Settings(**settings))
    print(f"demo data written to {flags.FLAGS.output}")


if __name__ == "__main__":
    defaults = demo.Settings()
    flags.DEFINE_string("output", None, "folder to make; it must not exist yet, or be empty", required=True)
    flags.DEFINE_integer("size", defaults.size, "pixels along either side (M4Raw: 256)")
    flags.DEFINE_integer("coils", defaults.coils, "receive coils")
    flags.DEFINE_integer("slices", defaults.slices, "axial slices of a scan")
    flags.DEFINE_integer("repetitions", defaults.repetitions, "scans of every contrast, independent in their noise")
    flags.DEFINE_integer("seed", defaults.seed, "the same seed gives the same files")
    for split in demo.SPLITS:
        flags.DEFINE_integer(split, getattr(defaults, split), f"subjects in {split}/")
    cli.run(main)

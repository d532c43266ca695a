"""Make the demo data: python -m mrjax.demo --output=data/demo."""

from absl import flags

from mrjax import cli, demo


def main(_: list[str]) -> None:
    """Make the demo data as the flags say."""
    values = flags.FLAGS.flag_values_dict()
    numbers = {name: values[name] for name in ("size", "coils", "slices", "repetitions", "seed")}
    subjects = {split: values[split] for split in demo.SPLITS}
    demo.make(values["output"], demo.Settings(**numbers, subjects=subjects))
    print(f"demo data written to {values['output']}")


if __name__ == "__main__":
    defaults = demo.Settings()
    flags.DEFINE_string("output", None, "folder to make; it must not exist yet, or be empty", required=True)
    flags.DEFINE_integer("size", defaults.size, "pixels along either side (M4Raw: 256)")
    flags.DEFINE_integer("coils", defaults.coils, "receive coils")
    flags.DEFINE_integer("slices", defaults.slices, "axial slices of a scan")
    flags.DEFINE_integer("repetitions", defaults.repetitions, "scans of every contrast, independent in their noise")
    flags.DEFINE_integer("seed", defaults.seed, "the same seed gives the same files")
    for split, count in defaults.subjects.items():
        flags.DEFINE_integer(split, count, f"subjects in {split}/")
    cli.run(main)

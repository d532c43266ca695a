"""Make the demo data: python -m mrjax.demo --output=data/demo."""

import dataclasses

from absl import flags

from mrjax import cli, demo


def main(_: list[str]) -> None:
    """Make the demo data as the flags say."""
    settings = {field.name: getattr(flags.FLAGS, field.name) for field in dataclasses.fields(demo.Settings)}
    demo.make(flags.FLAGS.output, demo.Settings(**settings))
    print(f"demo data written to {flags.FLAGS.output}")


if __name__ == "__main__":
    flags.DEFINE_string("output", None, "folder to make; it must not exist yet, or be empty", required=True)
    for field in dataclasses.fields(demo.Settings):
        flags.DEFINE_integer(field.name, getattr(demo.Settings, field.name), field.metadata["help"])
    cli.run(main)

"""Print the tables of config fields in docs/config.md: python -m mrjax.config > docs/config.md."""

from itertools import groupby

from mrjax.config.fields import Field, fields


def markdown() -> str:
    """Return a table of the fields of each group: name, default, meaning, rule."""
    groups = groupby(sorted(fields().values(), key=_group), _group)  # the order within a group stays
    return "\n\n".join(f"## {name}\n\n{_table(list(group))}" for name, group in groups)


def _group(field: Field) -> str:
    return ".".join(["config", *field.name.split(".")[:-1]][:2])


def _table(group: list[Field]) -> str:
    lines = ["| field | default | meaning | values |", "|---|---|---|---|"]
    for field in group:
        rule = field.rule.expected() if field.rule else ""
        lines.append(f"| `config.{field.name}` | `{field.default!r}` | {field.help} | {rule} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print("# Config fields\n\nWritten by `python -m mrjax.config`; set one with `--config.FIELD=VALUE`.\n")
    print(markdown())

"""Print the table of config fields in docs/config.md: python -m mrjax.config > docs/config.md."""

from mrjax.config.fields import fields


def markdown() -> str:
    """Return the table of all fields: name, default, meaning, rule."""
    lines = ["| field | default | meaning | values |", "|---|---|---|---|"]
    for field in fields().values():
        rule = field.rule.expected() if field.rule else ""
        lines.append(f"| `config.{field.name}` | `{field.default!r}` | {field.help} | {rule} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print("# Config fields\n\nWritten by `python -m mrjax.config`; set one with `--config.FIELD=VALUE`.\n")
    print(markdown())

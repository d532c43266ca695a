"""Run a command of mrjax by its name: `mrjax train --config=unet` is `python -m mrjax.main --config=unet`."""

import ast
import importlib.metadata
import runpy
import sys
from pathlib import Path

# By the names of their modules.
COMMANDS = {
    "train": "main",
    "evaluate": "evaluate",
    "reconstruct": "reconstruct",
    "check": "check",
    "convert": "convert",
    "export": "export.__main__",
    "import-fastmri": "import_fastmri",
    "export-fastmri": "export_fastmri",
    "sweep": "sweep.__main__",
    "demo": "demo.__main__",
}


def main() -> None:
    """Run the command that the first argument names; print the version or all commands if it says so."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        sys.argv[1:] = arguments
        runpy.run_module(f"mrjax.{COMMANDS[name]}", run_name="__main__", alter_sys=True)
    elif name.lstrip("-") == "version":
        print(f"mrjax {importlib.metadata.version('mrjax')}")
    elif name.lstrip("-") in ("help", "h"):
        print(_describe_commands())
    else:
        sys.exit(f"mrjax: {name!r} is no command, expected one of {', '.join(COMMANDS)}")


def _describe_commands() -> str:
    lines = ["mrjax COMMAND [FLAGS]: train brain-MRI reconstruction models in JAX", ""]
    for command, module in COMMANDS.items():
        file = Path(__file__).parent.joinpath(*module.split(".")).with_suffix(".py")
        sentence = (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0]
        lines.append(f"  {command:<16}{sentence}")
    return "\n".join([*lines, "", "mrjax COMMAND --help lists the flags of a command, mrjax --version the version."])


if __name__ == "__main__":
    main()

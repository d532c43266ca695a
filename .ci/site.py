"""The hooks of mkdocs.yml: pages keep their paths of the repository, so that one link works on the code host and here.

Pages are README.md, those in docs/ and those that they link to; what else they link to is copied. Reference pages are made
of docstrings, one for every room of the package. Formulas become MathML, which a browser draws by itself.
"""

import html
import itertools
import logging
import posixpath
import re
from pathlib import Path

import griffe
import ziamath
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
FONT = Path(ziamath.__file__).parent / "fonts" / "STIXTwoMath-Regular.ttf"  # not every system has one for formulas
SHOWN = (".css", ".html", ".ico", ".md", ".png", ".svg", ".txt")  # what a browser shows under its own name
logger = logging.getLogger("mkdocs.hooks.site")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put README.md, docs/ and what they link to in the place of the files in docs/."""
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    paths = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("docs/**/*")) if path.is_file())]
    for path in paths:  # grows by what is linked
        files.append(File(path, str(ROOT), config.site_dir, False, dest_uri=destination(path)))
        if path.endswith(".md"):
            paths += [linked for linked in find_links(path) if linked not in paths]
    files.append(File(FONT.name, str(FONT.parent), config.site_dir, False))
    for name, modules in rooms().items():
        text = "\n\n".join([f"# {name}", *(f"::: {module}" for module in modules)])
        files.append(File.generated(config, f"api/{name}.md", content=text))
    return files


def destination(path: str) -> str | None:
    """Return where a file stands in the site: without docs/, and as text where a browser would not show it."""
    if path == "README.md":
        return "index.html"
    path = path.removeprefix("docs/")
    suffix = Path(path).suffix
    if suffix == ".md":
        return path.replace("README.md", "index.md").removesuffix(".md") + ".html"
    return path if suffix in SHOWN else f"{path}.txt"


def find_links(page: str) -> list[str]:
    """Return the files of the repository that a page links to."""
    targets = re.findall(r"\]\(([^)#:\s]+)", (ROOT / page).read_text())
    paths = (posixpath.normpath(posixpath.join(posixpath.dirname(page), target)) for target in targets)
    return [path for path in dict.fromkeys(paths) if (ROOT / path).is_file()]


def rooms() -> dict[str, list[str]]:
    """Return the modules of each room, and those at the top of the package as the room `mrjax`."""
    found: dict[str, list[str]] = {}
    for file in sorted(ROOT.glob("mrjax/**/*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        room = parts[1] if len(parts) > 2 else "mrjax"
        if file.stat().st_size and file.stem != "__main__" and room != "configs":  # which docs/methods.md lists
            found.setdefault(room, []).append(".".join(parts).removesuffix(".__init__"))
    return found


class CommentedFields(griffe.Extension):
    """Show the fields of dataclasses and networks, which are explained by comments, in a table below the docstring."""

    def on_class(self, *, cls: griffe.Class, **_: object) -> None:
        """Add the table to the docstring of a class."""
        lines = cls.lines_collection[cls.filepath]
        fields = [member for member in cls.members.values() if member.is_attribute and member.annotation]
        comments = {field.name: _comment(lines, field) for field in fields}
        if cls.docstring and any(comments.values()):
            rows = ["| field | type | default | meaning |", "|---|---|---|---|"]
            for field in fields:
                default = f"`{field.value}`" if field.value else ""
                rows.append(f"| `{field.name}` | `{field.annotation}` | {default} | {comments[field.name]} |")
            cls.docstring.value += "\n\n" + "\n".join(rows)


def _comment(lines: list[str], field: griffe.Attribute) -> str:
    """Return the comment behind a field, or the one above it."""
    if behind := lines[field.endlineno - 1].partition("  # ")[2]:
        return behind.replace("|", r"\|")
    above = itertools.takewhile(lambda line: line.startswith("#"), map(str.strip, lines[field.lineno - 2 :: -1]))
    return " ".join(line.removeprefix("# ") for line in reversed([*above])).replace("|", r"\|")


def on_page_content(content: str, **_: object) -> str:
    """Replace the formulas of a page by MathML."""

    def formula(match: re.Match[str]) -> str:
        display = "block" if match["opening"] == "[" else "inline"
        return convert(html.unescape(match["latex"]), display=display)

    return re.sub(
        r'<(span|div) class="arithmatex">\\(?P<opening>[(\[])(?P<latex>.*?)\\[)\]]</\1>', formula, content, flags=re.DOTALL
    )


def on_post_build(config: MkDocsConfig) -> None:
    """Warn of what a browser would fetch from elsewhere."""
    for file in sorted(Path(config.site_dir).rglob("*.html")):
        for tag in re.findall(r'<(?:script|link|img|iframe|source)[^>]*(?:src|href)="?(?:https?:)?//[^>]*>', file.read_text()):
            logger.warning("%s is fetched from elsewhere by %s", tag, file.name)

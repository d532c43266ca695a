"""The hooks of mkdocs.yml.

Pages keep the paths that they have in the repository, so that one link works on the code host and on the site:
README.md, the files in docs/, and those that these link to. Reference pages are made of docstrings, one for each room
of the package. Formulas become MathML, which browsers draw by themselves.
"""

import html
import itertools
import logging
import posixpath
import re
import textwrap
from importlib import metadata
from pathlib import Path

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
# Not every system has a font for formulas.
FONT = Path(str(metadata.distribution("ziamath").locate_file("ziamath/fonts/STIXTwoMath-Regular.ttf")))
SHOWN = (".css", ".html", ".ico", ".png", ".svg", ".txt")  # by a browser, under the name that they have
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\(?P<kind>[(\[])(?P<latex>.*?)\\[)\]]</\1>', re.DOTALL)
FETCHED = re.compile(r'<(?:script|link|img|iframe|source)[^>]*(?:src|href)="?(?:https?:)?//[^>]*>')
logger = logging.getLogger("mkdocs.hooks.site")


class Notebook(File):
    """A notebook that is a page, with the results that are stored in it."""

    def is_documentation_page(self) -> bool:
        """Return True: to MkDocs, only Markdown is a page."""
        return True


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put README.md, docs/ and what they link to in the place of the files in docs/; add the reference."""
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    paths = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("docs/**/*")) if path.is_file())]
    for path in paths:  # grows by what is linked
        if path.endswith(".ipynb"):
            _add_notebook(path, files, config)
        else:
            files.append(File(path, str(ROOT), config.site_dir, False, dest_uri=destination(path)))
        if path.endswith((".md", ".ipynb")):
            paths += [linked for linked in find_links(path) if linked not in paths]
    files.append(File(FONT.name, str(FONT.parent), config.site_dir, False))
    for room, modules in rooms().items():
        text = "\n\n".join([f"# {room}", *(f"::: {module}" for module in modules)])
        files.append(File.generated(config, f"api/{room}.md", content=text))
    return files


def _add_notebook(path: str, files: Files, config: MkDocsConfig) -> None:
    text, resources = MarkdownExporter().from_filename(str(ROOT / path))
    page = Notebook.generated(config, path, content=text)
    pictures = [File.generated(config, f"docs/{name}", content=data) for name, data in resources["outputs"].items()]
    for file in (page, *pictures):
        file.dest_uri = destination(file.src_uri)
        files.append(file)


def destination(path: str) -> str:
    """Return where a file of the repository stands in the site; as text, if a browser would not show it otherwise."""
    path = "index.md" if path == "README.md" else path.removeprefix("docs/").replace("README.md", "index.md")
    if path.endswith((".md", ".ipynb")):
        return str(Path(path).with_suffix(".html"))
    return path if path.endswith(SHOWN) else f"{path}.txt"


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


class Docstrings(griffe.Extension):
    """Make docstrings Markdown, and the fields of classes, which are explained by comments, a table in them."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Keep the lines of aligned lists, and `<` outside of code."""
        if obj.docstring:
            aligned = re.compile(r"(?:(?<=\n\n)|(?<=:\n))(?:^ {2,}\S.*(?:\n|\Z))+", re.MULTILINE)
            text = aligned.sub(lambda lines: f"\n{textwrap.indent(lines[0], '  ')}\n", obj.docstring.value)
            code_or_less = re.compile(r"^ {4}.*$|^\|.*\|$|`[^`]*`|<(?=\w)", re.MULTILINE)
            obj.docstring.value = code_or_less.sub(lambda part: "&lt;" if part[0] == "<" else part[0], text)

    def on_class(self, *, cls: griffe.Class, **_: object) -> None:
        """Add the table of fields."""
        members = [member for member in cls.members.values() if member.is_attribute and not member.is_private]
        fields = [member for member in members if member.annotation and "property" not in member.labels]
        comments = [_comment(cls.lines_collection[cls.filepath], field) for field in fields]
        if cls.docstring and any(comments):
            rows = ["\n\n| field | type | default | meaning |", "|---|---|---|---|"]
            for field, comment in zip(fields, comments, strict=True):
                default = f"`{field.value}`" if field.value else ""
                rows.append(f"| `{field.name}` | `{field.annotation}` | {default} | {comment} |")
            cls.docstring.value += "\n".join(rows)


def _comment(lines: list[str], field: griffe.Attribute) -> str:
    """Return the comment behind a field, or the one above it."""
    comment = lines[field.endlineno - 1].partition("  # ")[2]
    if not comment:
        above = itertools.takewhile(lambda line: line.startswith("#"), map(str.strip, lines[field.lineno - 2 :: -1]))
        comment = " ".join(line.removeprefix("# ") for line in reversed([*above]))
    return comment.replace("|", r"\|")


def on_page_content(content: str, **_: object) -> str:
    """Replace the formulas of a page by MathML."""

    def to_mathml(formula: re.Match[str]) -> str:
        return convert(html.unescape(formula["latex"]), display="block" if formula["kind"] == "[" else "inline")

    return FORMULA.sub(to_mathml, content)


def on_post_build(config: MkDocsConfig) -> None:
    """Warn of what a browser would fetch from elsewhere."""
    for file in sorted(Path(config.site_dir).rglob("*.html")):
        for tag in FETCHED.findall(file.read_text()):
            logger.warning("%s would be fetched from elsewhere by %s", tag, file.name)

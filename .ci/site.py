"""The hooks of mkdocs.yml: pages keep their paths of the repository, so that one link works on the code host and here.

Pages are README.md, those in docs/ and those that they link to; what else they link to is copied. Reference pages are made
of the docstrings, one for every room of the package. Formulas become MathML, which a browser draws by itself.
"""

import html
import logging
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
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
    """Return the modules to document, by the page: the top floor on one, and each room."""
    package = ROOT / "mrjax"
    top = [f"mrjax.{file.stem}" for file in sorted(package.glob("[!_]*.py"))]
    inner = {
        folder.name: [
            f"mrjax.{folder.name}",
            *(f"mrjax.{folder.name}.{file.stem}" for file in sorted(folder.glob("[!_]*.py"))),
        ]
        for folder in (file.parent for file in sorted(package.glob("*/__init__.py")))
    }
    return {"mrjax": ["mrjax", *top], **inner}


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

"""The pages say what is so: README.md stays short, its figures are measured ones, and links lead to files."""

import posixpath
import re
import runpy
from pathlib import Path

import pytest

import mrjax
from mrjax.__main__ import COMMANDS

ROOT = Path(mrjax.__file__).parents[1]
FOLDERS = (".", "docs", "docs/data", "benchmarks", "launch")
PAGES = sorted(str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).glob("*.md"))


def test_readme_takes_three_minutes() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_what_readme_says_of_cost_stands_in_the_benchmarks() -> None:
    section = (ROOT / "README.md").read_text().partition("## What it costs")[2]
    rows = [row.split("|")[1:-1] for row in re.findall(r"^\|.*\|$", section.partition("\n## ")[0], re.MULTILINE)[2:]]
    page = ""
    for _, images, memory, source in rows:
        linked = re.search(r"\((benchmarks/\w+\.md)#(\w+)\)", source)
        if linked:  # else the row above names it
            page = (ROOT / linked[1]).read_text().partition(f"\n## {linked[2]}\n")[2].partition("\n## ")[0]
        cells = {cell.strip() for cell in page.split("|")}
        assert images.strip() in cells
        assert not memory.strip() or memory.strip().removesuffix(" GB") in cells
    assert rows


def test_the_table_of_experiments_has_the_steps_and_batch_size_of_each() -> None:
    rows = re.findall(
        r"^\| (\[.*?) \| .* \| ([\d,]+) \| (\d+) \|$", (ROOT / "docs" / "methods.md").read_text(), re.MULTILINE
    )
    found = {name: sizes for links, *sizes in rows for name in re.findall(r"\[(\w+)\.py\]", links)}
    configs = {path.stem: runpy.run_path(str(path))["get_config"]() for path in (ROOT / "mrjax/configs").glob("*.py")}
    assert found == {name: [f"{config.steps:,}", str(config.batch_size)] for name, config in configs.items()}


def test_the_page_to_start_with_lists_every_command() -> None:
    text = (ROOT / "docs" / "start.md").read_text()
    assert [name for name in COMMANDS if f"`mrjax {name}`" not in text] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_on_the_code_host_too(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not target.startswith(("https://", "http://")):
            path = ROOT / posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
            assert not target.startswith("/"), f"{target} is absolute"
            assert path.exists(), f"{target} is not there"
            # A code host does not follow a link of the file system, as configs/ is one.
            assert path.resolve() == path, f"{target} leads through a symbolic link"
    assert not re.findall(r"(?:^|[\s`'\"(])/(?:root|home|work|tmp|Users)/\S*", text), "a path of some machine"

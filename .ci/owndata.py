"""Follow the pages on own data on small files of the real formats, as a user would: every command, in a few steps.

    python .ci/owndata.py DEMO_DATA

Commands are the indented blocks, as in `readme`; those of a page run one after the other, two pages at a time, all in
one folder that holds the files which the pages speak of. A page's fenced blocks of
Python make one file, which the first line names.
"""

import concurrent.futures
import os
import re
import shlex
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import own_data_files
from readme import find_blocks, find_inline, strip_comment

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [*sorted(DOCS.glob("data/*.md")), DOCS / "format.md", DOCS / "extending.md"]
# Forms, and what the other blocks of a page check.
CHECKED_ELSEWHERE = {
    "python -m mrjax.import_fastmri",
    "python -m mrjax.convert out/raw/fast.t5 --output=out --format=nifti",
}
FEW_STEPS = (
    r"\1 --config.steps=2 --config.model.channels=4 --config.model.levels=1 --config.batch_size=8"
    " --config.data.workers=0"
)
# Changes to the commands, as regular expressions: two steps of a small network, and fastMRI's images of 64 x 64.
SUBSTITUTIONS = {
    r"^(python -m mrjax\.main .*)": FEW_STEPS,
    r"^(python mine\.py train .*)": r"\1 --config.steps=2",
    r"^(.*--config=fastmri_brain .*)": r"\1 --config.data.image_size=64,64",
    r"320,320": "64,64",
}
# This interpreter's commands, compiled quickly rather than well as in tests/conftest.py, and once for all pages.
ENVIRONMENT = os.environ | {
    "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false" * metadata.version("jaxlib").startswith("0.10."),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def find_python(text: str) -> str:
    """Return the fenced blocks of Python in a Markdown page as one program."""
    return "\n\n".join(code for language, code in FENCED.findall(text) if language == "python")


def follow(page: Path) -> str:
    """Run the commands of a page, and return them with what they print; RuntimeError for the first that fails."""
    text, done, shown = page.read_text(), set(CHECKED_ELSEWHERE), f"\n== {page.stem}\n"
    if code := find_python(text):
        Path(code.split()[1]).write_text(code)
    text = FENCED.sub("", text)
    for line in filter(None, map(strip_comment, "".join(find_blocks(text)).splitlines())):
        command = line
        for pattern, replacement in SUBSTITUTIONS.items():
            command = re.sub(pattern, replacement, command)
        result = subprocess.run(shlex.split(command), env=ENVIRONMENT, capture_output=True, text=True)
        shown += f"\n$ {command}\n{result.stdout}{result.stderr}"
        if result.returncode:
            raise RuntimeError(f"{shown}\nexit status {result.returncode}")
        done.add(line)
    if unknown := sorted(set(find_inline(text)) - done):
        raise RuntimeError(f"{page.name}: CI does not run {unknown}: make them a block, or add them to {__file__}")
    return shown


def main() -> None:
    """Write the files and follow all pages, or those that are named after the demo data."""
    demo, names = Path(sys.argv[1]).resolve(), sys.argv[2:]
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(2) as pool:
        os.chdir(folder)
        own_data_files.write_all(demo)
        pages = [page for page in PAGES if not names or page.stem in names]
        try:
            for shown in pool.map(follow, pages):
                print(shown, flush=True)
        except RuntimeError as error:
            sys.exit(str(error))
    print(f"\n{len(pages)} pages are followed")


if __name__ == "__main__":
    main()

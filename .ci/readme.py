"""Run the commands of README.md and the pages in docs/ on the demo data, so that pages and package cannot drift apart.

    python .ci/readme.py DEMO_DATA

Runs in the root of a copy of the tree, with the environment's bin/ on PATH. Commands are the indented blocks, one by
one in their order; a block that starts with `import` is Python. The copy gets the files that they speak of: FOLDER
and scan.t5. A command in running text must be one of a block, or be listed in CHECKED_ELSEWHERE.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

# Those of .ci/owndata.py have files of their own, tests follow those on watching, and there is no Docker in CI.
ELSEWHERE = ("docker", "extending", "format", "sweep", "watching")
PAGES = (Path("README.md"), *(page for page in sorted(Path("docs").glob("*.md")) if page.stem not in ELSEWHERE))
# Commands that .ci/run runs itself, or that take too long: what checks them instead.
CHECKED_ELSEWHERE = {
    "make demo": ".ci/run",
    "make test": ".ci/run",
    "make check": ".ci/run",
    "make bench-packages": ".ci/run",
    "make aot-packages": ".ci/run",
    "make browser-packages": ".ci/run",
    "make bench": "20 minutes; make test runs its scripts at a small size after make bench-packages",
    "python -m benchmarks.transfer --train=250,250,2400": "80 minutes; make test runs its parts at a small size",
    "make docs-site": ".ci/run",
    "make bench-quality": "150 minutes; make test runs its scripts at a small size after make bench-packages",
    "python -m benchmarks.fit --config=configs/unet.py --target=h100": ".ci/run, in the environment of aot-packages",
    "python -m mrjax.main --config=configs/unet.py [--workdir=runs/unet] [--config.FIELD=VALUE ...]": "a form",
    "python -m mrjax.config": "tests/test_config.py",
    "python -m tests.fuzz": "tests/fuzz/test_fuzz.py",
    "python -m tests.fuzz --count=3000 --output=docs/fuzz.md": "long; tests/fuzz/test_fuzz.py runs 200 of them",
    "python -m benchmarks.soak --steps=50000 --evaluations=20": "long; make test runs it at a small size",
    "python -m benchmarks.faults --kills=50": "1161 s; tests/checkpoint tries its faults one by one",
    "python -m mrjax.demo": ".ci/run, by make demo",
    "python -m mrjax.check": "a form",
    "python -m mrjax.main": "what the scripts in launch/ start",
}
# Changes to the commands, as regular expressions on a command.
SUBSTITUTIONS = {
    r"unet\.pt\b": "unet.npz",  # writing .pt takes PyTorch
    # A few steps, of a network that fastMRI has, so that it can be exported.
    r"^(python -m mrjax\.main .*)": r"\1 --config.steps=4 --config.model.pool=avg --config.model.residual=False",
    r"(--preflight)\b": r"\1 --config.data.dir=FOLDER",
}


def find_blocks(text: str) -> list[str]:
    """Return the indented blocks of a Markdown page; fenced ones are not commands."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    blocks = re.findall(r"(?:^ {4}.*\n)+", text.replace("\\\n", ""), re.MULTILINE)
    return [re.sub(r"^ {4}", "", block, flags=re.MULTILINE) for block in blocks]


def find_inline(text: str) -> list[str]:
    """Return the commands in running text, between backticks."""
    spans = re.findall(r"`((?:make|pip|python -m) [^`]+)`", text)
    return [" ".join(span.split()) for span in spans]


def strip_comment(line: str) -> str:
    """Return a shell command without its comment."""
    return shlex.join(shlex.split(line, comments=True))


def run(command: list[str]) -> None:
    """Run a command; end with its output's last words in place where it fails."""
    print(f"\n$ {shlex.join(command)}", flush=True)
    status = subprocess.run(command).returncode
    if status:
        sys.exit(f"exit status {status} of: {shlex.join(command)}")


def add_files(data: Path) -> None:
    """Add the files that they speak of."""
    Path("FOLDER").symlink_to(data.resolve())
    Path("scan.t5").symlink_to(next(data.glob("test/*.t5")).resolve())


def main() -> None:
    """Run every command that is not checked elsewhere."""
    text = "\n".join(page.read_text() for page in PAGES)
    add_files(Path(sys.argv[1]))
    done = set(CHECKED_ELSEWHERE)
    for block in find_blocks(text):
        if block.startswith("import "):
            run([sys.executable, "-c", block])
            continue
        for line in filter(None, map(strip_comment, block.splitlines())):
            command = line
            for pattern, replacement in SUBSTITUTIONS.items():
                command = re.sub(pattern, replacement, command)
            if line not in done:
                run(shlex.split(command))
            done.add(line)
    unknown = sorted(set(find_inline(text)) - done)
    if unknown:
        sys.exit(f"CI does not run {unknown}: make them a block, or add them to CHECKED_ELSEWHERE")
    print(f"\n{len(done)} commands are run or checked by {os.path.relpath(__file__)} and .ci/run")


if __name__ == "__main__":
    main()

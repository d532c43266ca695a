"""The benchmarks' page is made of what the scripts measured, whatever becomes of one of them; the scripts run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables

ROOT = Path(__file__).parents[1]
RUN = tables.Run("peers", "peers", ["--rounds=2"])
RESULT: dict[str, Any] = {
    "name": "peers",
    "device": "1 x cpu",
    "processor": "2 cores, of a test",
    "versions": {"jax": "0.0.1"},
    "config": {"rounds": 2},
    "tables": [{"title": "Steps", "columns": ["form", "ms"], "rows": [["eager", "17.5"]]}],
    "raw": {"float32": {"PyTorch eager": [2.0, 4.0, 3.0], "PyTorch compiled": [4.0], "mrjax, avg pooling": [1.5, 1.5]}},
}


def outcome(run: tables.Run, result: dict[str, Any] | None, trouble: str = "") -> tables.Outcome:
    return tables.Outcome(run, result, trouble, 90.0, "2001-02-03")


def summary_of(text: str) -> dict[str, str]:
    """The measured column by what it measures."""
    lines = [line.split("|") for line in text.partition("**Summary**")[2].partition("##")[0].splitlines()]
    return {cells[1].strip(): cells[2].strip() for cells in lines if len(cells) > 3}


def test_the_summary_is_computed_from_raw_values_and_the_rest_says_it_was_not_measured() -> None:
    measured = summary_of(tables.page([outcome(RUN, RESULT)]))
    values = {what: value for what, value in measured.items() if value not in ("measured", "not measured")}
    del values[next(what for what in values if what.startswith("---"))]
    assert len(values) == 1
    what, value = values.popitem()
    assert what.startswith("training step, float32")
    assert value == "0.5"  # 1.5 over the median of the faster form, 3.0
    assert sum(value == "not measured" for value in measured.values()) == len(tables.SUMMARY) - 1


def test_a_section_shows_the_tables_and_where_they_were_measured_a_failed_one_why() -> None:
    other = tables.Run("loader", "loader")
    text = tables.page([outcome(RUN, RESULT), outcome(other, None, "failed with exit status 1: no such disk")])
    for words in ("| eager | 17.5 |", "1 x cpu", "2 cores, of a test", "jax 0.0.1", "2001-02-03", "took 90 s"):
        assert words in text
    assert "python -m benchmarks.peers --rounds=2" in text
    assert "On 2001-02-03: failed with exit status 1: no such disk" in text
    assert "3.0 minutes" in text


def test_a_script_that_fails_or_cannot_run_is_an_outcome_with_its_last_words(tmp_path: Path) -> None:
    failed = tables.execute(tables.Run("none", "no_such_script"), tmp_path, sys.executable)
    assert failed.result is None
    assert "exit status 1" in failed.trouble
    assert "no_such_script" in failed.trouble
    missing = tables.execute(tables.Run("h100", "fit", ahead_of_time=True), tmp_path, str(tmp_path / "python"))
    assert missing.result is None
    assert "make bench-fit" in missing.trouble


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    tables.write("old", file)
    with pytest.raises(UnicodeEncodeError):
        tables.write("half \ud800", file)
    assert file.read_text() == "old"
    tables.write("new", file)
    assert file.read_text() == "new"


def test_every_row_of_the_summary_is_of_a_run_on_cpus_and_gpus_alike() -> None:
    for backend in ("cpu", "gpu"):
        assert {row.run for row in tables.SUMMARY} <= {run.name for run in tables.runs(backend)}


SMALL = {
    "step_time": ["--size=32", "--channels=4", "--levels=2", "--batch=2", "--rounds=2", "--precision=float32,bfloat16"],
    "end_to_end": ["--case=small", "--steps=6", "--rounds=1"],
    "start_up": ["--size=32", "--channels=4", "--levels=2", "--rounds=1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SMALL)
def test_a_script_measures_and_writes_what_the_page_needs(script: str, tmp_path: Path) -> None:
    if script == "end_to_end":
        pytest.importorskip("torch")
        pytest.importorskip("fastmri")
    file = tmp_path / "out.json"
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", f"benchmarks.{script}", *SMALL[script], f"--json={file}"]
    shown = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert shown.returncode == 0, shown.stderr
    result = json.loads(file.read_text())
    text = tables.page([outcome(tables.Run(script, script), result)])
    assert all(row[0] in shown.stdout for table in result["tables"] for row in table["rows"])
    mine = {row.what for row in tables.SUMMARY if row.run == script and "H100" not in row.what}
    if script == "end_to_end":
        mine = {what for what in mine if "4 channels" in what}
    mine -= {"the same: share of the roofline"}  # of a GPU alone
    assert mine
    measured = summary_of(text)
    assert all(measured[what] != "not measured" for what in mine), measured


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted({run.script for run in tables.runs("cpu")} | {"tables"}))
def test_a_script_says_how_it_is_used(script: str) -> None:
    command = [sys.executable, "-m", f"benchmarks.{script}", "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "--json" in shown.stdout or script == "tables", shown.stderr
    assert f"benchmarks.{script}" in shown.stdout

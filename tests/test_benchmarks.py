"""The benchmarks' page is made from the scripts' measurements, also where one fails; every script runs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PEERS, ROOT, one_device_flags
from matplotlib.image import imread

from benchmarks import denoising, heads, quality, report, tables, transfer
from mrjax import demo
from mrjax.errors import UserError

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
    of_this_run = [row for row in tables.SUMMARY if row.run == RUN.name]
    assert sum(value == "not measured" for value in measured.values()) == len(of_this_run) - 1 > 0


def test_a_section_shows_the_tables_and_where_they_were_measured_or_why_there_are_none() -> None:
    other = tables.Run("loader", "loader")
    text = tables.page([outcome(RUN, RESULT), outcome(other, None, "failed with exit status 1: no such disk")])
    for words in ("| eager | 17.5 |", "1 x cpu", "2 cores, of a test", "jax 0.0.1", "2001-02-03", "took 90 s"):
        assert words in text
    assert "python -m benchmarks.peers --rounds=2" in text
    assert "On 2001-02-03: failed with exit status 1: no such disk" in text
    assert "3.0 minutes" in text


def test_a_script_that_fails_or_cannot_run_is_an_outcome_with_its_last_line(tmp_path: Path) -> None:
    failed = tables.execute(tables.Run("none", "no_such_script"), tmp_path, sys.executable)
    assert failed.result is None
    assert "exit status 1" in failed.trouble
    assert "no_such_script" in failed.trouble
    missing = tables.execute(tables.Run("h100", "fit", ahead_of_time=True), tmp_path, str(tmp_path / "python"))
    assert missing.result is None
    assert "make aot-packages" in missing.trouble


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    report.write_text("old", file)
    with pytest.raises(UnicodeEncodeError):
        report.write_text("half \ud800", file)
    assert file.read_text() == "old"
    report.write_text("new", file)
    assert file.read_text() == "new"


def test_every_row_of_the_summary_belongs_to_a_run_on_a_cpu_or_a_gpu() -> None:
    assert {row.run for row in tables.SUMMARY} <= {run.name for x in ("cpu", "gpu") for run in tables.runs(x)}


def test_a_missing_package_is_one_sentence_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    report.require_packages("numpy")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"^not installed: torch; `make bench-packages` installs"):
        report.require_packages("numpy", "torch")


SMALL_UNET = ["--size=32", "--channels=4", "--levels=1"]
SMALL = {
    "step_time": [*SMALL_UNET, "--batch=2", "--rounds=2", "--precision=float32"],
    "start_up": [*SMALL_UNET, "--rounds=1"],
    "end_to_end": ["--case=small", "--steps=6", "--rounds=1"],
    "peers": [*SMALL_UNET, "--batch=2", "--rounds=1", "--forms=eager", "--precision=float32,bfloat16"],
    "inference": [*SMALL_UNET, "--slices=2", "--batches=1,2", "--rounds=1", "--forms=eager"],
    "loader": ["--files=2", "--epochs=2", "--rounds=1"],
}
# Rows of the summary that these sizes or this machine cannot give.
NOT_MEASURED = {
    "device waiting for data, end to end",
    "files to trained parameters, float32, images/s over the PyTorch pipeline",
}


def run_script(script: str, *arguments: str) -> str:
    environment = os.environ | {"XLA_FLAGS": one_device_flags()}
    command = [sys.executable, "-m", f"benchmarks.{script}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", ["step_time", "start_up", *(pytest.param(s, marks=pytest.mark.peer) for s in list(SMALL)[2:])]
)
def test_a_script_measures_and_writes_what_the_page_needs(script: str, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    printed = run_script(script, *SMALL[script], f"--json={file}")
    result = json.loads(file.read_text())
    assert all(row[0] in printed for table in result["tables"] for row in table["rows"])
    needed = {row.what for row in tables.SUMMARY if row.run == script} - NOT_MEASURED
    assert needed
    measured = summary_of(tables.page([outcome(tables.Run(script, script), result)]))
    assert all(measured[what] != "not measured" for what in needed), measured


def check_quality_script(script: str, folder: Path, *arguments: str) -> None:
    """Run two steps of each training; the script writes its section and leaves the others."""
    page = folder / "README.md"
    page.write_text(f"before\n\n## {script}\n\nold\n\n## other\n\nkept\n")
    run_script(script, "--steps=2", "--seeds=1", f"--folder={folder}", f"--readme={page}", *arguments)
    text = page.read_text()
    assert text.startswith(f"before\n\n## {script}\n\n    python -m benchmarks.{script} --steps=2 --seeds=1\n")
    assert text.endswith("\n## other\n\nkept\n")
    assert "old" not in text
    assert "| U-Net" in text or "U-Net, our recipe" in text


@pytest.mark.slow
def test_soak_compares_the_last_tenth_of_long_runs_with_the_second_on_its_page(tmp_path: Path) -> None:
    """The figures of so short a run say nothing but that they were taken."""
    file, page = tmp_path / "out.json", tmp_path / "page.md"
    page.write_text("# Page\n\n## soak\n\nold\n\n## other\n\nkept\n")
    run_script("soak", "--steps=400", "--evaluations=2", f"--json={file}", f"--page={page}")
    text, result = page.read_text(), json.loads(file.read_text())
    assert text.startswith("# Page\n\n## soak\n\n    python -m benchmarks.soak --steps=400 --evaluations=2\n")
    assert text.endswith("\n## other\n\nkept\n")
    assert "old" not in text
    (table,) = result["tables"]
    assert [row[0] for row in table["rows"]] == list(result["raw"])
    for name, *numbers in table["rows"]:
        assert all(float(number.replace(",", "")) > 0 for number in numbers), name
    assert [0.5 < float(row[4]) < 2 for row in table["rows"]] == [True] * 3
    plain, workers = (max(files for _, _, files in samples) for samples in list(result["raw"].values())[:2])
    assert 64 < plain < workers  # more files for HDF5 itself than the reader keeps open; each worker has its own


SUBJECTS = {"train": 1, "val": 1, "test": 1}


@pytest.mark.slow
@pytest.mark.peer
def test_quality_trains_and_scores_every_method(tmp_path: Path) -> None:
    demo.make(tmp_path / "data", demo.Settings(size=quality.SIZE, coils=4, **SUBJECTS))
    check_quality_script("quality", tmp_path, f"--figure={tmp_path / 'models.png'}")
    assert (tmp_path / "models.png").exists()


@pytest.mark.slow
@pytest.mark.peer
def test_denoising_trains_and_scores_every_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(denoising, "SUBJECTS", SUBJECTS)
    monkeypatch.setattr(denoising, "SCANS", 2)
    denoising.make_data(tmp_path / "data")
    check_quality_script("denoising", tmp_path)


@pytest.mark.slow
@pytest.mark.peer
def test_transfer_scores_every_method_on_the_same_undersampled_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Path
) -> None:
    small = [head._replace(size=(32, 32), coils=coils) for coils, head in enumerate(heads.HEADS[-2:], 1)]
    monkeypatch.setattr(heads, "HEADS", small)
    monkeypatch.setattr(transfer, "PICTURED", (0, 1))
    volumes = heads.write(tmp_path, tmp_path / "none.mat")
    assert [volume.undersampled for of_heads in volumes.values() for volume in of_heads.values()] == [True] * 4
    scores, shown = transfer.measure(volumes, [str(trained)])
    table = transfer.score_table(8, scores[8])
    assert table.columns == ["head", transfer.ZERO_FILLED, str(trained), transfer.COMPRESSED_SENSING]
    assert [row[0] for row in table.rows] == [*(head.name for head in small), "mean"]
    assert all(of[transfer.COMPRESSED_SENSING] != of[str(trained)] for of in scores[8].values())
    transfer.draw(str(tmp_path / "heads.png"), shown, scores)
    assert (tmp_path / "heads.png").exists()


def test_transfer_counts_the_heads_on_which_a_network_is_worse() -> None:
    psnr = {transfer.ZERO_FILLED: 20.0, transfer.COMPRESSED_SENSING: 24.0}
    scores = {
        4: {name: {m: {"psnr": p} for m, p in (psnr | {"net": net}).items()} for name, net in (("a", 19), ("b", 27))}
    }
    ((*_, mean, least, worse),) = transfer.difference_table(scores, ["net"]).rows
    assert (mean, least, worse) == ("-1.00", "-5.00", "1 of 2")


SCRIPTS = sorted(
    {run.script for run in tables.runs("cpu")} | {"tables", "quality", "denoising", "transfer", "soak", "faults"}
)


@pytest.mark.slow
def test_scripts_import_no_package_that_make_test_does_not_install() -> None:
    """Where one is missing, a script says so in a sentence when it runs, and `--help` works."""
    imports = "".join(f"import benchmarks.{script}\n" for script in SCRIPTS)
    blocked = f"import sys\nsys.modules.update(dict.fromkeys({PEERS}))\n{imports}"
    done = subprocess.run([sys.executable, "-c", blocked], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_script_run_as_a_file_says_how_it_is_used(tmp_path: Path) -> None:
    """In another folder: an editable install puts the package benchmarks on Python's path."""
    command = [sys.executable, str(ROOT / "benchmarks" / "peers.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert "--json" in done.stdout, done.stderr
    assert "python -m benchmarks.peers" in done.stdout


def test_the_gallery_shows_the_target_every_method_and_its_error(tmp_path: Path) -> None:
    target = np.outer(np.linspace(0, 1, 32), np.ones(24))
    images = {"target": target, "far": np.zeros_like(target), "near": target}
    quality.draw_gallery(tmp_path / "gallery.png", images, title="a slice")
    shown = imread(tmp_path / "gallery.png")[..., :3]
    rows, columns = np.array_split(np.arange(shown.shape[0]), 2), np.array_split(np.arange(shown.shape[1]), 3)
    brightness = [[float(shown[np.ix_(row, column)].mean()) for column in columns] for row in rows]
    assert brightness[0][0] == pytest.approx(brightness[0][2], abs=0.02)
    assert brightness[0][0] > 0.2 > 0.1 > brightness[0][1]
    assert brightness[1][1] > 0.2 > 0.1 > brightness[1][2]

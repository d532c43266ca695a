"""What files are named and hold is shown as text: it steers no terminal, and begins no line of its own."""

import logging
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import coil_images, to_kspace

from mrjax import check, cli
from mrjax.errors import UserError, printable

HARM = "\x1b[2J\nFAULT\u202e<b>$x$\udcff"
SHOWN = r"\x1b[2J\nFAULT\u202e<b>$x$\udcff"


def test_printable_text_has_escapes_for_control_characters_alone() -> None:
    assert printable(HARM) == SHOWN
    assert printable("Größe 3 ± 1: 脳") == "Größe 3 ± 1: 脳"


def test_an_error_is_one_printable_line_of_bounded_length() -> None:
    assert str(UserError("a\nb  \x1b[2J")) == r"a b \x1b[2J"
    assert len(str(UserError("long " * 1000))) <= 2000


def test_the_log_shows_escapes() -> None:
    record = logging.LogRecord("mrjax", logging.INFO, "", 0, "%s\nsecond", ("\x1b[2J",), None)
    assert cli._PrintableFormatter().format(record) == "\\x1b[2J\nsecond"


@pytest.mark.parametrize("faulty", [False, True])
def test_check_shows_names_and_attributes_as_text(tmp_path: Path, capsys, faulty: bool) -> None:
    path = tmp_path / f"{HARM}.t5"
    with h5py.File(path, "w") as file:
        file["kspace"] = to_kspace(coil_images(2, 1, 16, 12)) * (np.nan if faulty else 1)
        file["odd"] = 1
        file.move("odd", HARM.replace("\udcff", ""))
        file.attrs["acquisition"] = HARM.replace("\udcff", "")
    assert check.main(["check", str(path)]) == faulty
    shown = capsys.readouterr().out
    assert all(map(str.isprintable, shown.splitlines()))
    assert SHOWN in shown
    assert sum(line.startswith("FAULT") for line in shown.splitlines()) == faulty

"""Write files so that nothing is lost: beside their place, then renamed into it; checksums; a lock."""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mrjax.errors import UserError, expect

logger = logging.getLogger(__name__)
CHECKSUMS = "checksums.json"  # in a folder, the SHA-256 of the files in its subfolders by their names


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path to write to, of the same suffix, and rename it to `path` at the end; its folder is made if need be.

    A failure leaves no file, or the old one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{path.suffix}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a folder to fill, and rename it to `path` at the end; a failure leaves none.

    Raises `UserError` unless `path` is new, or an empty folder.
    """
    path = Path(os.path.abspath(path))
    empty = path.is_dir() and not any(path.iterdir())
    expect(empty or not os.path.lexists(path), f"{path} is there already", "an empty or new folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    part.mkdir()
    try:
        yield part
        os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def to_json(values: Any, indent: int | None = None) -> str:
    """Format values as JSON, which has no infinity and no NaN: these become null."""
    return json.dumps(json.loads(json.dumps(values), parse_constant=lambda name: None), indent=indent) + "\n"


def write_json(path: Path, values: Any) -> None:
    """Write JSON."""
    with replacing(path) as part:
        part.write_text(to_json(values, indent=2))


def write_checksums(folder: Path) -> None:
    """Write the SHA-256 of all files in the subfolders of a folder."""
    files = [path for path in sorted(folder.glob("*/**/*")) if path.is_file()]
    write_json(folder / CHECKSUMS, {str(file.relative_to(folder)): sha256(file) for file in files})


def find_damage(folder: Path) -> str:
    """Compare the files in a folder with their checksums; return what is wrong with the first, '' if nothing is."""
    try:
        checksums = json.loads((folder / CHECKSUMS).read_text())
        return next((f"{name} has changed" for name, sha in checksums.items() if sha256(folder / name) != sha), "")
    except FileNotFoundError as error:
        return f"{os.path.relpath(error.filename, folder)} is missing"
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        return f"its checksums cannot be compared: {error}"


def sha256(file: Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def lock(folder: str) -> contextlib.AbstractContextManager[Any]:
    """Lock a folder, made if need be, until the result is left; `UserError` if another process has done so.

    A POSIX lock: it ends with the process, however that ends, is not inherited by workers, and holds over NFS. A file
    system without locks is warned of.
    """
    os.makedirs(folder, exist_ok=True)
    file = open(os.path.join(folder, ".lock"), "a+")  # noqa: SIM115 - it holds the lock as long as it is open
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise UserError(f"{folder} is in use by {file.read()}, expected its end, or another folder") from None
    except OSError as error:
        logger.warning("%s: its file system has no locks (%s), so nothing keeps a second run out", folder, error)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file

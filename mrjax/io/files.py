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

from mrjax.errors import UserError

logger = logging.getLogger(__name__)
CHECKSUMS = "checksums.json"  # in a folder, the SHA-256 of the files in its subfolders by their names


def stem(path: str | os.PathLike[str]) -> str:
    """Return a file's name without folder and suffix: `x` of `x.t5` and of `x.nii.gz`."""
    path = Path(path)
    return Path(path.stem).stem if path.suffix.lower() == ".gz" else path.stem


def identity(file: os.stat_result) -> tuple[int, ...]:
    """Return what changes when a file is replaced or written to."""
    return file.st_ino, file.st_size, file.st_mtime_ns


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path to write to, of the same suffix, and rename it to `path` at the end; its folder is made if need be.

    A failure leaves no file, or the old one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{stem(path)}.{uuid.uuid4().hex}{path.name.removeprefix(stem(path))}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to write to, and rename it to `path` at the end, in the place of the folder there.

    A failure leaves no folder, or the old one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part, old = (path.with_name(f".{path.name}.{uuid.uuid4().hex}") for _ in range(2))
    try:
        part.mkdir()
        yield part
        if path.exists():
            os.replace(path, old)
        os.replace(part, path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(part, ignore_errors=True)


def read_start(path: str) -> bytes:
    """Read the first 512 bytes of a file; none of what is no file, or cannot be read."""
    if not os.path.isfile(path):  # to open a pipe would wait for ever
        return b""
    try:
        with open(path, "rb") as file:
            return file.read(512)
    except OSError:  # a reader will say why
        return b""


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

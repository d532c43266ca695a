"""What was found by reading whole files, kept for the next start in ~/.cache/mrjax/findings.

A JSON file there belongs to a folder of data, and may be deleted at any time. Faults are not kept: a file system may
fail for a moment.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mrjax.io.files import identity, replacing
from mrjax.io.storage import Storage
from mrjax.io.volume import Volume
from mrjax.ops.cpu.native import private_folder

logger = logging.getLogger(__name__)
Entries = dict[str, Any]  # [digest of what it depends on, finding] by kind of finding and name of the first file


class Findings(contextlib.AbstractContextManager["Findings"]):
    """Findings about volumes stored as `storage` says; new ones are written at the end, however that comes.

    Several processes may write: each writes whole files, and a finding that is lost so is found again.
    """

    def __init__(self, storage: Storage):
        self._storage, self._folder = storage, None
        self._known: dict[Path, Entries] = {}
        self._new: dict[Path, Entries] = {}
        try:
            self._folder = private_folder("findings")
        except OSError as error:
            logger.warning("the next start reads all files again: %s", error)

    def find(self, kind: str, volumes: Sequence[Volume], read: Callable[[], Any], settings: Any = None) -> Any:
        """Return what `read`, a function of the volumes and settings, returned for these files as they are now.

        It is called if that is not known; JSON must hold what it returns. May be called from any thread.
        """
        if self._folder is None:
            return read()
        folder, name = os.path.split(os.path.realpath(volumes[0].path))
        file = self._folder / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]}.json"
        try:
            name, digest = f"{kind} {name}", self._digest(volumes, settings)
        except OSError:  # a file is gone: to read it says so
            return read()
        if file not in self._known:
            self._known[file] = _read_entries(file)
        match self._known[file].get(name):
            case [found, finding] if found == digest:
                return finding
        finding = read()
        self._new.setdefault(file, {})[name] = [digest, finding]
        return finding

    def _digest(self, volumes: Sequence[Volume], settings: Any) -> str:
        """Hash all that a finding depends on: identity of the files, what their headers tell, settings, this code."""
        headers = [replace(volume, stored_mask=None, affine=None) for volume in volumes]
        files = [(path, identity(os.stat(path))) for one in headers for path in (one.path, *one.files)]
        parts = repr((_hash_of_sources(), self._storage, settings, headers, files))
        return hashlib.sha256(os.fsencode(parts)).hexdigest()[:32]

    def __exit__(self, *_: Any) -> None:
        try:
            for file, entries in self._new.items():
                with replacing(file) as part:
                    part.write_text(json.dumps(_read_entries(file) | entries))
        except OSError as error:
            logger.warning("the next start reads files again: %s", error)


def _read_entries(file: Path) -> Entries:
    """Read a file of findings; none of one that is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        entries = json.loads(file.read_bytes())
        return entries if isinstance(entries, dict) else {}
    return {}


@functools.cache
def _hash_of_sources() -> str:
    """Hash the code that reads and checks files."""
    package = Path(__file__).parents[1]
    rooms = (package / "data", package / "io", package / "mri")
    sources = [path.read_bytes() for room in rooms for path in sorted(room.glob("*.py"))]
    return hashlib.sha256(b"\0".join(sources)).hexdigest()

"""Demo data: M4Raw-like scans of a real brain template, with an anatomy for each subject and noise for each scan."""

import concurrent.futures
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mrjax.data import hdf5, ismrmrd
from mrjax.demo import acquisition, anatomy
from mrjax.demo.anatomy import Subject, Template
from mrjax.errors import UserError
from mrjax.mri.fourier import magnitude_host

SPLITS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What demo data to make; the same settings give the same bytes. Raises a `UserError` for a value out of range."""

    size: int = 128  # pixels along either side of the 250 mm field of view, at least 32
    coils: int = 4  # receive coils around the head; one is a volume coil
    slices: int = 18  # axial slices of 5 mm, evenly spaced over the brain: 6.2 mm apart where there are 18
    repetitions: int = 1  # scans of every contrast, which differ by their noise
    seed: int = 0  # of all random numbers, not negative
    subjects: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"train": 12, "val": 2, "test": 2})

    def __post_init__(self) -> None:
        for name, least in {"size": 32, "coils": 1, "slices": 1, "repetitions": 1, "seed": 0}.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}, expected a whole number of at least {least}")
        if unknown := set(self.subjects) - set(SPLITS):
            raise UserError(f"subjects names the split {min(unknown)!r}, expected {', '.join(SPLITS)}")
        counts = self.subjects.values()
        if self.repetitions > 99 or not all(0 <= n <= 9999 for n in counts) or not sum(counts):
            raise UserError(
                f"subjects is {dict(self.subjects)} and repetitions {self.repetitions}, expected 1 subject or more in "
                "all, at most 9999 a split and at most 99 repetitions"
            )


# For tasks on repeated scans: as many repetitions as M4Raw's T1 and T2 have, of half the subjects.
REPEATED = Settings(repetitions=3, subjects={"train": 6, "val": 1, "test": 1})


def make(output: str | os.PathLike[str], settings: Settings | None = None, *, progress: bool = True) -> None:
    """Write `output/{train,val,test}/<study>_<T1|T2|FLAIR><NN>.t5`, all files or none; no subject is in two splits.

    A file holds `kspace` complex64 (slices, coils, size, size), centred and orthonormal, `reconstruction_rss` float32
    (slices, size, size), `ismrmrd_header`, and fastMRI's attributes. The brain has a signal of about 0.4. A subject's
    anatomy depends on the seed, its split and its number alone. Raises a `UserError` if the output exists and is not an
    empty folder, or without nilearn.
    """
    output, settings = Path(output), settings or Settings()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{output} exists already and is not an empty folder, expected a new folder for the demo data")
    template = anatomy.load_template()
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".part", dir=output.parent))
    try:
        partial.chmod(0o755)
        for split in SPLITS:
            (partial / split).mkdir()
        subjects = [
            Subject(settings.seed, split, number)
            for split, name in enumerate(SPLITS)
            for number in range(settings.subjects.get(name, 0))
        ]
        # Threads suffice: interpolation, random numbers and FFTs all release the interpreter's lock.
        with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            written = pool.map(lambda subject: _write_subject(partial, template, subject, settings), subjects)
            list(tqdm(written, total=len(subjects), desc="demo data", unit="subject", disable=not progress))
        partial.replace(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_subject(folder: Path, template: Template, subject: Subject, settings: Settings) -> None:
    size, slices, pixel = settings.size, settings.slices, anatomy.FIELD_OF_VIEW / settings.size
    study = f"2026{subject.split + 1:02d}{subject.number + 1:04d}"
    head = anatomy.make_anatomy(template, subject, size=size, slices=slices)
    coils = acquisition.make_sensitivities(subject, size=size, coils=settings.coils, slices=slices)
    header = ismrmrd.header((size, size), pixel, anatomy.THICKNESS)
    for i, contrast in enumerate(acquisition.PROTOCOLS):
        image = acquisition.make_image(head, subject, contrast)
        for repetition in range(1, settings.repetitions + 1):
            rng = subject.generator(3, i, repetition)
            kspace = acquisition.acquire_kspace(image, coils, rng, noise=acquisition.draw_noise_level(rng))
            rss = magnitude_host(kspace)
            path = folder / SPLITS[subject.split] / f"{study}_{contrast}{repetition:02d}.t5"
            arrays = {"kspace": kspace, "reconstruction_rss": rss, "ismrmrd_header": header}
            numbers = {"max": float(rss.max()), "norm": float(np.linalg.norm(rss))}
            hdf5.write(path, arrays, numbers | {"acquisition": contrast, "patient_id": study})

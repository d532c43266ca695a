"""Demo data: M4Raw-like scans of a real brain template, with an anatomy for each subject and noise for each scan."""

import dataclasses
import functools
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.contrib.concurrent import thread_map

from mrjax.demo import acquisition, anatomy
from mrjax.demo.anatomy import Subject, Template
from mrjax.errors import expect
from mrjax.io import hdf5, ismrmrd_header
from mrjax.mri.fourier import magnitude_host

SPLITS = ("train", "val", "test")


def _setting(default: int, description: str, least: int = 0, most: int = 9999) -> Any:
    return dataclasses.field(default=default, metadata={"help": description, "limits": (least, most)})


@dataclasses.dataclass(frozen=True)
class Settings:
    """What demo data to make; the same settings give the same bytes. Raises a `UserError` for a value out of range."""

    size: int = _setting(128, "pixels along either side of the 250 mm field of view (M4Raw: 256)", least=32)
    coils: int = _setting(4, "receive coils around the head; one is a volume coil", least=1)
    slices: int = _setting(18, "axial slices of 5 mm, evenly spaced over the 105 mm of the brain", least=1)
    repetitions: int = _setting(1, "scans of every contrast, independent in their noise", least=1, most=99)
    seed: int = _setting(0, "the same seed gives the same files", most=sys.maxsize)
    train: int = _setting(12, "subjects in train/")
    val: int = _setting(2, "subjects in val/")
    test: int = _setting(2, "subjects in test/")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, (least, most) = getattr(self, field.name), field.metadata["limits"]
            expect(least <= value <= most, f"{field.name} is {value}", f"a whole number from {least} to {most}")
        expect(self.train + self.val + self.test, "train, val and test are 0", "1 subject or more in all")


# For tasks on repeated scans: as many repetitions as M4Raw's T1 and T2 have, of half the subjects.
REPEATED = Settings(repetitions=3, train=6, val=1, test=1)


def make(output: str | os.PathLike[str], settings: Settings | None = None) -> None:
    """Write `output/{train,val,test}/<study>_<T1|T2|FLAIR><NN>.t5`, all files or none; no subject is in two splits.

    A file holds `kspace` complex64 (slices, coils, size, size), centred and orthonormal, `reconstruction_rss` float32
    (slices, size, size), `ismrmrd_header`, and fastMRI's attributes. The brain has a signal of about 0.4. A subject's
    anatomy depends on the seed, its split and its number alone. Raises a `UserError` if the output exists and is not an
    empty folder, or without nilearn.
    """
    output, settings = Path(output), settings or Settings()
    free = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    expect(free, f"{output} exists already and is not an empty folder", "a new folder for the demo data")
    template = anatomy.load_template()
    output.parent.mkdir(parents=True, exist_ok=True)
    subjects = [
        Subject(settings.seed, split, number)
        for split, name in enumerate(SPLITS)
        for number in range(getattr(settings, name))
    ]
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", suffix=".part", dir=output.parent) as temporary:
        partial = Path(temporary, output.name)
        for split in SPLITS:
            (partial / split).mkdir(parents=True)
        write = functools.partial(_write_subject, partial, template, settings)
        # Threads suffice: interpolation, random numbers and FFTs all release the interpreter's lock.
        thread_map(write, subjects, max_workers=min(4, os.cpu_count() or 1), desc="demo data", unit="subject")
        partial.replace(output)


def _write_subject(folder: Path, template: Template, settings: Settings, subject: Subject) -> None:
    size, slices, pixel = settings.size, settings.slices, anatomy.FIELD_OF_VIEW / settings.size
    study = f"2026{subject.split + 1:02d}{subject.number + 1:04d}"
    head = anatomy.make_anatomy(template, subject, size=size, slices=slices)
    coils = acquisition.make_sensitivities(subject, size=size, coils=settings.coils, slices=slices)
    header = ismrmrd_header.header((size, size), pixel, anatomy.THICKNESS)
    for i, contrast in enumerate(acquisition.PROTOCOLS):
        image = acquisition.make_image(head, subject, contrast)
        # 24 to 34 in M4Raw, at 0.3 T, whose scans are repeated for it; ten times as much at 3 T.
        most = 34 if settings.repetitions > 1 else 340
        snr = math.exp(subject.generator(3, i).uniform(math.log(24), math.log(most)))
        for repetition in range(1, settings.repetitions + 1):
            rng = subject.generator(3, i, repetition)
            kspace = acquisition.acquire_kspace(image, coils, snr, rng)
            rss = magnitude_host(kspace)
            path = folder / SPLITS[subject.split] / f"{study}_{contrast}{repetition:02d}.t5"
            arrays = {"kspace": kspace, "reconstruction_rss": rss, "ismrmrd_header": header}
            numbers = {"max": float(rss.max()), "norm": float(np.linalg.norm(rss))}
            hdf5.write(path, arrays, numbers | {"acquisition": contrast, "patient_id": study})

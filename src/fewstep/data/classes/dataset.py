"""Pictures of classes as webdataset samples, in an order that hangs on the seed alone."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fewstep.data.classes.idx import idx_files, read_pictures
from fewstep.data.classes.settings import DIGITS_HELD_OUT, DIGITS_TRAIN, ClassPicturesSettings
from fewstep.data.splits import SPLITS, Split
from fewstep.errors import DataError

#: Of Fashion-MNIST, MNIST and the digits alike.
_BACKGROUND = 0

#: Which digits are held out never changes: a model trained under one seed may be judged under another.
_HELD_OUT_SEED = "digits/held-out"

_Pictures = tuple[NDArray[np.uint8], NDArray[np.uint8], list[str]]


def class_samples(settings: ClassPicturesSettings, split: Split) -> Iterator[dict[str, Any]]:
    """Yield the split's samples: `__key__`, and the members png (grey), cls (label in ASCII), txt (name) and json.

    The same settings give the same samples; fewer samples of a split are the first of more. Alignment has none.

    Raises:
        DataError: the files are missing or damaged, hold fewer pictures than asked for or labels without a name, or
            scikit-learn is not installed.
    """
    wanted = settings.num_samples(split)
    if not wanted:
        return
    pictures, labels, urls = _digits(split) if settings.source == "digits" else _idx(settings, split)
    if wanted > len(pictures):
        raise DataError(
            f"num_{split}={wanted} is more than the {len(pictures)} pictures of that split in {settings.path}: lower it"
        )
    names = settings.class_names
    if labels.max() >= len(names):
        raise DataError(
            f"{settings.path} has the label {labels.max()}, and class_names only {len(names)} names: "
            "there must be a name for every label from 0 on"
        )
    for number, index in enumerate(_order(len(pictures), f"{settings.seed}/{split}")[:wanted]):
        label = int(labels[index])
        key = f"{SPLITS.index(split)}{number:08d}"
        record = {
            "key": key,
            "url": urls[index],
            "caption": names[label],
            "label": label,
            "name": names[label],
            "width": settings.resolution,
            "height": settings.resolution,
            "original_width": pictures.shape[2],
            "original_height": pictures.shape[1],
            "status": "success",
            "split": split,
            "source": settings.credit,
            "license": settings.license,
        }
        yield {
            "__key__": key,
            "png": _png(pictures[index], settings.resolution),
            "cls": str(label).encode(),
            "txt": names[label].encode(),
            "json": json.dumps(record, sort_keys=True).encode(),
        }


def files_digest(settings: ClassPicturesSettings, split: Split) -> str | None:
    """Return the SHA-256 of the files that a split is read from, in hex; None for digits, which have none.

    Raises:
        DataError: a file is missing.
    """
    if settings.source == "digits":
        return None
    total = hashlib.sha256()
    for file in idx_files(settings.path, _part(split)):
        total.update(_digest(file, file.stat().st_mtime_ns))
    return total.hexdigest()


@lru_cache
def _digest(file: Path, changed_ns: int) -> bytes:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()


def _part(split: Split) -> str:
    return "train" if split == "train" else "t10k"


def _idx(settings: ClassPicturesSettings, split: Split) -> _Pictures:
    part = _part(split)
    pictures, labels = read_pictures(settings.path, part)
    return pictures, labels, [f"idx:{part}/{index}" for index in range(len(labels))]


def _digits(split: Split) -> _Pictures:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(f"the digits come with scikit-learn ({error}): pip install scikit-learn") from error
    loaded = load_digits()
    order = _order(DIGITS_TRAIN + DIGITS_HELD_OUT, _HELD_OUT_SEED)
    chosen = order[:DIGITS_TRAIN] if split == "train" else order[DIGITS_TRAIN:]
    pictures = np.round(loaded.images[chosen] * (255 / 16)).astype(np.uint8)  # they count from 0 to 16
    return pictures, loaded.target[chosen].astype(np.uint8), [f"digits:{index}" for index in chosen]


def _order(count: int, seed: str) -> list[int]:
    # By hash and not by a library's shuffle, so that no version of it brings a held-out picture into training.
    return sorted(range(count), key=lambda index: hashlib.sha256(f"{seed}/{index}".encode()).digest())


def _png(pixels: NDArray[np.uint8], resolution: int) -> bytes:
    if (len(pixels), resolution) == (28, 32):
        # A side that halves often is wanted of a U-Net; a border keeps the pixels as they are, resizing smears them.
        pixels = np.pad(pixels, 2, constant_values=_BACKGROUND)
    picture = Image.fromarray(pixels)
    if picture.size != (resolution, resolution):
        picture = picture.resize((resolution, resolution), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    picture.save(data, format="PNG")
    return data.getvalue()

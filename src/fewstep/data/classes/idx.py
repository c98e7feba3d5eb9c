"""Reading IDX, the format of MNIST: a magic number, the sizes, and the bytes.

Source: http://yann.lecun.com/exdb/mnist, "the IDX file format": two zero bytes, one for the type of the numbers (8:
unsigned byte), one for the number of dimensions, each size as a big-endian 32-bit number, then the numbers row by row.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fewstep.errors import DataError

_KINDS = ("images-idx3", "labels-idx1")
_UNSIGNED_BYTE = 8
_FIX = (
    "install Fashion-MNIST with `apt install dataset-fashion-mnist`, or name under `path` a folder with "
    "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, plain or .gz"
)


def read_pictures(folder: Path, part: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the pictures (N, side, side) and labels (N,) of a part: train or t10k.

    Raises:
        DataError: the folder or a file is missing or damaged, or the two files do not fit together.
    """
    images_file, labels_file = idx_files(folder, part)
    images, labels = read_idx(images_file, ndim=3), read_idx(labels_file, ndim=1)
    if len(images) != len(labels):
        raise DataError(
            f"{images_file} has {len(images)} pictures and {labels_file.name} {len(labels)} labels: there must be one "
            "label for each picture; take both files from the same set"
        )
    if images.shape[1] != images.shape[2] or images.shape[1] == 0:
        raise DataError(f"the pictures of {images_file} are {images.shape[2]} × {images.shape[1]}: they must be square")
    return images, labels


def idx_files(folder: Path, part: str) -> list[Path]:
    """Return the files of a part: its pictures and its labels.

    Raises:
        DataError: the folder or a file is missing.
    """
    return [_find(folder, f"{part}-{kind}-ubyte") for kind in _KINDS]


def read_idx(file: Path, *, ndim: int) -> NDArray[np.uint8]:
    """Return the numbers of an IDX file of unsigned bytes; a name that ends in .gz is unpacked.

    Args:
        file: the file.
        ndim: how many dimensions it must have.

    Raises:
        DataError: it cannot be read, is no such IDX file, or has fewer or more bytes than its sizes say.
    """
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as opened:
            data = opened.read()
    except (OSError, EOFError, zlib.error) as error:  # gzip.BadGzipFile is an OSError
        raise DataError(f"{file} cannot be read ({error}): take it anew from where it came") from error
    if len(data) < 4 or data[:2] != b"\0\0":
        raise DataError(f"{file} is no IDX file: it begins with {data[:4].hex() or 'nothing'} instead of 0000; {_FIX}")
    if data[2] != _UNSIGNED_BYTE or data[3] != ndim:
        raise DataError(
            f"{file} has the magic number {data[:4].hex()}: it must be {bytes((0, 0, _UNSIGNED_BYTE, ndim)).hex()}, "
            f"unsigned bytes in {ndim} dimension{'s' if ndim > 1 else ''}; is it another file under this name?"
        )
    start = 4 + 4 * ndim
    shape = tuple(int.from_bytes(data[at : at + 4], "big") for at in range(4, start, 4))
    if len(data) - start != math.prod(shape):
        raise DataError(
            f"{file} has {len(data)} bytes: its header says {' × '.join(map(str, shape))}, which takes "
            f"{start + math.prod(shape)}; it was cut short or damaged, take it anew from where it came"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _find(folder: Path, name: str) -> Path:
    folder = folder.expanduser()
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}: {_FIX}")
    for file in (folder / name, folder / f"{name}.gz"):
        if file.is_file():
            return file
    raise DataError(f"neither {name} nor {name}.gz is in {folder}: {_FIX}")

"""Class-conditional picture sets: every sample has its class, its licence and its place in an order that stays."""

from __future__ import annotations

import gzip
import io
import json
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from fewstep.data.classes import ClassPicturesSettings, class_names, class_samples, read_idx
from fewstep.data.classes.settings import FASHION_MNIST
from fewstep.data.pictures import decode_class_picture, decode_picture
from fewstep.data.shards import write_shards
from fewstep.data.stream import ShardStream, StreamSettings
from fewstep.errors import DataError
from fewstep.storage import Storage

NAMES = ("cat", "dog", "owl")


def _idx_bytes(numbers: np.ndarray, *, magic: bytes | None = None) -> bytes:
    header = bytes((0, 0, 8, numbers.ndim)) if magic is None else magic
    return header + b"".join(n.to_bytes(4, "big") for n in numbers.shape) + numbers.astype(np.uint8).tobytes()


def _write(folder: Path, *, side: int = 28, train: int = 12, held_out: int = 6) -> Path:
    """A set of three classes, the train files packed, the t10k files plain; a picture's first pixel is its number."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("t10k", held_out)):
        images = rng.integers(0, 256, (count, side, side))
        images[:, 0, 0] = np.arange(count) + (100 if part == "t10k" else 0)
        for name, numbers in (("images-idx3", images), ("labels-idx1", np.arange(count) % 3)):
            data = _idx_bytes(numbers)
            if part == "train":
                (folder / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(data, mtime=0))
            else:
                (folder / f"{part}-{name}-ubyte").write_bytes(data)
    return folder


def _settings(folder: Path, **change: Any) -> ClassPicturesSettings:
    return ClassPicturesSettings(
        **{"source": "idx", "path": folder, "class_names": NAMES, "num_train": 12, "num_evaluate": 6, **change}
    )


def _picture(sample: dict[str, Any]) -> np.ndarray:
    with Image.open(io.BytesIO(sample["png"])) as opened:
        assert opened.mode == "L"
        return np.array(opened)


def test_every_picture_of_the_files_comes_once_with_its_own_label(tmp_path: Path) -> None:
    settings = _settings(_write(tmp_path), resolution=28)
    for split, start, count in (("train", 0, 12), ("evaluate", 100, 6)):
        samples = list(class_samples(settings, split))
        numbers = [int(_picture(sample)[0, 0]) - start for sample in samples]
        assert sorted(numbers) == list(range(count)) != numbers
        for number, sample in zip(numbers, samples, strict=True):
            assert set(sample) == {"__key__", "png", "cls", "txt", "json"}
            assert sample["cls"] == str(number % 3).encode()
            assert sample["txt"] == NAMES[number % 3].encode()
            record = json.loads(sample["json"])
            assert (record["key"], record["label"], record["name"]) == (
                sample["__key__"],
                number % 3,
                NAMES[number % 3],
            )
            assert record["url"] == f"idx:{'train' if split == 'train' else 't10k'}/{number}"
            assert (record["width"], record["original_width"], record["split"]) == (28, 28, split)
    assert list(class_samples(settings, "alignment")) == []
    assert settings.num_samples("alignment") == 0


def test_keys_are_unique_over_the_splits(tmp_path: Path) -> None:
    settings = _settings(_write(tmp_path))
    keys = [sample["__key__"] for split in ("train", "evaluate") for sample in class_samples(settings, split)]
    assert len(set(keys)) == len(keys) == 12 + 6


def test_the_order_hangs_on_the_seed_alone(tmp_path: Path) -> None:
    settings = _settings(_write(tmp_path))
    whole = list(class_samples(settings, "train"))
    assert list(class_samples(settings, "train")) == whole
    assert list(class_samples(_settings(tmp_path, num_train=5), "train")) == whole[:5]
    assert list(class_samples(_settings(tmp_path, num_evaluate=2), "train")) == whole
    other = list(class_samples(_settings(tmp_path, seed=1), "train"))
    assert other != whole
    assert {sample["png"] for sample in other} == {sample["png"] for sample in whole}


def test_28_px_become_32_by_a_border_and_other_sizes_are_resized(tmp_path: Path) -> None:
    _write(tmp_path)
    plain, padded, small = (
        [_picture(sample) for sample in class_samples(_settings(tmp_path, resolution=side), "evaluate")]
        for side in (28, 32, 14)
    )
    for before, after, reduced in zip(plain, padded, small, strict=True):
        assert after.shape == (32, 32)
        assert (after[2:-2, 2:-2] == before).all()
        assert after.sum() == before.sum()
        assert reduced.shape == (14, 14)
        assert abs(float(reduced.mean()) - float(before.mean())) < 5


def test_a_set_of_another_side_is_resized_to_32(tmp_path: Path) -> None:
    settings = _settings(_write(tmp_path, side=20))
    assert all(_picture(sample).shape == (32, 32) for sample in class_samples(settings, "train"))


def test_credit_and_licence_are_said_only_of_what_is_known(tmp_path: Path) -> None:
    _write(tmp_path)
    record = json.loads(next(class_samples(_settings(tmp_path), "train"))["json"])
    assert (record["source"], record["license"]) == ("unknown", "unknown")
    record = json.loads(next(class_samples(_settings(tmp_path, credit="me", license="CC0-1.0"), "train"))["json"])
    assert (record["source"], record["license"]) == ("me", "CC0-1.0")
    fashion = ClassPicturesSettings(source="idx")
    assert (fashion.credit, fashion.license) == ("Fashion-MNIST, copyright 2017 Zalando SE", "MIT")


def test_samples_become_batches_of_labels_and_pixels(tmp_path: Path, storage: Storage, bucket_uri: str) -> None:
    settings = _settings(_write(tmp_path), samples_per_shard=6)
    index = write_shards(
        class_samples(settings, "train"), bucket_uri, samples_per_shard=settings.samples_per_shard, storage=storage
    )
    decode = partial(decode_class_picture, resolution=32, channels=1, num_classes=3)
    with ShardStream(
        index, storage=storage, decode=decode, settings=StreamSettings(num_streams=1), global_batch_size=12, seed=0
    ) as stream:
        batch = next(iter(stream))
    assert batch.counts == {}
    assert (batch.data["label"].dtype, batch.data["label"].shape) == (torch.int64, (12,))
    assert (batch.data["pixels"].dtype, batch.data["pixels"].shape) == (torch.uint8, (12, 1, 32, 32))
    # The number in the first pixel of the picture, inside its border, tells which label belongs to it.
    assert torch.equal(batch.data["pixels"][:, 0, 2, 2] % 3, batch.data["label"])


def test_read_idx_reads_plain_and_packed_files_of_any_dimensions(tmp_path: Path) -> None:
    for shape in ((5,), (2, 3), (2, 3, 4)):
        numbers = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
        (tmp_path / "plain").write_bytes(_idx_bytes(numbers))
        (tmp_path / "packed.gz").write_bytes(gzip.compress(_idx_bytes(numbers), mtime=0))
        for name in ("plain", "packed.gz"):
            got = read_idx(tmp_path / name, ndim=len(shape))
            assert got.dtype == np.uint8
            assert (got == numbers).all()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("train-images-idx3-ubyte.gz", b"<html>", r"cannot be read \(Not a gzipped file"),
        ("train-images-idx3-ubyte.gz", gzip.compress(bytes(1000), mtime=0)[:-12], r"cannot be read \("),
        ("train-images-idx3-ubyte.gz", gzip.compress(b"", mtime=0), "begins with nothing instead of 0000"),
        ("t10k-images-idx3-ubyte", b"\x89PNG\r\n\x1a\n", "is no IDX file: it begins with 89504e47"),
        (
            "t10k-images-idx3-ubyte",
            _idx_bytes(np.zeros(6)),
            "has the magic number 00000801: it must be 00000803, unsigned bytes in 3 dimensions",
        ),
        ("t10k-labels-idx1-ubyte", _idx_bytes(np.zeros(6), magic=b"\0\0\x0d\1"), "magic number 00000d01"),
        ("t10k-labels-idx1-ubyte", _idx_bytes(np.zeros(6))[:-1], "has 13 bytes: its header says 6, which takes 14"),
        ("t10k-labels-idx1-ubyte", _idx_bytes(np.zeros(6)) + b"x", "has 15 bytes: its header says 6, which takes 14"),
        ("t10k-labels-idx1-ubyte", b"\0\0\x08\1\0", "has 5 bytes"),
        ("t10k-images-idx3-ubyte", b"\0\0\x08\3" + b"\xff" * 12, "4294967295 × 4294967295 × 4294967295"),
        ("t10k-labels-idx1-ubyte", _idx_bytes(np.zeros(5)), "has 6 pictures and t10k-labels-idx1-ubyte 5 labels"),
        ("t10k-labels-idx1-ubyte", _idx_bytes(np.full(6, 3)), "has the label 3, and class_names only 3 names"),
        ("t10k-images-idx3-ubyte", _idx_bytes(np.zeros((6, 8, 9))), "are 9 × 8: they must be square"),
        ("t10k-images-idx3-ubyte", _idx_bytes(np.zeros((6, 0, 0))), "are 0 × 0: they must be square"),
    ],
)
def test_a_damaged_file_is_told(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    settings = _settings(_write(tmp_path))
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        list(class_samples(settings, "train" if name.startswith("train") else "evaluate"))


def test_what_is_not_there_is_told_with_where_to_have_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no folder .*nowhere: install .*apt install dataset-fashion-mnist"):
        list(class_samples(_settings(tmp_path / "nowhere"), "train"))
    _write(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    assert len(list(class_samples(_settings(tmp_path), "train"))) == 12
    with pytest.raises(DataError, match=r"neither t10k-labels-idx1-ubyte nor t10k-labels-idx1-ubyte\.gz is in"):
        list(class_samples(_settings(tmp_path), "evaluate"))


@pytest.mark.parametrize(("key", "split", "most"), [("num_train", "train", 12), ("num_evaluate", "evaluate", 6)])
def test_more_pictures_than_there_are_is_told(tmp_path: Path, key: str, split: Any, most: int) -> None:
    settings = _settings(_write(tmp_path), **{key: most + 1})
    with pytest.raises(DataError, match=f"{key}={most + 1} is more than the {most} pictures of that split"):
        list(class_samples(settings, split))


def test_digits_are_split_once_for_all_seeds() -> None:
    settings = ClassPicturesSettings(source="digits")
    assert (settings.resolution, settings.num_train, settings.num_evaluate) == (8, 1500, 297)
    assert class_names(settings) == tuple("0123456789")
    train, evaluate = (list(class_samples(settings, split)) for split in ("train", "evaluate"))
    urls = [[json.loads(sample["json"])["url"] for sample in samples] for samples in (train, evaluate)]
    assert len({*urls[0], *urls[1]}) == 1797
    # As on the first day: a later version must not train on what an earlier one held out.
    assert sorted(int(url.removeprefix("digits:")) for url in urls[1])[:6] == [2, 3, 19, 20, 23, 25]
    other = list(class_samples(settings.model_copy(update={"seed": 1}), "evaluate"))
    assert [sample["png"] for sample in other] != [sample["png"] for sample in evaluate]
    assert {json.loads(sample["json"])["url"] for sample in other} == set(urls[1])
    assert min(Counter(sample["cls"] for sample in evaluate).values()) >= 15


def test_digits_are_the_right_ones_at_full_contrast() -> None:
    from sklearn.datasets import load_digits

    loaded = load_digits()
    for sample in class_samples(ClassPicturesSettings(source="digits", num_train=50), "train"):
        record = json.loads(sample["json"])
        index = int(record["url"].removeprefix("digits:"))
        assert sample["txt"].decode() == record["name"] == str(loaded.target[index])
        assert np.abs(_picture(sample) / 255 * 16 - loaded.images[index]).max() < 0.05
        assert record["license"] == "CC-BY-4.0"


def test_digits_without_scikit_learn_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"come with scikit-learn .*: pip install scikit-learn"):
        next(class_samples(ClassPicturesSettings(source="digits"), "train"))


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_fashion_mnist_is_what_it_is_known_to_be() -> None:
    settings = ClassPicturesSettings(source="idx", num_train=300, num_evaluate=200)
    for split, count in (("train", 300), ("evaluate", 200)):
        samples = list(class_samples(settings, split))
        assert len(samples) == count
        assert {sample["txt"].decode() for sample in samples} == set(class_names(settings))
        decoded = [decode_class_picture(sample, resolution=32, channels=1, num_classes=10) for sample in samples]
        by_class: dict[str, list[float]] = {name: [] for name in class_names(settings)}
        for sample, each in zip(samples, decoded, strict=True):
            by_class[sample["txt"].decode()].append(float(each["pixels"].float().mean()))
        bright = {name: sum(means) / len(means) for name, means in by_class.items()}
        # A sandal is mostly background, a pullover fills the picture: the labels belong to the pictures.
        assert min(bright, key=bright.__getitem__) == "Sandal"
        assert bright["Pullover"] > 2 * bright["Sandal"]
        # A caption too, so that a text-conditional teacher can have the same shards.
        assert decode_picture(samples[0], resolution=32)["caption"] in class_names(settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "cifar"}, "'idx' or 'digits'"),
        ({"source": None}, "'idx' or 'digits'"),
        ({"class_names": ()}, "at least 1 item"),
        ({"class_names": ("cat", " ")}, "every class needs a name"),
        ({"class_names": ("cat", "cat ")}, "no two the same"),
        ({"resolution": 4}, "greater than or equal to 8"),
        ({"num_train": 0}, "greater than or equal to 1"),
        ({"colour": True}, "Extra inputs are not permitted"),
        ({"source": "digits", "path": "/data"}, "path='/data' has no effect on digits"),
        ({"source": "digits", "class_names": NAMES}, "class_names has 3 names: the digits have ten classes"),
        ({"source": "digits", "num_train": 1501}, "num_train=1501 is more than the 1500 digits of that split"),
        ({"source": "digits", "num_evaluate": 298}, "num_evaluate=298 is more than the 297 digits of that split"),
    ],
)
def test_settings_that_cannot_be_are_told(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ClassPicturesSettings(**{"source": "idx", **change})


def test_settings_survive_being_written_and_read() -> None:
    for settings in (ClassPicturesSettings(source="digits"), ClassPicturesSettings(source="idx", class_names=NAMES)):
        assert ClassPicturesSettings.model_validate_json(settings.model_dump_json()) == settings
    assert all(field.description for field in ClassPicturesSettings.model_fields.values())

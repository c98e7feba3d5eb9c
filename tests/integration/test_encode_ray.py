"""Encoding in the cluster by Ray Data's actors: the latents of one process, errors as they are, a death survived."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any

import failing_models
import pytest
import ray
from failing_models import cannot_load, dies_once
from PIL import Image

from fewstep.data.shards import read_index, write_shards
from fewstep.errors import DataError, ModelError
from fewstep.models import load_model
from fewstep.stages.encode_shards import Encoders, Encoding, encode_shards
from fewstep.storage import Storage, join
from tiny import tiny_teacher_folder

ray.cloudpickle.register_pickle_by_value(failing_models)

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.slow]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_teacher_folder(tmp_path_factory.mktemp("teacher"))


def _write(uri: str, storage: Storage, *, broken: frozenset[int] = frozenset()) -> None:
    samples = []
    for number in range(24):
        file = io.BytesIO()
        Image.new("RGB", (16, 16), (number * 10, 90, 30)).save(file, format="PNG")
        data = b"broken" if number in broken else file.getvalue()
        samples.append({"__key__": f"{number:04d}", "png": data, "txt": f"picture {number}".encode()})
    write_shards(samples, uri, samples_per_shard=4, storage=storage)


def _encode(source: str, target: str, storage: Storage, teacher: Path, **more: Any) -> dict[str, Any]:
    settings = {"max_bad_share": 0.3, "label": "test", "encoding": Encoding(batch_size=3)}
    return encode_shards(source, target, parts=load_model(teacher), storage=storage, **(settings | more))


def test_the_latents_are_those_of_one_process(teacher: Path, storage: Storage, bucket_uri: str, tmp_path: Path) -> None:
    source = join(bucket_uri, "pictures")
    _write(source, storage, broken=frozenset({5}))
    here = _encode(source, join(bucket_uri, "here"), storage, teacher)
    load = partial(dies_once, teacher, tmp_path / "mark")
    encoders = Encoders(load, count=2, use_gpu=False)
    there = _encode(source, join(bucket_uri, "there"), storage, teacher, encoders=encoders)
    assert (tmp_path / "mark").exists()
    assert there | {"uri": ""} == here | {"uri": ""}
    assert there["skipped"] == {"broken picture": 1}
    assert len(read_index(there["uri"], storage=storage).shards) == 6
    # Shards that have a record are not encoded again, and nobody is started for them.
    storage.delete(join(there["uri"], "records", "00003.json"))
    again = _encode(source, there["uri"], storage, teacher, encoders=Encoders(partial(load_model, teacher), 2, False))
    assert again == there
    assert _encode(source, there["uri"], storage, teacher, encoders=Encoders(cannot_load, 2, False)) == there


@pytest.mark.long
def test_too_many_broken_samples_stop_it(teacher: Path, storage: Storage, bucket_uri: str) -> None:
    source = join(bucket_uri, "pictures")
    _write(source, storage, broken=frozenset(range(12)))
    encoders = Encoders(partial(load_model, teacher), 1, False)
    with pytest.raises(DataError, match=r"Too many samples cannot be used: 12 of the 24"):
        _encode(source, join(bucket_uri, "there"), storage, teacher, encoders=encoders)


@pytest.mark.long
def test_a_model_that_cannot_be_loaded_there_is_told(teacher: Path, storage: Storage, bucket_uri: str) -> None:
    source = join(bucket_uri, "pictures")
    _write(source, storage)
    with pytest.raises(ModelError, match="the folder nowhere has no unet"):
        _encode(source, join(bucket_uri, "there"), storage, teacher, encoders=Encoders(cannot_load, 1, False))

"""The data path on paper: figures by hand, what cannot be, and rates of one's own benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fewstep.cli import main
from fewstep.data.counts import SampleCounts
from fewstep.data.latents import latent_sample
from fewstep.data.shards import Shard, tar_of
from fewstep.data.source import iterate_shard
from fewstep.errors import DataError, FewstepError
from fewstep.plan import plan_data_of, plan_recipe, render_data
from fewstep.plan.rates import read_rates, shipped_rates
from fewstep.plan.teacher import find_shape
from fewstep.plan.transfer import sample_bytes
from fewstep.recipe import Recipe, parse_recipe
from fewstep.storage import Storage, StorageSettings
from fewstep.storage.object_range import ObjectRange

RECIPE = Path("workflows/recipes/sd15-laion-512.yaml")
TRAIN = {"updates": 10, "global_batch_size": 64, "learning_rate": 1.0e-4, "precision": "bfloat16"}


def recipe_of(**changes: Any) -> Recipe:
    return parse_recipe(
        {
            "name": "small",
            "stages": ["prepare", "encode", "guidance"],
            "teacher": "asset:emoji-teacher",
            "prepare": {"resolution": 32, "num_train": 5000},
            "guidance": {"embedding_dim": 256, "train": TRAIN},
            "stream": {"num_streams": 8, "loader_processes": 2, "cache_bytes": 1000},
            **changes,
        }
    )


def test_figures_by_hand() -> None:
    recipe, rates = recipe_of(), shipped_rates()
    plan = plan_recipe(recipe, num_samples=7_000_000, num_workers=4)
    data = plan_data_of(plan, recipe, rows=100_000_000, shards=1000, success=0.5)
    bytes_ = sample_bytes(find_shape(recipe))
    assert data.choosing is not None
    assert data.downloading is not None
    assert data.choosing.kept_rows == 14_000_000
    assert data.choosing.tasks == 25
    assert data.choosing.core_hours == pytest.approx((1e8 * rates.row_read_s + 1.4e7 * rates.row_kept_s) / 3600)
    assert data.choosing.read_bytes == 1e8 * rates.row_bytes
    assert data.downloading.core_hours == pytest.approx(1.4e7 / rates.downloads_per_s / 3600)
    assert data.downloading.stored_bytes == 7e6 * bytes_.picture
    encode, guidance = data.readings
    assert (encode.label, guidance.label) == ("encode", "guidance, stage one")
    step = next(step for step in plan.trainings if step.stage == "guidance")
    assert guidance.samples_per_s == pytest.approx(step.samples / step.seconds)
    assert guidance.bytes_per_s == pytest.approx(guidance.samples_per_s * bytes_.latents)
    assert guidance.requests_per_s == pytest.approx(guidance.bytes_per_s / (8 * 2**20))
    assert guidance.cores_per_gpu == pytest.approx(guidance.bytes_per_s / 4 / rates.latent_bytes_per_s)
    assert encode.requests_per_s == pytest.approx(encode.samples_per_s * bytes_.picture / (16 * 2**20))
    assert encode.cores_per_gpu == pytest.approx(encode.samples_per_s / 4 / (rates.pictures_per_s * 16**2))
    # Two of eight streams; two blocks of 64 MiB and the piece that fills each; four pieces on their way in 2 processes.
    held = 2 * 2 * (64 + 8) * 2**20 + 2 * 4 * 8 * 2**20
    lists = 3 * 1000 * rates.shard_bytes_in_memory
    batches = 3 * 16 * bytes_.latents * 2
    assert data.worker_memory_bytes == pytest.approx(held + lists + batches + 1000)
    assert data.node_memory_bytes == 4 * data.worker_memory_bytes
    text = render_data(data)
    assert "100 M rows, 14 M pass" in text
    assert "num_streams" not in text


def test_encode_takes_a_shard_of_the_local_disk_on_each_encoder() -> None:
    recipe = recipe_of()
    plan = plan_recipe(recipe, num_samples=7_000_000, num_workers=16)
    data = plan_data_of(plan, recipe, shards=1000)
    assert data.encoding is not None
    assert (data.encoding.encoders, data.encoding.shard_samples) == (16, 7000)
    # Latents of 128 + 2 · 512 bytes and a text of 128 + 2 · 3840 in .npy, caption and .json, each with a tar's head.
    assert data.encoding.disk_bytes == 7000 * ((1536 + 512) + (8192 + 512) + 2 * (512 + 512)) == 89_600_000
    assert data.encoding.sorting_bytes == 0
    assert render_data(data).count("encode holds") == 1
    assert (
        "encode holds 89.6 MB of the local disk (TMPDIR) on each encoder, 717 MB on a machine of 8 GPUs: a shard of "
        "7,000 latents until it is uploaded"
    ) in render_data(data)
    alone = recipe_of(encode={"encoders": 1, "store_text": False})
    data = plan_data_of(plan_recipe(alone, num_samples=7_000_000, num_workers=16), alone, shards=1000)
    assert "encode holds 28.7 MB of the local disk (TMPDIR) on each encoder: a shard of" in render_data(data)


def test_encode_with_buckets_sorts_a_shard_in_memory() -> None:
    plain, recipe = (recipe_of(encode={"batch_size": 10, **more}) for more in ({}, {"buckets": {"multiple_of": 8}}))
    before, data = (
        plan_data_of(plan_recipe(each, num_samples=7_000_000, num_workers=4), each, shards=1000)
        for each in (plain, recipe)
    )
    assert data.encoding is not None
    assert data.encoding.num_sizes == 3
    # Ten pictures of 24 × 40, of 32 × 32 and of 40 × 24.
    assert data.encoding.sorting_bytes == 89_600_000 + 10 * 3 * (960 + 1024 + 960)
    assert (
        "encode holds 89.7 MB of memory on each encoder, 359 MB on a machine of 4 GPUs: the latents of a shard until "
        "they are sorted, and a batch of pictures of each of 3 sizes"
    ) in render_data(data)
    # Of groups of eight rows seven wait for each size, in the worker's two streams.
    waiting = data.worker_memory_bytes - before.worker_memory_bytes
    assert waiting == pytest.approx(2 * 3 * 7 * 12_800)


def test_buckets_that_the_pictures_cannot_have() -> None:
    recipe = recipe_of(encode={"buckets": {}})
    with pytest.raises(DataError, match="multiple_of=64 does not divide the model's resolution of 32"):
        plan_data_of(plan_recipe(recipe), recipe, shards=10)


class Counting(Storage):
    """A storage that counts the ranges that it is asked for."""

    asked = 0

    def read_range(self, uri: str, start: int, end: int, *, etag: str | None = None) -> ObjectRange:
        self.asked += 1
        return super().read_range(uri, start, end, etag=etag)


def test_encode_asks_the_store_as_often_as_counted(tmp_path: Path) -> None:
    file = tmp_path / "0.tar"
    picture = {"jpg": bytes(1 << 15), "txt": b"a" * 64, "json": b"{}"}
    file.write_bytes(tar_of([{"__key__": f"{number:09d}", **picture} for number in range(3000)]))
    shard, storage = Shard(str(file), 3000, file.stat().st_size), Counting(StorageSettings())
    found = list(iterate_shard(shard, storage=storage, decode=lambda sample: {}, counts=SampleCounts()))
    assert len(found) == 3000
    recipe = recipe_of()
    encode = plan_data_of(plan_recipe(recipe), recipe, shards=10).readings[0]
    counted = encode.requests_per_s / encode.bytes_per_s * shard.size_bytes
    assert round(counted) == 6
    # The first piece may need another request for the rest of its last sample, whose size is not known yet.
    assert storage.asked in (6, 7)


def test_an_entry_of_the_list_and_a_sample_of_latents_are_as_large_as_counted() -> None:
    import torch

    recipe = recipe_of()
    shape = find_shape(recipe)
    zeros = torch.zeros(shape.sample_shape)
    condition = {name: torch.zeros(size) for name, size in shape.conditions.items()}
    sample = latent_sample("0" * 9, "a" * 64, zeros, zeros, condition)
    many = [{**sample, "__key__": f"{number:09d}"} for number in range(100)]
    assert len(tar_of(many)) / 100 == pytest.approx(sample_bytes(shape).latents, rel=0.01)


def test_streams_that_the_workers_cannot_share_are_told() -> None:
    recipe = recipe_of()
    data = plan_data_of(plan_recipe(recipe, num_workers=16), recipe, shards=100)
    assert data.num_streams == 16
    assert data.choosing is None
    assert "stream.num_streams=8 cannot be shared by 16 workers; counted with 16" in render_data(data)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"rows": 10}, "--rows 10 is less than the 7143 that 5000 pictures need, where 0.7"),
        ({"shards": 0}, "--shards 0 is below 1"),
        ({"rows": 10**6, "success": 1.5}, "--success 1.5 is outside 0 … 1"),
    ],
)
def test_what_cannot_be(more: dict[str, Any], words: str) -> None:
    recipe = recipe_of()
    with pytest.raises(FewstepError, match=words):
        plan_data_of(plan_recipe(recipe), recipe, **more)


def test_rates_of_ones_own_benchmark(tmp_path: Path) -> None:
    measured = {
        "environment": {"device_name": "Some CPU"},
        "settings": {"resolution": 256},
        "pictures": {"rates": {"fewstep": [10.0, 30.0, 20.0]}, "bytes": 5.0},
        "latents": {"rates": {"fewstep": [4.0]}, "bytes": 100.0},
        "metadata": {"rows": 5, "row_read_s": 1.0, "row_kept_s": 2.0, "row_kept_bytes": 3.0, "row_bytes": 4.0},
    }
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(measured))
    rates = read_rates(file)
    assert (rates.pictures_per_s, rates.pictures_px, rates.latent_bytes_per_s) == (20.0, 256, 400.0)
    assert (rates.row_read_s, rates.row_kept_s, rates.row_bytes, rates.row_kept_bytes) == (1.0, 2.0, 4.0, 3.0)
    assert rates.downloads_per_s == shipped_rates().downloads_per_s
    file.write_text("{}")
    with pytest.raises(FewstepError, match="is not what `fewstep bench data --json` prints"):
        read_rates(file)


def test_the_command() -> None:
    said = CliRunner().invoke(main, ["plan", str(RECIPE), "--rows", "1000000000", "--shards", "2000"])
    assert said.exit_code == 0, said.output
    assert "choose rows   1 G rows" in said.output
    as_json = CliRunner().invoke(main, ["plan", str(RECIPE), "--shards", "2000", "--json"])
    assert json.loads(as_json.output)["data"]["shards"] == 2000

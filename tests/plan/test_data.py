"""The data path on paper: figures by hand, what cannot be, and rates of one's own benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fewstep.cli import main
from fewstep.data.latents import latent_sample
from fewstep.data.shards import tar_of
from fewstep.errors import FewstepError
from fewstep.plan import plan_data_of, plan_recipe, render_data
from fewstep.plan.rates import read_rates, shipped_rates
from fewstep.plan.teacher import find_shape
from fewstep.plan.transfer import sample_bytes
from fewstep.recipe import Recipe, parse_recipe

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

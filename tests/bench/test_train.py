"""`bench train`: the real loop and the bare calls in turns, and figures that fit together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_bench import CPU, settings, tiny_workload

from fewstep.bench.batches import SyntheticBatches
from fewstep.bench.settings import Stage
from fewstep.bench.train import bench_workload
from fewstep.bench.workload import recipe_train_workload
from fewstep.data.latents import latent_sample
from fewstep.data.shards import write_index, write_shard
from fewstep.errors import RecipeError
from fewstep.recipe import Recipe, parse_recipe
from fewstep.stages.batches import format_of
from fewstep.stages.context import stage_uri
from fewstep.storage import Storage, join
from tiny import tiny_teacher, tiny_teacher_folder


@pytest.mark.parametrize("stage", ["guidance", "progressive"])
def test_figures_fit_together(stage: Stage) -> None:
    result = bench_workload(
        tiny_workload(), settings(stage=stage, updates=4), device=CPU, command="fewstep bench train"
    )
    assert result.batch_size == 4
    assert result.images_per_second * result.seconds_per_update == pytest.approx(4)
    assert result.tflops == pytest.approx(result.images_per_second * result.gflop_per_image / 1e3)
    assert result.matmul_share == pytest.approx(result.tflops / result.matmul_tflops)
    assert len(result.bare_share_by_round) == 2
    assert min(result.bare_share_by_round) <= result.bare_share <= max(result.bare_share_by_round)
    assert result.bare_share_cpu_time is not None
    assert 0.05 < result.bare_share_cpu_time < 1.5
    assert result.peak_tflops is None
    assert result.mfu is None
    assert 0 <= result.data_wait_share < 1
    assert result.peak_memory_bytes > 50 * 2**20
    shown = result.table()
    assert f"tiny, stage {stage}, batch 4, float32" in shown
    assert "MFU" in shown
    assert "not known" in shown


@pytest.mark.long
def test_precision_and_batch_size_of_the_workload_and_of_the_command() -> None:
    own = bench_workload(tiny_workload(precision="bfloat16"), settings(rounds=1), device=CPU)
    assert (own.precision, own.batch_size) == ("bfloat16", 4)
    told = bench_workload(
        tiny_workload(precision="bfloat16"), settings(rounds=1, precision="float32", batch_size=2), device=CPU
    )
    assert (told.precision, told.batch_size) == ("float32", 2)


def test_made_batches_resume_and_split_like_stored_ones() -> None:
    options = {"sample_shape": (4, 2, 2), "conditions": {"text": (3, 5)}, "global_batch_size": 4, "seed": 3}
    whole = SyntheticBatches(**options)  # type: ignore[arg-type]
    stream = iter(whole)
    batches = [next(stream) for _ in range(6)]
    resumed = SyntheticBatches(**options)  # type: ignore[arg-type]
    resumed.load_state(batches[2].state)
    assert torch.equal(next(iter(resumed)).data["text"], batches[3].data["text"])
    assert not torch.equal(batches[0].data["text"], batches[1].data["text"])

    parts = [next(iter(SyntheticBatches(**options, rank=rank, world_size=2))) for rank in range(2)]  # type: ignore[arg-type]
    assert [part.rows for part in parts] == [[0, 2], [1, 3]]
    assert torch.equal(parts[1].data["latent_mean"], batches[0].data["latent_mean"][[1, 3]])


def recipe(**keys: object) -> Recipe:
    train = {"updates": 9, "global_batch_size": 4, "learning_rate": 1e-3}
    content: dict[str, object] = {
        "name": "tiny",
        "stages": ["guidance"],
        "data": {"train": "s3://tests/pictures"},
        "stream": {"num_streams": 2},
        "guidance": {"embedding_dim": 16, "train": train},
        **keys,
    }
    return parse_recipe(content)


def test_recipe_that_has_not_run(storage: Storage) -> None:
    training = {"updates": 1, "global_batch_size": 4, "learning_rate": 1e-3}
    network = {
        "block_out_channels": [16, 32],
        "num_attention_heads": 2,
        "norm_num_groups": 4,
        "text_width": 16,
        "text_heads": 2,
        "max_prompt_tokens": 12,
    }
    stage = {"autoencoder": {"resolution": 16}, "autoencoder_train": training, "network": network, "train": training}
    workload = recipe_train_workload(recipe(stages=["teacher", "guidance"], train_teacher=stage), "guidance", storage)
    assert "random weights" in workload.network
    assert "synthetic" in workload.data
    assert workload.sample_shape == (4, 4, 4)
    assert workload.conditions == {"text": (12, 16)}
    result = bench_workload(workload, settings(rounds=1), device=CPU)
    assert result.batch_size == 4
    with pytest.raises(RecipeError, match="no settings under the key progressive"):
        recipe_train_workload(recipe(teacher="tiny"), "progressive", storage)


def test_recipe_that_has_encoded_uses_its_own_shards_and_teacher(storage: Storage, tmp_path: Path) -> None:
    loaded = recipe(teacher=str(tiny_teacher_folder(tmp_path / "teacher")))
    uri = stage_uri(loaded, storage, "encode")
    parts = tiny_teacher()
    text = parts.encode_prompts(["a red apple"])[0]
    shards = [
        write_shard(
            [
                latent_sample(f"{s}{k}", "a red apple", torch.randn(4, 4, 4), torch.ones(4, 4, 4), {"text": text})
                for k in range(8)
            ],
            join(uri, "train", f"{s:05d}.tar"),
            storage=storage,
        )
        for s in range(2)
    ]
    write_index(shards, join(uri, "train"), storage=storage)
    facts = {"train": {"uri": join(uri, "train")}, "format": format_of(parts).to_json()}
    storage.write_json(join(uri, "done.json"), {"fingerprint": "x", "facts": facts})

    workload = recipe_train_workload(loaded, "guidance", storage)
    assert workload.data == f"shards in {uri}/train"
    assert str(tmp_path) in workload.network
    assert torch.equal(workload.build(CPU).network.conv_in.weight, parts.unet.conv_in.weight)
    result = bench_workload(workload, settings(rounds=1), device=CPU)
    assert result.images_per_second > 0
    assert result.data_wait_share > 0

"""Trainings on latents in aspect-ratio buckets: they run, and resume bit for bit."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fewstep.data.latents import decode_latents
from fewstep.data.shards import read_index, write_shards
from fewstep.data.source import iterate_samples
from fewstep.errors import RecipeError
from fewstep.recipe import Recipe, parse_recipe
from fewstep.stages import fingerprints
from fewstep.stages.fingerprints import fingerprint
from fewstep.storage import join
from fewstep.train import run
from fewstep.train.in_process import train_in_process
from fewstep.train.job import TrainJob
from fewstep.workflow import run_stage
from fewstep.workplace import Workplace
from in_process import trainings_in_process
from tiny import tiny_recipe, tiny_sdxl, tiny_teacher_folder

TRAIN = {"global_batch_size": 8, "learning_rate": 1e-3, "updates": 4, "checkpoint_every": 1, "log_every": 1}
SIZES = ((16, 16), (40, 10), (8, 32), (16, 16), (20, 18))
BUCKETS = {"max_aspect_ratio": 4.0, "multiple_of": 8}


@pytest.fixture(scope="module")
def pictures(workplace: Workplace) -> str:
    """Shards of pictures of unlike aspects."""

    def samples() -> Iterator[dict[str, Any]]:
        for number in range(60):
            file = io.BytesIO()
            Image.new("RGB", SIZES[number % len(SIZES)], (4 * number, 90, 30)).save(file, format="PNG")
            yield {"__key__": f"{number:04d}", "png": file.getvalue(), "txt": f"picture {number}".encode()}

    uri = join(workplace.storage.root, "mixed-aspects")
    write_shards(samples(), uri, samples_per_shard=15, storage=workplace.storage)
    return uri


def recipe_of(teacher: Path | str, pictures: str, *, train: Any = None, **changes: Any) -> Recipe:
    train = {**TRAIN, **(train or {})}
    encode = {"buckets": BUCKETS, "batch_size": 4, **changes.pop("encode", {})}
    values: dict[str, Any] = {
        "stages": ["encode", "guidance", "progressive"],
        "data": {"train": pictures, "evaluate": pictures},
        "prepare": None,
        "stream": {"num_streams": 2, "piece_bytes": 4096, "shuffle_bytes": 16384},
        "encode": encode,
        "guidance": {"embedding_dim": 16, "num_validation": 8, "train": train},
        "progressive": {"ladder": [2], "train": train},
        "evaluate": {"guidance_scale": 3.0},
    }
    return parse_recipe(tiny_recipe(Path(teacher), name="buckets", **(values | changes)))


class _StoppedError(Exception):
    pass


@pytest.mark.parametrize("micro", [None, 2])
def test_stage_one_interrupted_is_stage_one(
    micro: int | None, workplace: Workplace, pictures: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tiny_teacher_folder(tmp_path / "teacher"), pictures, train={"micro_batch_size": micro})
    facts = run_stage("encode", recipe, workplace, out=tmp_path).facts
    assert facts["training_format"]["group_by"] == "latent_mean"
    jobs: list[TrainJob] = []

    def take(job: TrainJob, **_: Any) -> None:
        jobs.append(job)
        raise _StoppedError

    monkeypatch.setattr(run, "_run", take)
    with pytest.raises(_StoppedError):
        run_stage("guidance", recipe, workplace, out=tmp_path)
    (job,) = jobs
    assert (job.grouped, job.rows_of_one_shape) == (True, 4)
    shapes: set[tuple[int, ...]] = set()
    (batches,) = [job.batches(rank=0, world_size=1)]
    for _, batch in zip(range(8), batches, strict=False):
        shapes |= {tuple(row.shape) for row in batch.data["latent_mean"]}
    batches.close()  # type: ignore[attr-defined]
    assert shapes == {(4, 4, 4), (4, 2, 8), (4, 8, 2)}
    whole: dict[int, dict[str, float]] = {}
    train_in_process(job, folder=str(tmp_path / "whole"), on_log=whole.__setitem__)
    parts: dict[int, dict[str, float]] = {}

    def stop(done: int, figures: dict[str, float]) -> None:
        parts[done] = figures
        if done in (1, 3) and len(parts) == done:
            raise _StoppedError

    for _ in range(2):
        with pytest.raises(_StoppedError):
            train_in_process(job, folder=str(tmp_path / "parts"), on_log=stop)
    train_in_process(job, folder=str(tmp_path / "parts"), on_log=parts.__setitem__)
    assert {done: figures["loss"] for done, figures in parts.items()} == {
        done: figures["loss"] for done, figures in whole.items()
    }
    weights = [sorted((tmp_path / name / "export").rglob("*.safetensors")) for name in ("whole", "parts")]
    assert weights[0]
    assert [path.read_bytes() for path in weights[0]] == [path.read_bytes() for path in weights[1]]


@pytest.mark.parametrize("store_text", [pytest.param(True, marks=pytest.mark.long), False])
def test_both_stages_train_an_sdxl(
    store_text: bool, workplace: Workplace, pictures: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tiny_sdxl().save(tmp_path / "teacher")
    encode = {"store_text": store_text, "picture_sizes": True}
    recipe = recipe_of(tmp_path / "teacher", pictures, encode=encode)
    with trainings_in_process(tmp_path_factory):
        artifacts = {stage: run_stage(stage, recipe, workplace, out=tmp_path) for stage in recipe.stages}
    assert artifacts["guidance"].facts["training"]["updates"] == 4
    held_out = read_index(artifacts["encode"].facts["evaluate"]["uri"], storage=workplace.storage)
    samples = iterate_samples(held_out.shards, storage=workplace.storage, decode=decode_latents)
    assert {tuple(sample["latent_mean"].shape) for sample in samples} == {(4, 4, 4)}


def test_convert_trains_on_them(
    workplace: Workplace, pictures: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    convert = {"prediction_type": "sample", "train": TRAIN}
    teacher = tiny_teacher_folder(tmp_path / "teacher")
    recipe = recipe_of(teacher, pictures, stages=["encode", "convert"], convert=convert)
    with trainings_in_process(tmp_path_factory):
        for stage in recipe.stages:
            artifact = run_stage(stage, recipe, workplace, out=tmp_path)
    assert artifact.facts["converted"]["updates"] == 4


def test_buckets_name_the_training_latents_and_nothing_where_there_are_none() -> None:
    plain, with_buckets, wider = (
        recipe_of("asset:emoji-teacher", "s3://b/pictures", encode={"buckets": buckets})
        for buckets in (None, BUCKETS, {**BUCKETS, "max_aspect_ratio": 5})
    )
    assert "buckets" not in fingerprints._of_encode(plain)
    assert len({fingerprint(each, "encode") for each in (plain, with_buckets, wider)}) == 3
    names: dict[str, Any] = {"shards_digest": "a", "encoders_digest": "b"}
    of_latents = [fingerprints.latents_fingerprint(each, **names) for each in (plain, with_buckets, wider)]
    assert len(set(of_latents)) == 3
    held_out = [fingerprints.latents_fingerprint(each, **names, held_out=True) for each in (plain, with_buckets, wider)]
    assert set(held_out) == {of_latents[0]}
    digests = {
        fingerprints.data_digest(each, shards_digests=["a"], resolution=16) for each in (plain, with_buckets, wider)
    }
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train": {"micro_batch_size": 8}},
            r"guidance\.train\.micro_batch_size=8 does not divide the 4 rows of one shape that each of the 2 streams "
            r"gives to global_batch_size=8 .*: take 1, 2, 4 or null",
        ),
        ({"encode": {"buckets": {"sides": 3}}}, r"encode\.buckets\.sides: unknown key"),
        ({"encode": {"buckets": {"max_aspect_ratio": 0.5}}}, r"encode\.buckets\.max_aspect_ratio=0\.5"),
        (
            {"prepare_classes": {"source": "digits"}, "prepare": None},
            r"told a caption, and this recipe has",
        ),
    ],
)
def test_what_cannot_be_grouped_is_said_when_the_recipe_is_read(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_of("asset:emoji-teacher", "s3://b/pictures", **changes)

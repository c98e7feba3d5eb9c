"""A stage that is done is not skipped in silence when the data that it has read are others now."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fewstep.data.metadata.scan import ParquetSource
from fewstep.data.shards import write_shards
from fewstep.errors import DataError
from fewstep.recipe import Recipe, digest, parse_recipe
from fewstep.stages.fingerprints import fingerprint
from fewstep.stages.same_data import check_same_data
from fewstep.storage import Storage, join
from fewstep.workflow import run_stage
from fewstep.workplace import Workplace
from tiny import tiny_recipe, tiny_teacher_folder


def samples(count: int) -> Iterator[dict[str, Any]]:
    for number in range(count):
        file = io.BytesIO()
        Image.new("RGB", (16, 16), (4 * number, 90, 30)).save(file, format="PNG")
        yield {"__key__": f"{number:04d}", "png": file.getvalue(), "txt": b"a picture"}


@pytest.mark.parametrize("mixed", [False, True])
def test_shards_that_were_added_are_told_and_another_version_takes_them(
    mixed: bool, workplace: Workplace, tmp_path: Path
) -> None:
    storage = workplace.storage
    uri, other = (join(storage.root, f"growing-{mixed}-{number}") for number in range(2))
    write_shards(samples(20), uri, samples_per_shard=10, storage=storage)
    write_shards(samples(10), other, samples_per_shard=10, storage=storage)
    teacher = tiny_teacher_folder(tmp_path / "teacher")

    def recipe(**data: str) -> Recipe:
        train = [{"uri": uri, "name": "a"}, {"uri": other, "name": "b"}] if mixed else uri
        return parse_recipe(
            tiny_recipe(
                teacher, name=f"growing-{mixed}".lower(), stages=["encode"], prepare=None, stream={"num_streams": 1},
                data={"train": train, "evaluate": other, **data},
            )
        )  # fmt: skip

    before = run_stage("encode", recipe(), workplace, out=tmp_path)
    assert run_stage("encode", recipe(), workplace, out=tmp_path) == before
    write_shards(samples(30), uri, samples_per_shard=10, storage=storage)
    with pytest.raises(DataError, match=rf"^{uri} is not what it was when encode ran .* data\.version another word"):
        run_stage("encode", recipe(), workplace, out=tmp_path)
    after = run_stage("encode", recipe(version="2"), workplace, out=tmp_path)
    assert after.facts["train"]["num_samples"] == before.facts["train"]["num_samples"] + 10
    storage.delete(uri, recursive=True)
    assert run_stage("encode", recipe(version="2"), workplace, out=tmp_path) == after


def test_other_pictures_are_told_where_trainings_read_them(workplace: Workplace, tmp_path: Path) -> None:
    storage = workplace.storage
    uri, other = (join(storage.root, f"trained-on-{number}") for number in range(2))
    for each in (uri, other):
        write_shards(samples(20), each, samples_per_shard=10, storage=storage)
    train = {"updates": 1, "global_batch_size": 2, "learning_rate": 1e-3}
    recipe = parse_recipe(
        tiny_recipe(
            tiny_teacher_folder(tmp_path / "teacher"), name="trained-on", stages=["encode", "guidance"], prepare=None,
            stream={"num_streams": 1}, data={"train": uri, "evaluate": other}, encode={"store_latents": False},
            guidance={"embedding_dim": 16, "train": train},
        )
    )  # fmt: skip
    run_stage("encode", recipe, workplace, out=tmp_path)
    write_shards(samples(30), uri, samples_per_shard=10, storage=storage)
    # The stage alone, as a job of its own runs it.
    with pytest.raises(DataError, match=rf"^{uri} is not what it was when encode ran"):
        run_stage("guidance", recipe, workplace, out=tmp_path)


def test_pictures_that_a_teacher_was_trained_on_are_told(storage: Storage, tmp_path: Path) -> None:
    uri = str(tmp_path / "pictures")
    index = write_shards(samples(4), uri, samples_per_shard=2, storage=storage)
    train = {"updates": 1, "global_batch_size": 2, "learning_rate": 1e-3}
    recipe = parse_recipe(
        {
            "name": "a-teacher",
            "stages": ["teacher"],
            "data": {"train": uri},
            "stream": {"num_streams": 1},
            "train_teacher": {"vae": "asset:emoji-teacher", "train": train},
        }
    )
    facts = {"source_digests": {uri: index.digest}}
    check_same_data("teacher", recipe, facts, storage=storage)
    write_shards(samples(6), uri, samples_per_shard=2, storage=storage)
    with pytest.raises(DataError, match="is not what it was when teacher ran"):
        check_same_data("teacher", recipe, facts, storage=storage)


def test_metadata_that_were_written_again_are_told(storage: Storage, tmp_path: Path) -> None:
    def write(text: str) -> None:
        pq.write_table(pa.table({"URL": ["https://a.com/1"], "TEXT": [text]}), tmp_path / "a.parquet")

    recipe = parse_recipe(
        {
            "name": "metadata",
            "stages": ["prepare"],
            "teacher": "asset:emoji-teacher",
            "prepare_metadata": {"source": str(tmp_path)},
        }
    )
    settings = recipe.prepare_metadata
    assert settings is not None
    write("one")
    facts = {"source_digest": digest(ParquetSource(settings, storage).paths())}
    check_same_data("prepare", recipe, facts, storage=storage)
    write("two")
    with pytest.raises(DataError, match="is not what it was when prepare ran"):
        check_same_data("prepare", recipe, facts, storage=storage)
    (tmp_path / "a.parquet").unlink()
    check_same_data("prepare", recipe, facts, storage=storage)
    newer = recipe.model_copy(update={"data": recipe.data.model_copy(update={"version": "2"})})
    assert fingerprint(newer, "prepare") != fingerprint(recipe, "prepare")

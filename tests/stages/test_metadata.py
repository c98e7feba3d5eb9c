"""What MLflow says of prepare when all is downloaded. Ray and the web are the business of tests/integration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fewstep.data.metadata.scan import Counts
from fewstep.data.metadata.selection import Part
from fewstep.recipe import parse_recipe
from fewstep.stages import metadata
from fewstep.stages.context import StageContext
from fewstep.stages.metadata import Selection, prepare_metadata
from fewstep.stages.metadata_tasks import DownloadedPart
from fewstep.workplace import Workplace

ROWS, BYTES = 10, 1000


def run_tasks(_: Any, tasks: Sequence[tuple[Any, ...]], **options: Any) -> Iterator[tuple[int, DownloadedPart]]:
    """Downloads as Ray tasks, the last first; of each part two pictures are gone."""
    for number in reversed(range(len(tasks))):
        part, _, record_uri, _, storage = tasks[number]
        shard = {"name": f"{part.name}.tar", "num_samples": ROWS - 2, "size_bytes": BYTES, "sha256": "0" * 64}
        result = DownloadedPart(part.digest, shard, ROWS, {"HTTP 404": 2}, 1.0)
        storage.write_json(record_uri, asdict(result))
        yield number, result


@pytest.fixture
def prepared(
    workplace: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int, str], tuple[str, dict[str, float]]]:
    """Return a function that prepares so many parts, in the MLflow run of a key: its id, and what MLflow says last."""

    def prepare(num_parts: int, key: str) -> tuple[str, dict[str, float]]:
        storage, client = workplace.storage, workplace.tracker.client
        recipe = parse_recipe(
            {
                "name": "figures",
                "stages": ["prepare"],
                "teacher": "asset:emoji-teacher",
                "storage": storage.settings.model_dump(mode="json"),
                "prepare_metadata": {"source": f"s3://rows/{num_parts}"},
            }
        )
        parts = tuple(Part("train", f"00000-{n:04d}", f"s3://rows/{n}", ROWS, f"{n}") for n in range(num_parts))
        counts = Counts(rows=ROWS * num_parts + 7, removed={"no url": 7})
        monkeypatch.setattr(metadata, "find_command", lambda command: Path("/img2dataset"))
        monkeypatch.setattr(metadata, "drawn_splits", lambda recipe: ("train",))
        monkeypatch.setattr(metadata, "select_rows", lambda *_, **options: Selection(counts, parts, "digest"))
        monkeypatch.setattr(metadata, "run_tasks", run_tasks)
        assert recipe.prepare_metadata is not None
        with workplace.tracker.run("prepare", key=key) as run:
            context = StageContext(recipe, storage, workplace.tracker, run, run.id, tmp_path)
            prepare_metadata(context, recipe.prepare_metadata)
        return run.id, client.get_run(run.id).data.metrics

    return prepare


@pytest.mark.parametrize("num_parts", [3, 251])
def test_the_last_that_mlflow_says_is_the_final_figure(
    num_parts: int, workplace: Workplace, prepared: Callable[[int, str], tuple[str, dict[str, float]]]
) -> None:
    run_id, said = prepared(num_parts, f"{num_parts} parts")
    expected = {
        "train_attempted": ROWS * num_parts, "train_samples": (ROWS - 2) * num_parts, "train_bytes": BYTES * num_parts,
        "train_task_seconds": num_parts, "train_failed/HTTP 404": 2 * num_parts, "rows": ROWS * num_parts + 7,
        "rows_left": ROWS * num_parts, "removed/no url": 7,
    }  # fmt: skip
    assert {name: said[name] for name in expected} == expected
    steps = {each.step for each in workplace.tracker.client.get_metric_history(run_id, "train_samples")}
    assert max(steps) == num_parts
    assert len(steps) == (3 if num_parts == 3 else 199 + 26 + 1)  # every one, every second, and the last


def test_figures_are_whole_when_all_was_downloaded_before(
    prepared: Callable[[int, str], tuple[str, dict[str, float]]],
) -> None:
    """As when prepare was stopped between the record of the last part and its figures."""
    prepared(5, "first")
    _, said = prepared(5, "again")
    assert (said["train_samples"], said["train_bytes"]) == ((ROWS - 2) * 5, BYTES * 5)

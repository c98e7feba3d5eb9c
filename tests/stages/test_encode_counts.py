"""What encode leaves out can be seen in MLflow: by reason, and by shard."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from fewstep.data.shards import write_shards
from fewstep.recipe import parse_recipe
from fewstep.storage import join
from fewstep.tracking.names import figure_name
from fewstep.workflow import run_stage
from fewstep.workplace import Workplace
from tiny import tiny_recipe, tiny_teacher_folder


def samples() -> Iterator[dict[str, Any]]:
    for number in range(40):
        file = io.BytesIO()
        Image.new("RGB", (16, 16), (4 * number, 90, 30)).save(file, format="PNG")
        picture = b"broken" if number in (3, 4, 25) else file.getvalue()
        record = {"score": number % 4}
        yield {"__key__": f"{number:04d}", "png": picture, "txt": b"a picture", "json": json.dumps(record).encode()}


def test_reasons_and_shards_are_in_mlflow(workplace: Workplace, tmp_path: Path) -> None:
    uri = join(workplace.storage.root, "partly-broken")
    write_shards(samples(), uri, samples_per_shard=10, storage=workplace.storage)
    content = tiny_recipe(
        tiny_teacher_folder(tmp_path / "teacher"), name="counts", stages=["encode"], prepare=None,
        data={"train": uri, "evaluate": uri, "filters": [{"field": "score", "min": 1}]},
        stream={"num_streams": 2, "max_bad_share": 0.2},
    )  # fmt: skip
    facts = run_stage("encode", parse_recipe(content), workplace, out=tmp_path).facts
    assert "bad_shards" not in facts["train"]
    client = workplace.tracker.client
    ours = "tags.mlflow.runName = 'encode' and tags.`fewstep.recipe` = 'counts'"
    (run,) = client.search_runs([client.get_experiment_by_name("t").experiment_id], ours)
    figures = run.data.metrics
    assert (figures["train_skipped"], figures["train_skipped/broken picture"]) == (2, 2)  # the third was filtered
    assert (figures["train_filtered"], figures["train_filtered/score below 1"]) == (10, 10)
    listed = workplace.storage.read_json(join(run.info.artifact_uri, "train_bad_shards.json"))
    assert listed == [
        {"shard": join(uri, "00000.tar"), "samples": 1}, {"shard": join(uri, "00002.tar"), "samples": 1}
    ]  # fmt: skip


def test_names_that_mlflow_takes() -> None:
    assert figure_name("skipped", "broken a/b (c) ×2.") == "skipped/broken a_b _c_ _2"
    assert figure_name("skipped", "...") == "skipped/_"
    assert len(figure_name("skipped", "x" * 300)) == 200

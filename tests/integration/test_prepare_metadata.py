"""prepare from metadata: a real S3, a real Ray, the real img2dataset, and a web server on this machine."""

from __future__ import annotations

import io
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from fewstep.cli import main
from fewstep.data.counts import SampleCounts
from fewstep.data.metadata.selection import Part
from fewstep.data.samples import FieldFilter
from fewstep.data.shards import read_index
from fewstep.data.source import iterate_samples
from fewstep.errors import DataError, FewstepError
from fewstep.recipe import Recipe, parse_recipe
from fewstep.stages.fingerprints import split_fingerprint
from fewstep.stages.metadata import download_split, select_rows
from fewstep.storage import Storage, join
from fewstep.tracking.settings import TrackingSettings
from fewstep.tracking.tracker import Tracker
from fewstep.workflow import run_stage
from fewstep.workplace import Workplace

pytestmark = [pytest.mark.img2dataset, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

COMMAND = Path(__file__).parents[2] / ".venv-img2dataset/bin/img2dataset"
ROWS = 240


class Web(BaseHTTPRequestHandler):
    """Every fifth picture is gone; the others are of one colour each."""

    asked: list[str]

    def do_GET(self) -> None:
        number = int(re.findall(r"\d+", self.path)[0])
        type(self).asked.append(self.path)
        if number % 5 == 0:
            self.send_error(404)
            return
        buffer = io.BytesIO()
        Image.new("RGB", (80, 60), (number % 256, 100, 50)).save(buffer, "JPEG")
        self.send_response(200)
        self.send_header("Content-Length", str(buffer.tell()))
        self.end_headers()
        self.wfile.write(buffer.getvalue())

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def web() -> Iterator[type[Web]]:
    Web.asked = []
    ThreadingHTTPServer.request_queue_size = 128  # all connections of img2dataset at once
    with ThreadingHTTPServer(("127.0.0.1", 0), Web) as server:
        Web.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Web
        server.shutdown()


@pytest.fixture(scope="module")
def metadata(web: Any, storage: Storage) -> str:
    """A folder of parquet files: 240 rows, of which the last 40 name pictures again, and 20 are unsafe."""
    folder = join(storage.root, "prepare-test", "metadata")
    numbers = [*range(200), *range(40)]
    for part in range(2):
        own = numbers[part::2]
        table = pa.table(
            {
                "URL": [f"{web.url}/{number}.jpg?w={position}" for position, number in enumerate(own)],
                "TEXT": [f"picture number {number}" for number in own],
                "punsafe": pa.array([0.9 if number in range(100, 120) else 0.01 for number in own], pa.float32()),
                "AESTHETIC_SCORE": pa.array([5.5] * len(own), pa.float32()),
            }
        )
        buffer = io.BytesIO()
        pq.write_table(table, buffer, row_group_size=30)
        storage.write_bytes(join(folder, f"part-{part}.parquet"), buffer.getvalue())
    return folder


def recipe_of(metadata: str, storage: Storage, tmp: Path, **changes: Any) -> Recipe:
    settings = {
        "source": metadata,
        "columns": {"url": "URL", "caption": "TEXT", "score": "AESTHETIC_SCORE"},
        "filters": [{"field": "punsafe", "max": 0.1}],
        "num_evaluate": 24,
        "num_alignment": 16,
        "rows_per_shard": 100,
        "rows_per_task": 120,
        "download": {
            "command": str(COMMAND), "image_size": 32, "threads": 32, "timeout_s": 2.0, "answer_timeout_s": 5.0,
            "retries": 0, "stall_timeout_s": 60.0, "private_addresses": True,
        },
        **changes,
    }  # fmt: skip
    return parse_recipe(
        {
            "name": "from-metadata",
            "stages": ["prepare"],
            "teacher": "asset:emoji-teacher",
            "storage": storage.settings.model_dump(mode="json"),
            "tracking": {"uri": f"sqlite:///{tmp}/mlflow.db"},
            "prepare_metadata": settings,
        }
    )


@pytest.fixture(scope="module")
def workplace(storage: Storage, new_database: Callable[[], str]) -> Workplace:
    return Workplace(storage, Tracker.open(TrackingSettings(uri=new_database()), storage))


@pytest.fixture(scope="module")
def recipe(metadata: str, storage: Storage, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return recipe_of(metadata, storage, tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def facts(recipe: Recipe, workplace: Workplace, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Any:
    return run_stage("prepare", recipe, workplace, out=tmp_path_factory.mktemp("out")).facts


def samples(uri: str, storage: Storage) -> list[dict[str, Any]]:
    def decode(sample: dict[str, Any]) -> dict[str, Any]:
        record = json.loads(sample["json"])
        picture = Image.open(io.BytesIO(sample["jpg"]))
        return {"key": sample["__key__"], "caption": sample["txt"].decode(), "size": picture.size, **record}

    return list(iterate_samples(read_index(uri, storage=storage).shards, storage=storage, decode=decode,
                                counts=SampleCounts(0.0)))  # fmt: skip


def test_every_row_is_accounted_for(facts: dict[str, Any], storage: Storage) -> None:
    report = facts["report"]
    assert report["rows"] == ROWS
    assert report["removed"] == [
        ["no punsafe", 0], ["punsafe above 0.1", 20], ["no url", 0], ["no caption", 0], ["duplicate url", 40],
        ["duplicate caption", 0],
    ]  # fmt: skip
    assert report["left"] == 180
    assert {split: each["attempted"] for split, each in report["splits"].items()} == {
        "train": 140, "evaluate": 24, "alignment": 16
    }  # fmt: skip
    numbers: list[int] = []
    gone = 0
    for split in ("train", "evaluate", "alignment"):
        each = report["splits"][split]
        found = samples(facts[split]["uri"], storage)
        assert len(found) == facts[split]["num_samples"] == each["attempted"] - sum(each["failures"].values())
        assert len({sample["key"] for sample in found}) == len(found)
        for sample in found:
            assert (sample["caption"], sample["score"]) == (sample["caption"], 5.5)
            assert sample["size"] == (43, 32)
            numbers.append(int(sample["caption"].split()[-1]))
        gone += sum(each["failures"].values())
    # All that the web has of the 180, each once, whatever the split.
    assert sorted(numbers) == [number for number in range(200) if number % 5 and number not in range(100, 120)]
    assert gone == 36


def test_mlflow_has_the_counts(facts: dict[str, Any], recipe: Recipe, workplace: Workplace) -> None:
    (run,) = [
        run
        for run in workplace.tracker.client.search_runs(["1"])
        if run.info.run_name == "prepare"
    ]  # fmt: skip
    assert run.data.metrics["rows"] == ROWS
    assert run.data.metrics["removed/duplicate url"] == 40
    assert run.data.metrics["train_samples"] == facts["train"]["num_samples"]
    assert run.data.tags["fewstep.train_digest"] == facts["train"]["digest"]


def test_a_run_that_was_stopped_does_the_rest(
    facts: dict[str, Any], recipe: Recipe, storage: Storage, web: Any
) -> None:
    assert recipe.prepare_metadata is not None
    settings, cluster = recipe.prepare_metadata, recipe.cluster
    selection = select_rows(settings, splits=("train", "evaluate", "alignment"), storage=storage, cluster=cluster)
    parts = [part for part in selection.parts if part.split == "train"]
    uri = facts["train"]["uri"]
    before = read_index(uri, storage=storage)
    records = [info.uri for info in storage.list(join(uri, "records"))]
    # How many there are hangs on the digests of the addresses, and so on the port of the server.
    assert len(records) == len(parts) == len(before.shards) >= 2
    storage.delete(join(uri, "records", f"{parts[1].name}.json"))
    storage.delete(join(uri, "index.json"))
    web.asked.clear()
    done = download_split(parts, uri, settings=settings, storage=storage, cluster=cluster, label="again")
    assert done.attempted == 140
    assert len(web.asked) == parts[1].num_rows
    # The pictures are the same, so their shards are.
    assert read_index(uri, storage=storage).digest == before.digest == done.facts["digest"]


def test_only_choosing_needs_no_web(
    metadata: str, storage: Storage, tmp_path: Path, web: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewstep.preparing.open_workplace", lambda recipe: _Open(storage))
    recipe = recipe_of(metadata, storage, tmp_path, num_train=100, download={"command": "/nowhere"})
    file = tmp_path / "recipe.json"
    file.write_text(recipe.model_dump_json(by_alias=True, exclude_none=True))
    web.asked.clear()
    said = CliRunner().invoke(main, ["prepare", str(file), "--select-only"])
    assert said.exit_code == 0, said.output
    assert "            240  rows, 0 of them excluded by the statistics" in said.output
    assert "            -40  duplicate url" in said.output
    assert re.search(r"train .*/metadata/.*\.parquet \(100 rows\)", said.output)
    assert not web.asked


class _Open:
    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def __enter__(self) -> _Open:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def test_filters_that_leave_nothing_are_told_with_the_values_that_were_seen(recipe: Recipe, storage: Storage) -> None:
    assert recipe.prepare_metadata is not None
    rules = (FieldFilter(field="punsafe", max=0.1), FieldFilter(field="score", min=65))
    settings = recipe.prepare_metadata.model_copy(update={"filters": rules})
    # The statistics of every row group exclude it for its scores, so nothing is read.
    words = r"nothing is left of the 240 rows .*: 240 × score below 65.*score from 5.5 to 5.5"
    with pytest.raises(DataError, match=words):
        select_rows(settings, splits=("train",), storage=storage, cluster=recipe.cluster)


def test_filters_that_leave_too_little_are_told_like_those_that_leave_nothing(recipe: Recipe, storage: Storage) -> None:
    assert recipe.prepare_metadata is not None
    settings = recipe.prepare_metadata.model_copy(
        update={"filters": (FieldFilter(field="score", min=5.0),), "num_train": 10_000}
    )
    words = r"rows are left, fewer than num_train=10000.* Of 240 rows in .*: \d+ × .*score from 5.5 to 5.5"
    with pytest.raises(DataError, match=words):
        select_rows(settings, splits=("train",), storage=storage, cluster=recipe.cluster)


def test_a_web_that_cannot_be_reached_is_told_and_leaves_no_record(
    recipe: Recipe, storage: Storage, bucket_uri: str, tmp_path: Path
) -> None:
    assert recipe.prepare_metadata is not None
    table = pa.table(
        {
            "URL": [f"http://127.0.0.1:9/{number}.jpg" for number in range(150)],
            "TEXT": [f"number {number}" for number in range(150)],
        }
    )
    pq.write_table(table, tmp_path / "dead.parquet")
    settings = recipe.prepare_metadata.model_copy(
        update={"source": str(tmp_path / "dead.parquet"), "columns": {"url": "URL", "caption": "TEXT"}, "filters": (),
                "num_evaluate": 0, "num_alignment": 0, "rows_per_shard": 150, "rows_per_task": 1000}
    )  # fmt: skip
    selection = select_rows(settings, splits=("train",), storage=storage, cluster=recipe.cluster)
    assert len(selection.parts) == 1
    with pytest.raises(DataError, match=r"of 150 pictures not one could be had: 150 × .*refused.*HTTPS_PROXY"):
        download_split(
            selection.parts, bucket_uri, settings=settings, storage=storage, cluster=recipe.cluster, label="x"
        )
    assert not list(storage.list(bucket_uri))


def test_without_img2dataset_it_is_told_how_to_get_it(
    recipe: Recipe, storage: Storage, bucket_uri: str, tmp_path: Path
) -> None:
    assert recipe.prepare_metadata is not None
    missing = recipe.prepare_metadata.download.model_copy(update={"command": str(tmp_path / "img2dataset")})
    settings = recipe.prepare_metadata.model_copy(update={"download": missing})
    selection = select_rows(settings, splits=("train",), storage=storage, cluster=recipe.cluster)
    with pytest.raises(DataError, match="make img2dataset"):
        download_split(
            selection.parts, bucket_uri, settings=settings, storage=storage, cluster=recipe.cluster, label="x"
        )
    shutil.rmtree(tmp_path)


def test_more_cpus_than_there_are_are_refused(recipe: Recipe, storage: Storage, bucket_uri: str) -> None:
    assert recipe.prepare_metadata is not None
    many = recipe.prepare_metadata.download.model_copy(update={"processes": 64})
    settings = recipe.prepare_metadata.model_copy(update={"download": many})
    selection = select_rows(settings, splits=("evaluate",), storage=storage, cluster=recipe.cluster)
    with pytest.raises(
        FewstepError, match=r"takes 64 CPUs \(prepare_metadata.download.processes\), and this Ray has 2"
    ):
        download_split(
            selection.parts, bucket_uri, settings=settings, storage=storage, cluster=recipe.cluster, label="x"
        )


def test_records_of_other_rows_do_not_count(facts: dict[str, Any], recipe: Recipe, storage: Storage, web: Any) -> None:
    """As when the source changes between a run that was stopped and the next: parts keep their names."""
    assert recipe.prepare_metadata is not None
    settings, cluster = recipe.prepare_metadata, recipe.cluster
    parts = select_rows(settings, splits=("train", "evaluate", "alignment"), storage=storage, cluster=cluster).parts
    uri = facts["alignment"]["uri"]
    own = [part for part in parts if part.split == "alignment"]
    record = join(uri, "records", f"{own[0].name}.json")
    storage.write_json(record, {**storage.read_json(record), "part": "of other rows"})
    web.asked.clear()
    done = download_split(own, uri, settings=settings, storage=storage, cluster=cluster, label="again")
    assert len(web.asked) == own[0].num_rows
    assert done.facts == facts["alignment"]
    assert storage.read_json(record)["part"] == own[0].digest


def test_a_run_that_goes_on_with_other_captions_keeps_no_picture_with_an_old_one(
    recipe: Recipe, storage: Storage, bucket_uri: str, web: Any, tmp_path: Path
) -> None:
    assert recipe.prepare_metadata is not None
    settings = recipe.prepare_metadata.model_copy(
        update={"source": str(tmp_path), "columns": {"url": "URL", "caption": "TEXT"}, "filters": (),
                "num_evaluate": 0, "num_alignment": 0, "rows_per_shard": 10, "rows_per_task": 1000}
    )  # fmt: skip
    numbers = [number for number in range(24) if number % 5]
    parts: list[Part] = []

    def prepare(caption: str, *, num_parts: int | None = None) -> None:
        texts = [f"{caption} {number}" for number in numbers]
        pq.write_table(pa.table({"URL": [f"{web.url}/{number}.jpg" for number in numbers], "TEXT": texts}),
                       tmp_path / "rows.parquet")  # fmt: skip
        parts[:] = select_rows(settings, splits=("train",), storage=storage, cluster=recipe.cluster).parts
        download_split(
            parts[:num_parts], bucket_uri, settings=settings, storage=storage, cluster=recipe.cluster, label=caption
        )

    prepare("old", num_parts=1)
    assert len(parts) == 2
    web.asked.clear()
    prepare("new")
    assert len(web.asked) == len(numbers)
    assert {sample["caption"] for sample in samples(bucket_uri, storage)} == {f"new {number}" for number in numbers}
    web.asked.clear()
    prepare("new")
    assert not web.asked


def test_which_rows_are_held_out_is_part_of_their_address(recipe: Recipe) -> None:
    assert recipe.prepare_metadata is not None

    def addresses(**changes: Any) -> list[str]:
        settings = recipe.prepare_metadata.model_copy(update={"num_train": 50, **changes})  # type: ignore[union-attr]
        changed = recipe.model_copy(update={"prepare_metadata": settings})
        return [split_fingerprint(changed, split) for split in ("train", "alignment", "evaluate")]

    before, more = addresses(), addresses(num_evaluate=30)
    assert [first == second for first, second in zip(before, more, strict=True)] == [True, False, False]
    assert addresses(at_once=3) == before

"""The environment names the store where nothing else does, to every client alike."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from tests.test_recipe import content

from fewstep.errors import StorageError
from fewstep.recipe import parse_recipe
from fewstep.serve.app import build
from fewstep.storage import Storage, StorageSettings, join, open_storage

ENDPOINT = "http://seaweedfs.example:8333"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    values = {"BUCKET": "from-env", "PREFIX": "runs", "ADDRESSING_STYLE": "virtual"}
    for name, value in values.items():
        monkeypatch.setenv(f"FEWSTEP_S3_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", ENDPOINT)
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    return monkeypatch


def test_a_store_that_nobody_describes_is_the_environments(environment: pytest.MonkeyPatch) -> None:
    recipe = parse_recipe(content())
    assert recipe.storage == StorageSettings() == StorageSettings(endpoint_url="")  # type: ignore[arg-type]
    found = recipe.storage
    assert (found.kind, found.bucket, found.prefix) == ("s3", "from-env", "runs")
    assert (found.endpoint_url, found.region, found.addressing_style) == (ENDPOINT, "eu-west-1", "virtual")
    environment.setenv("AWS_ENDPOINT_URL_S3", "https://s3.example")
    assert StorageSettings().endpoint_url == "https://s3.example"
    environment.setenv("AWS_ENDPOINT_URL_S3", "")
    assert StorageSettings().endpoint_url == ENDPOINT


def test_what_is_said_wins_over_the_environment(environment: pytest.MonkeyPatch) -> None:
    said = {
        "bucket": "mine",
        "prefix": "",
        "endpoint_url": "https://own.example",
        "region": "us-west-2",
        "addressing_style": "path",
    }
    assert StorageSettings(**said).model_dump(include=set(said)) == said
    assert StorageSettings(bucket="mine", endpoint_url=None).endpoint_url == ENDPOINT


def test_an_embedded_store_takes_nothing_from_the_environment(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for settings in (StorageSettings(kind="embedded"), StorageSettings(home=tmp_path)):
        assert (settings.kind, settings.bucket, settings.prefix) == ("embedded", "fewstep", "")
        assert (settings.endpoint_url, settings.region, settings.addressing_style) == (None, "us-east-1", "path")
    environment.delenv("FEWSTEP_S3_BUCKET")
    assert StorageSettings().kind == "embedded"
    assert StorageSettings(kind="s3", bucket="mine").endpoint_url == ENDPOINT


def test_neither_names_nor_digests_change_with_the_environment(environment: pytest.MonkeyPatch) -> None:
    here = parse_recipe(content())
    travelled = pickle.dumps(here.storage)
    for name in ("FEWSTEP_S3_BUCKET", "AWS_ENDPOINT_URL"):
        environment.delenv(name)
    assert pickle.loads(travelled) == here.storage, "settings go to workers as they are"
    assert here.digest() == parse_recipe(content()).digest()


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("FEWSTEP_S3_BUCKET", "ab", "FEWSTEP_S3_BUCKET is 'ab': the name of a bucket has at least 3"),
        ("AWS_ENDPOINT_URL", "seaweedfs:8333", "AWS_ENDPOINT_URL is 'seaweedfs:8333': it must begin with http"),
        ("FEWSTEP_S3_ADDRESSING_STYLE", "dns", "FEWSTEP_S3_ADDRESSING_STYLE is 'dns': it must be path or virtual"),
    ],
)
def test_a_variable_that_cannot_work_is_named(
    environment: pytest.MonkeyPatch, variable: str, value: str, words: str
) -> None:
    environment.setenv(variable, value)
    for made in (StorageSettings, lambda: parse_recipe(content(storage={"prefix": "x"}))):
        with pytest.raises(StorageError, match=words):
            made()


def test_the_served_models_come_from_the_environments_store(environment: pytest.MonkeyPatch) -> None:
    def store(**arguments: object) -> Storage | None:
        application = build({"serve": {"models": ["models:/x@champion"]}, **arguments})
        engine = application._bound_deployment.init_args[0]
        found = next((each for each in engine._bound_deployment.init_args if isinstance(each, Storage)), None)
        assert found is None or isinstance(found, Storage)
        return found

    found = store()
    assert found is not None
    assert (found.root, found.endpoint_url) == ("s3://from-env/runs", ENDPOINT)
    other = store(storage={"bucket": "mine", "prefix": ""})
    assert other is not None
    assert other.root == "s3://mine"
    environment.delenv("FEWSTEP_S3_BUCKET")
    assert store() is None


def test_boto3_and_arrow_reach_the_store_that_the_environment_names(
    storage: Storage, bucket_uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert storage.endpoint_url is not None
    for name, value in storage.environment().items():
        if name.startswith(("AWS_ACCESS", "AWS_SECRET")):
            monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", storage.endpoint_url)
    monkeypatch.setenv("FEWSTEP_S3_BUCKET", storage.settings.bucket)
    monkeypatch.setenv("FEWSTEP_S3_PREFIX", bucket_uri.rpartition("/")[2])
    with open_storage(StorageSettings(retry_total_s=20)) as opened:
        assert opened.root == bucket_uri
        opened.write_bytes(join(opened.root, "a"), b"here")
        assert opened.environment()["AWS_ENDPOINT_URL_S3"] == storage.endpoint_url
        # As a worker would find it whose environment names another.
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        moved: Storage = pickle.loads(pickle.dumps(opened))
        assert moved.read_bytes(join(moved.root, "a")) == b"here"
        filesystem, root = moved.arrow_filesystem()
        assert filesystem.open_input_stream(f"{root}/a").read() == b"here"
    # What was started for itself is not led astray either.
    assert pickle.loads(pickle.dumps(storage)).read_bytes(join(bucket_uri, "a")) == b"here"

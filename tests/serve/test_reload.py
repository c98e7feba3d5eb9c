"""Following the registry's aliases: real tiny students in a real MLflow and a real store, without Ray."""

from __future__ import annotations

import gc
import itertools
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from fewstep.errors import TrackingError
from fewstep.models import copy_student, read_student_info
from fewstep.serve.catalog import ImageRequest, NotLoadedError
from fewstep.serve.engine import Engine
from fewstep.serve.errors import InvalidRequestError
from fewstep.serve.reload import Follower, open_engine
from fewstep.serve.settings import ServeSettings
from fewstep.serve.watch import EngineWatch
from fewstep.storage import Storage
from fewstep.tracking.registry import Registry
from fewstep.tracking.settings import TrackingSettings
from fewstep.tracking.tracker import Tracker
from tiny import tiny_student_folder

NOWHERE = TrackingSettings(uri="http://127.0.0.1:9", retries=0, timeout_s=1)
WEIGHTS = "diffusion_pytorch_model.safetensors"
REQUEST = ImageRequest(prompt="a red apple", seed=7)
_numbers = itertools.count()


class Notes(EngineWatch):
    """What the watch was told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def serves(self, uri: str, *, model: str, version: int) -> None:
        self.told.append(("serves", uri, version))

    def reloaded(self, model: str) -> None:
        self.told.append(("reloaded", model))

    def refused(self, model: str) -> None:
        self.told.append(("refused", model))


#: Versions of the registered model "emoji". All but 5 have one VAE and one text encoder.
FOUR, OTHER_FOUR, NOT_FINITE, UNREADABLE, BLACK, ONE, OTHER_ONE, TWO = range(1, 9)


@dataclass(frozen=True)
class Alias:
    """An alias of its own for each test, in a registry that all share."""

    name: str
    registry: Registry
    tracking: TrackingSettings
    storage: Storage

    @property
    def uri(self) -> str:
        return f"models:/emoji@{self.name}"

    def point(self, version: int) -> None:
        self.registry.set_alias("emoji", self.name, version)

    def open(self, *more: str, watch: EngineWatch | None = None, **settings: Any) -> tuple[Engine, Follower]:
        return open_engine(
            ServeSettings(models=(self.uri, *more), dtype="float32", num_threads=1, **settings),
            storage=self.storage,
            tracking=self.tracking,
            watch=watch,
        )


@pytest.fixture(scope="module")
def registry(
    new_database: Callable[[], str], storage: Storage, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Registry]:
    """Eight versions, whose files lie in S3."""
    root = tmp_path_factory.mktemp("students")
    base = tiny_student_folder(root / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_HOME", str(root / "home"))
        tracker = Tracker.open(TrackingSettings(uri=new_database(), experiment="reload"), storage)
        with tracker.run("register", key="register") as run:
            for version in range(1, 9):
                folder = copied(base, root / str(version), version)
                tags = {"num_inference_steps": "4", "teacher": "t", "data_digest": "d", "fingerprint": str(version)}
                made = Registry(tracker).log_student(run, folder, name="emoji", params={}, tags=tags, metrics={})
                assert made == version
        yield Registry(tracker)


def copied(base: Path, folder: Path, version: int) -> Path:
    """A student like `base` with a U-Net, steps and faults of its own."""
    info = read_student_info(base)
    assert info is not None
    copy_student(base, folder, replace(info, num_inference_steps={ONE: 1, OTHER_ONE: 1, TWO: 2}.get(version, 4)))
    change(folder / "unet", "conv_out.bias", by=math.nan if version == NOT_FINITE else float(version))
    if version == BLACK:
        change(folder / "vae", "decoder.conv_out.bias", by=math.nan)
    if version == UNREADABLE:
        file = folder / "unet" / WEIGHTS
        file.write_bytes(file.read_bytes()[:1000])
    return folder


def change(network: Path, name: str, *, by: float) -> None:
    weights = load_file(network / WEIGHTS)
    weights[name] += by
    (network / WEIGHTS).unlink()  # a copy may share its files with the original
    save_file(weights, network / WEIGHTS)


@pytest.fixture
def alias(registry: Registry, storage: Storage) -> Alias:
    return Alias(f"alias-{next(_numbers)}", registry, registry._tracker.settings, storage)


def labels(engine: Engine) -> list[str]:
    return [card.label for card in engine.catalog.students]


def drawn(engine: Engine, request: ImageRequest = REQUEST) -> tuple[str, np.ndarray]:
    image = engine.generate([request])[0]
    return image.model, image.pixels


def messages(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def test_a_moved_alias_is_followed_and_back_again_and_the_old_weights_are_freed(alias: Alias) -> None:
    alias.point(FOUR)
    watch = Notes()
    engine, follower = alias.open(watch=watch)
    first, picture = drawn(engine)
    old, vae = weakref.ref(engine.students[0].parts.unet), engine.students[0].parts.vae
    gc.disable()  # the weights must go with the last reference, not at some later time
    try:
        alias.point(OTHER_FOUR)
        assert follower.poll() == 10.0
        assert old() is None
    finally:
        gc.enable()
    second, other = drawn(engine)
    assert (first, second) == ("emoji@1", "emoji@2")
    assert not np.array_equal(picture, other)
    assert engine.students[0].parts.vae is vae, "equal networks are shared with the version before"
    with pytest.raises(InvalidRequestError, match="'emoji@1' is not served here, another version is: name emoji@2"):
        engine.check(replace(REQUEST, model="emoji@1"))
    alias.point(FOUR)
    follower.poll()
    again, same = drawn(engine)
    assert again == "emoji@1"
    assert np.array_equal(same, picture)
    follower.poll()  # nothing has moved
    serves = [("serves", alias.uri, version) for version in (1, 2, 1)]
    assert watch.told == [serves[0], ("reloaded", "emoji"), serves[1], ("reloaded", "emoji"), serves[2]]


def test_a_picture_that_waits_is_drawn_by_the_version_that_took_it(alias: Alias) -> None:
    alias.point(FOUR)
    engine, follower = alias.open()
    expected = drawn(engine)[1]
    jobs = [(engine.check(REQUEST), REQUEST)]
    alias.point(OTHER_FOUR)
    follower.poll()
    jobs.append((engine.check(REQUEST), REQUEST))
    before, after = engine.draw(jobs)
    assert (before.model, after.model) == ("emoji@1", "emoji@2")
    assert np.array_equal(before.pixels, expected)


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (NOT_FINITE, "its smoke picture is not finite"),
        (BLACK, "its smoke picture is one flat colour"),
        (UNREADABLE, "cannot be read"),
    ],
)
def test_a_version_that_cannot_be_served_is_refused_once(
    alias: Alias, caplog: pytest.LogCaptureFixture, version: int, words: str
) -> None:
    alias.point(FOUR)
    watch = Notes()
    engine, follower = alias.open(watch=watch)
    alias.point(version)
    for _ in range(3):
        follower.poll()
    assert labels(engine) == ["emoji@1"]
    assert drawn(engine)[0] == "emoji@1"
    assert watch.told.count(("refused", "emoji")) == 1
    (error,) = messages(caplog, logging.ERROR)
    assert f"version {version} is refused and emoji@1 stays; it is tried again when an alias moves" in error
    assert words in error
    for moved in (FOUR, version):
        alias.point(moved)
        follower.poll()
    assert watch.told.count(("refused", "emoji")) == 2, "the alias has moved: tried again"


def test_a_version_that_clashes_with_another_waits_for_it_to_go(alias: Alias, caplog: pytest.LogCaptureFixture) -> None:
    fast = replace(alias, name=f"{alias.name}-fast")
    alias.point(FOUR)
    fast.point(ONE)
    engine, follower = alias.open(fast.uri)
    alias.point(OTHER_ONE)
    follower.poll()
    assert labels(engine) == ["emoji@1", "emoji@6"]
    assert "made for 1 steps, so that no request could tell them apart" in caplog.text
    fast.point(TWO)
    follower.poll()
    follower.poll()
    assert labels(engine) == ["emoji@7", "emoji@8"]


def test_while_the_registry_is_away_the_old_version_stays_with_one_warning(
    alias: Alias, caplog: pytest.LogCaptureFixture
) -> None:
    alias.point(FOUR)
    engine, _ = alias.open()
    settings = ServeSettings(models=(alias.uri,), dtype="float32")
    follower = Follower(engine, settings, storage=alias.storage, tracking=NOWHERE)
    assert [follower.poll() for _ in range(4)] == [20.0, 30.0, 30.0, 30.0]
    assert len(messages(caplog, logging.WARNING)) == 1
    assert "The registry cannot be asked for aliases; what is served stays" in caplog.text
    assert labels(engine) == ["emoji@1"]
    alias.point(OTHER_FOUR)
    follower._tracking = alias.tracking  # it is back
    assert follower.poll() == 10.0
    assert labels(engine) == ["emoji@2"]


def test_while_the_store_is_away_a_version_is_tried_again_after_a_pause(
    alias: Alias, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FEWSTEP_HOME", str(tmp_path))  # an empty cache
    alias.point(FOUR)
    watch = Notes()
    engine, follower = alias.open(watch=watch)
    follower._storage = alias.storage.through("http://127.0.0.1:9", retry_total_s=0.1, retry_base_s=0.01)
    alias.point(OTHER_FOUR)
    for _ in range(2):
        follower.poll()
    assert labels(engine) == ["emoji@1"]
    assert watch.told.count(("refused", "emoji")) == 1, "not before the pause is over"
    assert "it is tried again in 30 s" in caplog.text
    follower._storage = alias.storage
    now_s = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now_s + 31)
    follower.poll()
    assert labels(engine) == ["emoji@2"]


def test_a_deleted_alias_keeps_what_is_served(alias: Alias, caplog: pytest.LogCaptureFixture) -> None:
    alias.point(FOUR)
    engine, follower = alias.open()
    alias.registry._client.delete_registered_model_alias("emoji", alias.name)
    for _ in range(2):
        follower.poll()
    assert (labels(engine), engine.catalog.waiting) == (["emoji@1"], ())
    assert messages(caplog, logging.WARNING) == [f"{alias.uri} names no version any more; emoji@1 stays."]


def test_a_waiting_engine_serves_the_first_version_that_is_promoted(alias: Alias, tmp_path: Path) -> None:
    folder = tiny_student_folder(tmp_path / "beside", num_inference_steps=1)
    watch = Notes()
    engine, follower = alias.open(str(folder), wait_for_models=True, watch=watch)
    assert (labels(engine), engine.catalog.waiting) == (["beside"], (alias.uri,))
    with pytest.raises(NotLoadedError, match=f"There is no version of {alias.uri} yet"):
        engine.check(replace(REQUEST, model="emoji"))
    alias.point(FOUR)
    follower.poll()
    assert (labels(engine), engine.catalog.waiting) == (["emoji@1", "beside"], ())
    assert drawn(engine)[0] == "emoji@1", "the first of the settings is the default again"
    assert watch.told == [("serves", alias.uri, 0), ("serves", alias.uri, 1)]


def test_without_waiting_a_missing_version_is_an_error_at_once(alias: Alias) -> None:
    with pytest.raises(TrackingError, match="has no such version of 'emoji'"):
        alias.open()


def test_a_name_that_no_registry_knows_is_not_waited_for(alias: Alias) -> None:
    with pytest.raises(TrackingError, match="must begin with a letter or digit"):
        replace(alias, name="x").open("models:/a b@champion", wait_for_models=True)


def test_a_waiting_engine_does_not_start_empty_where_others_may_serve(alias: Alias) -> None:
    alias.point(NOT_FINITE)
    opened: list[Engine] = []
    settings: dict[str, Any] = {"wait_for_models": True, "reload_every_s": 0.05}
    starting = threading.Thread(target=lambda: opened.append(alias.open(**settings)[0]))
    starting.start()
    starting.join(2)
    assert not opened
    alias.point(OTHER_FOUR)
    starting.join(60)
    assert labels(opened[0]) == ["emoji@2"]


def test_the_thread_follows_by_itself_while_pictures_are_drawn(alias: Alias) -> None:
    alias.point(FOUR)
    engine, follower = alias.open(reload_every_s=0.05)
    follower.start()
    alias.point(OTHER_FOUR)
    seen = []
    deadline_s = time.monotonic() + 60
    while "emoji@2" not in seen and time.monotonic() < deadline_s:
        seen.append(drawn(engine)[0])
    follower.stop()
    assert set(seen) == {"emoji@1", "emoji@2"}
    assert seen == sorted(seen)

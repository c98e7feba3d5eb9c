"""Training on a real Ray with a real S3: any number of workers, and every way to die."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
import ray
import ray.cloudpickle
import real_training
import stored_training
import torch
import toy_training
from aiohttp import web
from real_training import real_job
from stored_training import OPTIONS, checkpoint_is_known, exported
from torch import Tensor
from toy_training import FileTracker, toy_job

from fewstep.bench.data.proxy import Proxy
from fewstep.errors import CheckpointError, DataError, FewstepError, StorageError
from fewstep.storage import Storage, join
from fewstep.storage.embedded import Credentials
from fewstep.train.in_process import train_in_process
from fewstep.train.progress import Watcher
from fewstep.train.run import run_training
from fewstep.train.settings import ClusterSettings, ElasticWorkers
from tiny import tiny_teacher_folder

ray.cloudpickle.register_pickle_by_value(toy_training)
ray.cloudpickle.register_pickle_by_value(real_training)
ray.cloudpickle.register_pickle_by_value(stored_training)

# Seconds on a free machine; a busy one takes many times as long to start processes.
pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.slow, pytest.mark.timeout(900)]

ONE = ClusterSettings(num_workers=1, cpus_per_worker=1)
TWO = ClusterSettings(num_workers=2, cpus_per_worker=1, max_failures=1)
ELASTIC = ClusterSettings(num_workers=ElasticWorkers(min=1, max=2), use_gpu=False, cpus_per_worker=1, max_failures=1)


@pytest.fixture(scope="module")
def whole(storage: Storage, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> tuple[str, FileTracker]:
    """The uninterrupted training on one worker that the others are held against."""
    tracker = FileTracker(str(tmp_path_factory.mktemp("whole") / "figures"))
    uri = join(storage.root, "whole")
    job = toy_job(num_checkpoints_to_keep=2, keep_checkpoints_when_done=True, **OPTIONS)
    result = run_training(job, cluster=ONE, storage=storage, uri=uri, tracker=tracker)
    assert result.export_uri == join(uri, "export")
    assert result.updates == 30
    assert result.resumed_from is None
    assert 0 <= result.data_wait_share <= 1
    return uri, tracker


def test_checkpoints_in_the_store_are_rotated(storage: Storage, whole: tuple[str, FileTracker]) -> None:
    names = {info.uri.split("/")[-2] for info in storage.list(join(whole[0], "checkpoints"))}
    assert names == {"checkpoints", "update-00000025", "update-00000030"}


def test_a_finished_training_is_not_run_again(storage: Storage, whole: tuple[str, FileTracker], tmp_path: Path) -> None:
    uri, tracker = whole
    before = Path(tracker.path).read_text()
    start_s = time.monotonic()
    again = run_training(toy_job(**OPTIONS), cluster=ONE, storage=storage, uri=uri, tracker=tracker)
    assert time.monotonic() - start_s < 2
    assert Path(tracker.path).read_text() == before
    assert again.figures["loss"] == tracker.by_step("loss")[30]
    with pytest.raises(CheckpointError, match=f"fingerprint {'a' * 64}.* has {'b' * 64}"):
        run_training(toy_job(fingerprint="b" * 64), cluster=ONE, storage=storage, uri=uri, tracker=None)


@pytest.mark.long
def test_a_killed_worker_goes_on_bit_for_bit(
    storage: Storage, whole: tuple[str, FileTracker], bucket_uri: str, tmp_path: Path
) -> None:
    tracker = FileTracker(str(tmp_path / "figures"))
    mischief = {
        "die_at": 13, "died_marker": str(tmp_path / "died"), "dies_after": checkpoint_is_known(storage, bucket_uri, 10)
    }  # fmt: skip
    job = toy_job(mischief=mischief, **OPTIONS)
    result = run_training(job, cluster=ONE, storage=storage, uri=bucket_uri, tracker=tracker)
    assert (tmp_path / "died").exists()
    assert result.resumed_from == 10
    assert tracker.by_step("loss") == whole[1].by_step("loss")
    ours, theirs = exported(storage, bucket_uri), exported(storage, whole[0])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert list(storage.list(join(bucket_uri, "checkpoints"))) == []  # not kept when done


def shown(name: str) -> dict[str, float]:
    """Return what Ray's endpoint for Prometheus shows of a metric, by its labels."""
    port = ray.nodes()[0]["MetricsExportPort"]
    page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    return {found[1]: float(found[2]) for found in re.finditer(rf"^{name}\{{(.*)\}} (\S+)$", page, re.MULTILINE)}


def test_elastic_workers_one_of_which_dies_give_the_same_curve_and_show_it(
    storage: Storage,
    whole: tuple[str, FileTracker],
    bucket_uri: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    switches = {"strategy": "fsdp", "ema_device": "cpu", "micro_batch_size": 4}
    caplog.set_level("INFO", logger="fewstep")
    tracker = FileTracker(str(tmp_path / "figures"))
    mischief = {
        "die_at": 8, "died_marker": str(tmp_path / "died"), "dies_after": checkpoint_is_known(storage, bucket_uri, 5),
        "pause_s": 0.1,  # so that there is something to see
    }  # fmt: skip
    labels = {"recipe": "r", "stage": "guidance", "training": bucket_uri}
    job = dataclasses.replace(toy_job(mischief=mischief, **switches, **OPTIONS), labels=labels)
    seen: dict[str, float] = {}
    with Watcher(lambda: seen.update(shown("ray_fewstep_train_update"))):
        result = run_training(job, cluster=ELASTIC, storage=storage, uri=bucket_uri, tracker=tracker)
    assert (tmp_path / "died").exists()
    fetched = [message for message in caplog.messages if "shared the checkpoint" in message]
    assert fetched == ["goes on from update 5; workers that shared the checkpoint: 2"]
    for name in ("loss", "grad_norm", "noise"):
        expected = whole[1].by_step(name)
        assert tracker.by_step(name) == pytest.approx(expected, rel=1e-4)
    ours, theirs = exported(storage, bucket_uri), exported(storage, whole[0])
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in theirs)
    assert all(type(weight) is Tensor for weight in ours.values())
    assert result.figures["skipped/broken"] >= 2  # counted over both workers
    assert result.figures["workers"] == 2
    numbers = [message for message in caplog.messages if message.endswith("of 1…2 workers")]
    assert numbers == ["toy: trains with 2 of 1…2 workers", "toy: goes on from update 5 with 2 of 1…2 workers"]
    updates = [
        update for line, update in seen.items() if all(f'{name}="{value}"' in line for name, value in labels.items())
    ]
    assert updates
    assert all(1 <= update <= 30 for update in updates)


@pytest.mark.long
def test_two_workers_give_stage_one_the_curve_of_one_process(storage: Storage, bucket_uri: str, tmp_path: Path) -> None:
    """The other stages, and other ways to share the work: `tests/train/test_workers.py`, without Ray."""
    job = real_job("guidance", tiny_teacher_folder(tmp_path / "model"), updates=10)
    alone: dict[int, dict[str, float]] = {}
    train_in_process(job, folder=str(tmp_path), on_log=lambda done, figures: alone.update({done: figures}))
    tracker = FileTracker(str(tmp_path / "figures"))
    run_training(job, cluster=TWO, storage=storage, uri=bucket_uri, tracker=tracker)
    for name in ("loss", "grad_norm"):
        expected = {done: figures[name] for done, figures in alone.items()}
        assert tracker.by_step(name) == pytest.approx(expected, rel=1e-3)
    ours = exported(storage, bucket_uri)
    theirs: dict[str, Tensor] = torch.load(tmp_path / "export" / "weights.pt", weights_only=True)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-3) for name in theirs)


@pytest.mark.long
def test_a_killed_driver_with_its_whole_ray_goes_on_elsewhere(
    storage: Storage, whole: tuple[str, FileTracker], bucket_uri: str, tmp_path: Path
) -> None:
    tracker = FileTracker(str(tmp_path / "figures"))
    job = toy_job(mischief={"pause_s": 0.3}, **OPTIONS)
    (tmp_path / "storage").write_bytes(pickle.dumps(storage))
    (tmp_path / "job").write_bytes(ray.cloudpickle.dumps(job))
    program = str(Path(__file__).with_name("train_driver.py"))
    arguments = [str(tmp_path / "storage"), bucket_uri, str(tmp_path / "job"), tracker.path]
    with (tmp_path / "output").open("w") as output:
        driver = subprocess.Popen([sys.executable, program, *arguments], stderr=output)
    try:
        _wait_for(lambda: any("update-00000005" in info.uri for info in storage.list(bucket_uri)), driver, tmp_path)
        _wait_for(lambda: max(tracker.by_step("loss")) >= 7, driver, tmp_path)
        children = psutil.Process(driver.pid).children(recursive=True)
        names = {child.pid: child.name() for child in children}
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    # Ray's two agents first try for a minute to tell the dead cluster that it is dead.
    workers = [child for child in children if "Agent" not in names[child.pid]]
    assert any("Train" in name for name in names.values()), names
    deadline = time.monotonic() + 120
    while running := [worker for worker in workers if _runs(worker)]:
        assert time.monotonic() < deadline, f"processes of the dead driver are still there: {running}"
        time.sleep(0.1)

    result = run_training(toy_job(**OPTIONS), cluster=ONE, storage=storage, uri=bucket_uri, tracker=tracker)
    assert result.resumed_from is not None
    assert result.resumed_from >= 5
    assert tracker.by_step("loss") == whole[1].by_step("loss")
    ours, theirs = exported(storage, bucket_uri), exported(storage, whole[0])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _wait_for(condition: object, driver: subprocess.Popen[bytes], folder: Path) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert driver.poll() is None, (folder / "output").read_text()
        try:
            if condition():
                return
        except FileNotFoundError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"waited in vain; the driver says: {(folder / 'output').read_text()}")


@pytest.mark.long
def test_an_error_that_the_user_can_mend_comes_out_as_it_is(storage: Storage, bucket_uri: str, tmp_path: Path) -> None:
    log = tmp_path / "updates"
    # The pause lets the asynchronous upload of update 5 end before the training does.
    job = toy_job(mischief={"fail_at": 7, "log": str(log), "pause_s": 0.7})
    with pytest.raises(DataError, match=r"^too many broken samples: 7 of 10.*look at the shards$"):
        run_training(job, cluster=TWO, storage=storage, uri=bucket_uri, tracker=None)
    assert log.read_text().split() == [str(update) for update in range(8)]  # not tried again


class Door(Proxy):
    """The store behind a door that, while `full`, answers 507 to checkpoints of updates after the fifth."""

    def __init__(self, storage: Storage) -> None:
        super().__init__(str(storage.endpoint_url))
        self.full = True
        self.refused: list[str] = []

    def refusal(self, request: web.Request) -> web.Response | None:
        update = re.search(r"/checkpoints/update-(\d+)", request.raw_path)
        if not (self.full and request.method in ("PUT", "POST") and update and int(update[1]) > 5):
            return None
        self.refused.append(request.raw_path)
        error = "<Error><Code>InsufficientStorage</Code><Message>no space left on device</Message></Error>"
        return web.Response(status=507, text=error, content_type="application/xml")


@pytest.mark.long
def test_a_store_that_fills_up_is_said_and_the_same_command_goes_on(storage: Storage, bucket_uri: str) -> None:
    keys = storage.environment()
    credentials = Credentials(keys["AWS_ACCESS_KEY_ID"], keys["AWS_SECRET_ACCESS_KEY"])
    settings = storage.settings.model_copy(update={"retry_attempts": 2})
    cluster = ClusterSettings(num_workers=1, cpus_per_worker=1, max_failures=0)
    with Door(storage) as door:
        behind = Storage(settings, endpoint_url=door.url, credentials=credentials)
        # The pause lets Ray note the checkpoint of update 5 before that of update 10 is refused.
        job = toy_job(mischief={"pause_s": 0.3}, **OPTIONS)
        with pytest.raises(StorageError) as caught:
            run_training(job, cluster=cluster, storage=behind, uri=bucket_uri, tracker=None)
        assert door.refused
        said = ("toy: a checkpoint could not be stored in", join(bucket_uri, "checkpoints"), "has room", "goes on from")
        assert all(words in str(caught.value) for words in said)
        door.full = False
        result = run_training(toy_job(**OPTIONS), cluster=cluster, storage=behind, uri=bucket_uri, tracker=None)
    assert result.resumed_from == 5
    assert result.updates == 30


@pytest.mark.long
def test_a_worker_whose_disk_is_full_at_the_export_says_so(storage: Storage, bucket_uri: str) -> None:
    def export(network: torch.nn.Module, folder: str) -> None:
        Path(folder, "weights.pt").symlink_to("/dev/full")
        Path(folder, "weights.pt").write_bytes(b"weights")

    job = dataclasses.replace(toy_job(**OPTIONS), export=export)
    with pytest.raises(StorageError) as caught:
        run_training(job, cluster=ONE, storage=storage, uri=bucket_uri, tracker=None)
    said = ("toy: write to ", "the disk is full", "MB free", "TMPDIR", join(bucket_uri, "checkpoints"))
    assert all(words in str(caught.value) for words in said)
    # The checkpoint of the last update is there, so that the same command has only the export left to do.
    assert list(storage.list(join(bucket_uri, "checkpoints", "update-00000030")))


@pytest.mark.long
def test_a_worker_that_always_dies_is_given_up(storage: Storage, bucket_uri: str) -> None:
    cluster = ClusterSettings(num_workers=1, cpus_per_worker=1, max_failures=0)
    with pytest.raises(FewstepError, match=r"^toy: a worker died more than cluster\.max_failures=0 times .*memory"):
        run_training(toy_job(mischief={"die_at": 2}), cluster=cluster, storage=storage, uri=bucket_uri, tracker=None)


def test_more_workers_than_cpus_are_refused(storage: Storage, bucket_uri: str) -> None:
    cluster = ClusterSettings(num_workers=4, cpus_per_worker=1)
    with pytest.raises(FewstepError, match=r"num_workers=4 with 1 CPU each need 4 CPUs and this Ray has 2"):
        run_training(toy_job(), cluster=cluster, storage=storage, uri=bucket_uri, tracker=None)
    with pytest.raises(FewstepError, match=r"global_batch_size=16 cannot be shared equally by cluster\.num_workers=3"):
        run_training(toy_job(), cluster=ClusterSettings(num_workers=3), storage=storage, uri=bucket_uri, tracker=None)


def test_ray_listens_on_loopback_only() -> None:
    listening = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # idle workers come and go
            if "ray" in process.name() or "gcs" in process.name():
                connections = process.net_connections(kind="inet")
                listening |= {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
    assert listening
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}

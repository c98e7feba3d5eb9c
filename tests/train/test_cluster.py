"""How many workers a training gets. What a cluster has is made up here: GPUs cannot be had in every test."""

from __future__ import annotations

from typing import Any

import pytest
import ray
from pydantic import ValidationError

from fewstep.errors import FewstepError
from fewstep.train.cluster import WorkerGroup, worker_group
from fewstep.train.settings import ClusterSettings


@pytest.fixture(autouse=True)
def _no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def group(
    monkeypatch: pytest.MonkeyPatch, *, has: dict[str, float], batch: int, streams: int | None = 8, **settings: Any
) -> WorkerGroup:
    monkeypatch.setattr(ray, "cluster_resources", lambda: has)
    return worker_group(ClusterSettings(**settings), global_batch_size=batch, num_streams=streams)


@pytest.mark.parametrize(
    ("has", "batch", "streams", "expected"),
    [
        ({"CPU": 2}, 32, 8, WorkerGroup(num_workers=2, cpus=1, use_gpu=False)),
        ({"CPU": 1}, 32, 8, WorkerGroup(num_workers=1, cpus=1, use_gpu=False)),
        # Fewer than 16 rows a worker would not be worth the exchange: the other cores become threads.
        ({"CPU": 16}, 64, 8, WorkerGroup(num_workers=4, cpus=4, use_gpu=False)),
        ({"CPU": 16}, 16, None, WorkerGroup(num_workers=1, cpus=16, use_gpu=False)),
        # Equal shares of streams and batch.
        ({"CPU": 7}, 512, 8, WorkerGroup(num_workers=4, cpus=1, use_gpu=False)),
        ({"CPU": 3}, 100, None, WorkerGroup(num_workers=2, cpus=1, use_gpu=False)),
        ({"CPU": 64, "GPU": 8}, 32, 8, WorkerGroup(num_workers=8, cpus=8, use_gpu=True)),
        ({"CPU": 64, "GPU": 6}, 512, 64, WorkerGroup(num_workers=4, cpus=16, use_gpu=True)),
        ({"CPU": 2, "GPU": 1}, 32, 8, WorkerGroup(num_workers=1, cpus=2, use_gpu=True)),
    ],
)
def test_auto_takes_what_the_cluster_has(
    monkeypatch: pytest.MonkeyPatch, has: dict[str, float], batch: int, streams: int | None, expected: WorkerGroup
) -> None:
    assert group(monkeypatch, has=has, batch=batch, streams=streams, num_workers="auto") == expected


def test_auto_counts_the_cores_that_a_worker_is_to_have(monkeypatch: pytest.MonkeyPatch) -> None:
    has = {"CPU": 8.0}
    assert group(monkeypatch, has=has, batch=512, num_workers="auto", cpus_per_worker=4) == WorkerGroup(2, 4, False)
    has = {"CPU": 64.0, "GPU": 8.0}
    assert group(monkeypatch, has=has, batch=512, num_workers="auto", cpus_per_worker=16) == WorkerGroup(4, 16, True)


def test_a_number_is_taken_as_it_is_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert group(monkeypatch, has={"CPU": 4}, batch=32, num_workers=1) == WorkerGroup(1, 4, False)
    with pytest.raises(FewstepError, match=r"num_workers=8 with 1 CPU each need 8 CPUs and this Ray has 4.*num_cpus=8"):
        group(monkeypatch, has={"CPU": 4}, batch=32, num_workers=8)
    with pytest.raises(FewstepError, match=r"num_workers=2 need a GPU each and this Ray has 1"):
        group(monkeypatch, has={"CPU": 4, "GPU": 1}, batch=32, num_workers=2)
    with pytest.raises(FewstepError, match=r"global_batch_size=32 cannot be shared equally by cluster\.num_workers=3"):
        group(monkeypatch, has={"CPU": 4}, batch=32, num_workers=3)


def elastic(fewest: int, most: int, **more: Any) -> dict[str, Any]:
    return {"num_workers": {"min": fewest, "max": most}, "cpus_per_worker": 2, "use_gpu": True, **more}


def test_elastic_workers_are_taken_as_bounds_whatever_they_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    has = {"CPU": 8.0, "GPU": 2.0}
    assert group(monkeypatch, has=has, batch=32, **elastic(2, 7)) == WorkerGroup((2, 7), 2, True)
    empty = group(monkeypatch, has={}, batch=32, address="10.0.0.1:6379", **elastic(3, 8))
    assert empty == WorkerGroup((3, 8), 2, True)


def test_elastic_workers_that_can_never_be_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    has = {"CPU": 8.0, "GPU": 2.0}
    with pytest.raises(FewstepError, match=r"num_workers=2…9 may be more than the 8 streams .*set max to at most 8"):
        group(monkeypatch, has=has, batch=32, **elastic(2, 9))
    with pytest.raises(FewstepError, match=r"num_workers=2…9 may be more than the 8 rows of global_batch_size"):
        group(monkeypatch, has=has, batch=8, streams=None, **elastic(2, 9))
    with pytest.raises(FewstepError, match=r"num_workers=5…8 with 2 CPU each need at least 10 CPUs and this Ray has 8"):
        group(monkeypatch, has=has, batch=32, **elastic(5, 8))
    with pytest.raises(FewstepError, match=r"num_workers=3…8 need a GPU each and this Ray has 2"):
        group(monkeypatch, has=has, batch=32, **elastic(3, 8))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (elastic(3, 2), r"num_workers\.bounds\n.*min=3 is above max=2"),
        (elastic(0, 2), r"num_workers\.bounds\.min\n.*greater than 0"),
        (
            elastic(1, 2, use_gpu="auto"),
            "use_gpu=auto: a cluster that grows may have no GPU yet.*use_gpu: true, or",
        ),
        (elastic(1, 2, cpus_per_worker=None), "num_workers=1…2 without cpus_per_worker.*set cpus_per_worker"),
    ],
)
def test_bounds_need_what_a_cluster_cannot_tell(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ClusterSettings(**values)

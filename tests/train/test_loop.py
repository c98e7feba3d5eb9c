"""The loop in this process: it learns, it resumes bit for bit, it stops at NaN, it refuses what is not its own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_training import STREAMS, ToyBatches, toy_job

from fewstep.errors import CheckpointError, DataError, FewstepError
from fewstep.train.checkpoint import TrainState, merge_streams, save_state
from fewstep.train.in_process import train_in_process
from fewstep.train.job import TrainJob, TrainResult
from fewstep.train.loop import _figure_name, _take


class Killed(BaseException):
    pass


class Watch:
    """Notes every update's figures; can end the process's life after an update."""

    def __init__(self, kill_after: int | None = None) -> None:
        self.figures: dict[int, dict[str, float]] = {}
        self._kill_after = kill_after

    def __call__(self, done: int, figures: dict[str, float]) -> None:
        self.figures[done] = figures
        if done == self._kill_after:
            raise Killed

    def losses(self) -> dict[int, float]:
        return {done: figures["loss"] for done, figures in self.figures.items()}


def weights(folder: Path) -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = torch.load(folder / "export" / "weights.pt", weights_only=True)
    return loaded


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_learns_and_reports(tmp_path: Path) -> None:
    watch = Watch()
    result = train_in_process(toy_job(updates=300, log_every=10), folder=str(tmp_path), on_log=watch)
    losses = watch.losses()
    assert list(losses) == list(range(5, 301, 5))  # log_every=10 and checkpoint_every=5 both read
    assert losses[300] < 0.1 * losses[5]
    last = watch.figures[300]
    assert last["images_per_second"] > 0
    assert 0 <= last["data_wait_share"] <= 1
    assert last["noise"] == pytest.approx(0.05**2, rel=0.5)
    assert last["learning_rate"] == pytest.approx(3e-3 / 300)
    assert last["skipped/broken"] == 1
    assert last["drawn/toy"] == 300 * toy_job().settings.global_batch_size
    assert result.updates == 300
    assert result.figures == last
    assert result.resumed_from is None
    assert result.peak_memory_bytes > 10 * 2**20
    assert TrainResult.from_json(result.to_json(), uri="x") == result


@pytest.mark.parametrize("kill_after", [5, 7, 29, 30])
def test_killed_and_resumed_is_bit_for_bit_the_same(tmp_path: Path, kill_after: int) -> None:
    options: dict[str, Any] = {"dropout": 0.2, "ema_decay": 0.9, "hand_over": "ema", "warmup_updates": 3}
    whole, first, second = Watch(), Watch(kill_after), Watch()
    train_in_process(toy_job(**options), folder=str(tmp_path / "whole"), on_log=whole)
    with pytest.raises(Killed):
        train_in_process(toy_job(**options), folder=str(tmp_path / "parts"), on_log=first)
    torch.manual_seed(999)  # whatever the process drew before must not matter
    result = train_in_process(toy_job(**options), folder=str(tmp_path / "parts"), on_log=second)

    saved = kill_after // 5 * 5
    assert result.resumed_from == saved
    assert {**first.losses(), **second.losses()} == whole.losses()
    assert list(second.losses()) == list(range(saved + 1, 31))
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert "loss" in result.figures


def test_hand_over_raw_and_ema_differ(tmp_path: Path) -> None:
    for kind in ("raw", "ema"):
        train_in_process(toy_job(ema_decay=0.9, hand_over=kind), folder=str(tmp_path / kind))
    assert not equal(weights(tmp_path / "raw"), weights(tmp_path / "ema"))


def test_old_checkpoints_are_removed(tmp_path: Path) -> None:
    train_in_process(toy_job(num_checkpoints_to_keep=2), folder=str(tmp_path))
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == [
        "update-00000025",
        "update-00000030",
    ]


def test_the_norm_is_clipped_and_reported_unclipped(tmp_path: Path) -> None:
    free, clipped = Watch(), Watch()
    train_in_process(toy_job(updates=1, grad_clip_norm=1e6), on_log=free)
    train_in_process(toy_job(updates=1, grad_clip_norm=1e-9), on_log=clipped)
    assert free.figures[1]["grad_norm"] == clipped.figures[1]["grad_norm"] > 0.1


def test_bfloat16_means_autocast(tmp_path: Path) -> None:
    exact, rounded = Watch(), Watch()
    train_in_process(toy_job(updates=3), on_log=exact)
    train_in_process(toy_job(updates=3, precision="bfloat16"), folder=str(tmp_path), on_log=rounded)
    assert exact.losses() != rounded.losses()
    assert rounded.losses()[1] == pytest.approx(exact.losses()[1], rel=0.02)
    assert all(weight.dtype == torch.float32 for weight in weights(tmp_path).values())


def test_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train_in_process(toy_job(), folder=str(tmp_path), on_log=Watch(10))
    with pytest.raises(CheckpointError) as caught:
        train_in_process(toy_job(fingerprint="b" * 64), folder=str(tmp_path))
    message = str(caught.value)
    assert "a" * 64 in message
    assert "b" * 64 in message
    assert f"remove {tmp_path}/checkpoints" in message

    with pytest.raises(CheckpointError, match=r"learning_rate was 0\.003 and is 0\.5"):
        train_in_process(toy_job(learning_rate=0.5), folder=str(tmp_path))
    assert train_in_process(toy_job(log_every=3), folder=str(tmp_path)).resumed_from == 10  # only watching changed


def test_damaged_checkpoint_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train_in_process(toy_job(), folder=str(tmp_path), on_log=Watch(10))
    for file in tmp_path.glob("checkpoints/*/state.pt"):
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"state\.pt cannot be read.*delete it"):
        train_in_process(toy_job(), folder=str(tmp_path))


def test_nan_stops_names_its_update_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    job = toy_job(mischief={"nan_at": 12}, log_every=7)
    with pytest.raises(FewstepError, match=r"toy: the loss became nan at update 13 of 30.*lower learning_rate"):
        train_in_process(job, folder=str(tmp_path))
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["update-00000005", "update-00000010"]
    state = torch.load(tmp_path / "checkpoints" / kept[-1] / "state.pt", weights_only=True)
    assert all(torch.isfinite(weight).all() for weight in state["network"].values())


def test_weights_that_overflow_are_not_saved(tmp_path: Path) -> None:
    job = toy_job(updates=2, checkpoint_every=1, learning_rate=1e38, decay="constant")
    with pytest.raises(FewstepError, match="became"):
        train_in_process(job, folder=str(tmp_path))
    for file in tmp_path.glob("checkpoints/*/state.pt"):
        state = torch.load(file, weights_only=True)
        assert all(math.isfinite(float(weight.abs().sum())) for weight in state["network"].values())


def test_full_disk_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "state.pt").symlink_to("/dev/full")
    state = TrainState("f", {}, 5, {"w": torch.zeros(100_000)}, None, {}, {}, {}, {}, 0.0, 0.0, "float32")
    with pytest.raises(CheckpointError, match=r"update 5 cannot be written.*TMPDIR"):
        save_state(state, str(tmp_path))
    assert list(tmp_path.iterdir()) == []  # nothing half written stays


def test_batches_of_the_wrong_size_are_refused() -> None:
    job = toy_job()
    job.batches.keywords["batch_size"] = 8  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"batch of update 1 has 8 rows .* is 16"):
        train_in_process(job)


def test_streams_of_workers_are_joined_and_must_not_clash() -> None:
    assert merge_streams([{"streams": {"0": [0, 5]}}, {"streams": {"1": [1, 2]}}]) == {
        "streams": {"0": [0, 5], "1": [1, 2]}
    }
    with pytest.raises(CheckpointError, match="different positions for '0'"):
        merge_streams([{"streams": {"0": [0, 5]}}, {"streams": {"0": [0, 6]}}])


@pytest.mark.parametrize(
    ("reason", "name"),
    [
        ("no caption", "skipped/no caption"),
        ("filtered, width below 512", "filtered/width below 512"),
        ("filtered, url does not match ^https?://a,b", "filtered/url does not match _https_:__a_b"),
    ],
)
def test_counts_have_names_that_mlflow_takes(reason: str, name: str) -> None:
    assert _figure_name(reason) == name


class GroupedBatches(ToyBatches):
    """The toy's batches with the rows as a list, as where streams give groups of unlike shapes."""

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            yield SimpleNamespace(**{**vars(batch), "data": {"x": list(batch.data["x"]), "key": ["k"] * 16}})


def grouped_job(**settings: Any) -> TrainJob:
    job = toy_job(updates=6, **settings)
    batches = partial(GroupedBatches, batch_size=16)
    return dataclasses.replace(job, batches=batches, num_streams=STREAMS, grouped=True)


@pytest.mark.parametrize("micro", [None, 4, 2])
def test_a_micro_batch_is_of_one_group(micro: int | None) -> None:
    wanted, got = Watch(), Watch()
    train_in_process(toy_job(updates=6, micro_batch_size=micro or 4), on_log=wanted)
    train_in_process(grouped_job(micro_batch_size=micro), on_log=got)
    assert got.losses() == wanted.losses()


def test_a_micro_batch_over_groups_is_refused() -> None:
    with pytest.raises(DataError, match=r"micro_batch_size=8 does not divide the 4 rows of .*take 1, 2, 4 or"):
        train_in_process(grouped_job(micro_batch_size=8))


def test_rows_of_a_list_are_stacked() -> None:
    rows = [torch.full((2, 3), float(n)) for n in range(2)] + [torch.full((3, 2), float(n)) for n in range(2)]
    data = {"x": rows, "text": ["a", "b", "c", "d"], "names": ["p", "q"]}
    taken = _take(data, slice(2, 4), of=4, device=torch.device("cpu"))
    assert torch.equal(taken["x"], torch.stack(rows[2:]))
    assert (taken["text"], taken["names"]) == (["c", "d"], ["p", "q"])

"""Two workers, under DDP and in shards, train as one process does, and go on from each other's checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from real_training import Kind
from unet_training import curve, exported, tiny_unet, unet_job
from worker_processes import STAGES, UNEVEN, begin_again, run_workers, stage_job

from fewstep.train.parallel import compilable
from tiny import tiny_student_folder, tiny_teacher_folder

# Processes begin, and each gathers shards over a slow network.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

Figures = dict[int, tuple[float, ...]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process and two workers have done."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("workers")
    for name in ("alone", "fsdp after alone, uneven"):
        curve(unet_job(), folder / name, kill_after=3)
    tiny_teacher_folder(folder / "teacher")
    tiny_student_folder(folder / "student")
    run_workers(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Figures, Path]:
    folder = tmp_path_factory.mktemp("plain")
    return curve(unet_job(), folder), folder


def found(folder: Path, rank: int = 0) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / f"found-{rank}.json").read_text())
    return loaded


def check(figures: dict[str, list[float]] | Figures, weights: Path, plain: tuple[Figures, Path]) -> None:
    """Hold a curve, from where it began, and the exported average against those of one process."""
    ours = {int(done): tuple(values) for done, values in figures.items()}
    assert max(ours) == max(plain[0])
    for done, values in ours.items():
        assert values == pytest.approx(plain[0][done], rel=1e-4), done
    theirs = exported(plain[1])
    averages = exported(weights)
    assert averages.keys() == theirs.keys()
    for name, average in averages.items():
        assert type(average) is torch.Tensor
        # Adam makes whole steps of gradients that are nothing but rounding.
        assert torch.allclose(average, theirs[name], atol=1e-4), name


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_workers_give_the_curve_and_the_weights_of_one_process(
    strategy: str, folder: Path, plain: tuple[Figures, Path]
) -> None:
    result = found(folder)[strategy]
    figures = result["curve"] if strategy == "fsdp" else result
    assert len(figures) == 4
    check(figures, folder / strategy, plain)


@pytest.mark.parametrize("way", UNEVEN)
def test_three_workers_with_unequal_shares_give_the_curve_and_the_weights_of_one_process(
    way: str, folder: Path, plain: tuple[Figures, Path]
) -> None:
    figures = json.loads((folder / "found-uneven.json").read_text())[way]
    assert list(figures) == (["3", "4"] if "after" in way else ["1", "2", "3", "4"])
    check(figures, folder / way, plain)


@pytest.mark.parametrize("kind", STAGES)
def test_two_workers_give_each_stage_the_curve_of_one_process(kind: Kind, folder: Path, tmp_path: Path) -> None:
    alone = curve(stage_job(kind, folder), tmp_path)
    ours = {int(done): values for done, values in found(folder)[kind].items()}
    assert len(alone) == 10
    assert ours.keys() == alone.keys()
    for done, values in ours.items():
        assert values == pytest.approx(alone[done], rel=1e-3), done
    weights, theirs = exported(folder / kind), exported(tmp_path)
    # An attention's scores do not depend on the bias of its keys: Adam makes steps of the noise of that gradient.
    told = [name for name in theirs if not name.endswith("k_proj.bias")]
    assert all(torch.allclose(weights[name], theirs[name], atol=1e-3) for name in told)


def test_each_worker_holds_half_of_every_network(folder: Path) -> None:
    shares = [found(folder, rank)["fsdp"]["shares"] for rank in range(2)]
    for trained_or_frozen in zip(*shares, strict=True):
        assert sum(trained_or_frozen) == pytest.approx(1.0)
        assert all(0.4 < share < 0.6 for share in trained_or_frozen)


def test_a_transformer_block_is_gathered_alone_and_never_compiled_within_another_part(folder: Path) -> None:
    blocks = ["CrossAttnDownBlock2D", "CrossAttnUpBlock2D", "DownBlock2D", "UNetMidBlock2DCrossAttn", "UpBlock2D"]
    inside = ["BasicTransformerBlock"] * 4
    assert found(folder)["fsdp"]["units"] == [*inside, *blocks[:3], "UNet2DConditionModel", *blocks[3:]]
    compiled = list(compilable(tiny_unet(1)))
    assert [type(part).__name__ for part in compiled].count("BasicTransformerBlock") == len(inside)
    for part in compiled:
        assert not any(other in compiled for other in list(part.modules())[1:])


def test_a_checkpoint_is_the_same_file_whoever_wrote_it(folder: Path, plain: tuple[Figures, Path]) -> None:
    def described(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            assert type(value) is torch.Tensor
            return value.shape, value.dtype, value.device.type
        if isinstance(value, dict):
            return {name: described(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [described(inner) for inner in value]
        return type(value)

    states = [
        torch.load(root / "checkpoints" / "update-00000004" / "state.pt", weights_only=True)
        for root in (plain[1], folder / "ddp", folder / "fsdp")
    ]
    assert described(states[1]) == described(states[2]) == described(states[0])
    for name in ("settings", "streams", "fingerprint", "update"):
        assert states[1][name] == states[2][name] == states[0][name]


@pytest.mark.parametrize(("name", "begun_in"), [("fsdp after alone", "alone"), ("ddp after fsdp",) * 2])
def test_workers_go_on_from_what_others_saved(
    name: str, begun_in: str, folder: Path, plain: tuple[Figures, Path]
) -> None:
    figures = found(folder)[name]
    assert list(figures) == ["3", "4"]
    check(figures, folder / begun_in, plain)


def test_one_process_goes_on_from_shards(folder: Path, plain: tuple[Figures, Path], tmp_path: Path) -> None:
    begin_again(folder / "fsdp", tmp_path)
    figures = curve(unet_job(), tmp_path)
    assert list(figures) == [3, 4]
    check(figures, tmp_path, plain)


def test_nan_names_the_worker_whose_rows_it_came_from(folder: Path) -> None:
    errors = [found(folder, rank)["nan"] for rank in range(2)]
    assert errors[0] == errors[1]
    assert (
        "the loss became nan at update 3 of 4. Its batch: worker 1, rows 2-3, 6-7, ending at data position" in errors[0]
    )
    assert '{"streams": {"1": [0, 6], "3": [0, 6]}}, samples 1/4, 1/5, 3/4, 3/5. Nothing' in errors[0]


def test_a_switch_without_effect_is_refused_by_every_worker(folder: Path) -> None:
    assert all("gradient_checkpointing=true needs" in found(folder, rank)["toy"] for rank in range(2))


def test_only_the_last_micro_batch_exchanges_gradients(folder: Path) -> None:
    assert found(folder)["passes"] == [False, True]

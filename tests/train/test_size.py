"""Training at size, in one process: every switch gives the curve of the plain loop, and none is without effect."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from toy_training import ToyBatches, ToyObjective, toy_job
from unet_training import FollowObjective, curve, exported, unet_job

from fewstep.errors import DataError, FewstepError
from fewstep.train.ema import Ema
from fewstep.train.in_process import train_in_process
from fewstep.train.settings import TrainSettings


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, tuple[float, ...]], Path]:
    folder = tmp_path_factory.mktemp("plain")
    torch.set_num_threads(1)
    return curve(unet_job(), folder), folder


def same(ours: dict[int, tuple[float, ...]], theirs: dict[int, tuple[float, ...]], *, rel: float = 1e-5) -> bool:
    return ours.keys() == theirs.keys() and all(ours[done] == pytest.approx(theirs[done], rel=rel) for done in ours)


def recorded(**settings: Any) -> tuple[dict[int, tuple[float, ...]], FollowObjective]:
    """Train and return the curve with the objective that was trained."""
    made: list[FollowObjective] = []

    def objective(device: torch.device) -> FollowObjective:
        made.append(FollowObjective(device))
        return made[-1]

    return curve(unet_job(objective=objective, **settings)), made[0]


def test_micro_batches_give_the_same_curve(plain: tuple[dict[int, tuple[float, ...]], Path]) -> None:
    ours, objective = recorded(micro_batch_size=2)
    assert objective.rows == [2] * 4 * 4
    assert same(ours, plain[0])


def test_recomputing_activations_gives_the_same_curve(plain: tuple[dict[int, tuple[float, ...]], Path]) -> None:
    ours, objective = recorded(gradient_checkpointing=True)
    assert objective.network.is_gradient_checkpointing
    assert not objective.frozen[0].is_gradient_checkpointing
    assert same(ours, plain[0])


def test_channels_last_gives_the_same_curve(plain: tuple[dict[int, tuple[float, ...]], Path]) -> None:
    ours, objective = recorded(channels_last=True)
    for network in (objective.network, objective.frozen[0]):
        assert network.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert same(ours, plain[0])


class ToyFollowObjective(ToyObjective):
    """The toy after a frozen layer: small enough to be compiled in a test."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.frozen = [nn.Linear(4, 4).to(device)]

    def loss(self, network: nn.Module, batch: dict[str, Any], random: Any) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            x = self.frozen[0](batch["x"])
        return super().loss(network, {"x": x}, random)


def test_compiled_networks_give_the_same_curve_and_keep_the_names_of_their_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[nn.Module] = []
    compile_ = nn.Module.compile

    def noting(network: nn.Module, *, options: dict[str, Any]) -> None:
        assert options == {"layout_optimization": False}  # with it, gradients are wrong on a CPU
        compiled.append(network)
        if shutil.which("g++"):
            compile_(network, options=options)
        else:
            compile_(network, backend="eager")  # dynamo alone where nothing can compile C++

    monkeypatch.setattr(nn.Module, "compile", noting)
    curves: list[dict[int, float]] = []
    for name, switch in (("plain", False), ("compiled", True)):
        losses: dict[int, float] = {}
        job = dataclasses.replace(toy_job(updates=5, compile=switch), objective=ToyFollowObjective)
        train_in_process(
            job, folder=str(tmp_path / name), on_log=lambda done, figures, to=losses: to.update({done: figures["loss"]})
        )
        curves.append(losses)
    assert [type(network).__name__ for network in compiled] == ["Sequential", "Linear"]
    assert all(network._compiled_call_impl is not None for network in compiled)
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert exported(tmp_path / "compiled").keys() == exported(tmp_path / "plain").keys()


@pytest.mark.parametrize(
    "others",
    [
        {"micro_batch_size": 4, "gradient_checkpointing": True, "channels_last": True, "ema_device": "cpu"},
        {"strategy": "fsdp", "shard_frozen": True},
    ],
)
def test_a_training_goes_on_with_other_switches(
    plain: tuple[dict[int, tuple[float, ...]], Path], tmp_path: Path, others: dict[str, Any]
) -> None:
    first = curve(unet_job(), tmp_path, kill_after=3)
    second = curve(unet_job(**others), tmp_path)
    assert list(second) == [3, 4]
    assert same({**first, **second}, plain[0])
    theirs = exported(plain[1])
    assert all(torch.allclose(weight, theirs[name], atol=1e-5) for name, weight in exported(tmp_path).items())


def test_frozen_networks_in_bfloat16() -> None:
    exact, _ = recorded(precision="bfloat16", updates=2)
    ours, objective = recorded(precision="bfloat16", frozen_dtype="bfloat16", updates=2)
    assert objective.frozen[0].dtype == torch.bfloat16
    assert objective.network.dtype == torch.float32
    assert same(ours, exact, rel=0.02)


def test_sizes_that_do_not_divide_the_rows_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"micro_batch_size=3 .* 8 rows .*sizes that do: 1, 2, 4, 8"):
        unet_job(micro_batch_size=3)
    settings = unet_job().settings.model_copy(update={"micro_batch_size": 3})  # what validation cannot see
    job = unet_job()
    object.__setattr__(job, "settings", settings)
    with pytest.raises(DataError, match="sizes that do: 1, 2, 4, 8"):
        train_in_process(job)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gradient_checkpointing": True}, r"gradient_checkpointing=true needs .*Sequential is or holds none"),
        ({"channels_last": True}, r"channels_last=true has no effect on Sequential"),
        ({"strategy": "fsdp", "shard_frozen": True}, r"shard_frozen=True .* ToyObjective has none"),
        ({"frozen_dtype": "bfloat16", "precision": "bfloat16"}, r"frozen_dtype=bfloat16 .* ToyObjective has none"),
    ],
)
def test_a_switch_without_effect_on_the_objective_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(FewstepError, match=words):
        train_in_process(toy_job(updates=1, **settings))


def test_frozen_bfloat16_needs_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.train.loop.resolve_precision", lambda asked, device: "float32")
    with pytest.raises(FewstepError, match="precision=auto means float32 on this device"):
        train_in_process(unet_job(updates=1, precision="auto", frozen_dtype="bfloat16"))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"shard_frozen": True}, "shard_frozen=true needs strategy=fsdp"),
        ({"channels_last": True, "strategy": "fsdp"}, "channels_last=true cannot be kept with strategy=fsdp"),
        ({"frozen_dtype": "bfloat16"}, "frozen_dtype=bfloat16 needs autocast"),
        ({"ema_every": 10}, "ema_every=10 .* have no effect without averaged weights"),
        ({"ema_device": "cpu"}, "ema_device=cpu have no effect without averaged weights"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TrainSettings(updates=10, global_batch_size=4, learning_rate=0.1, **values)


def test_settings_that_only_round_do_not_belong_to_the_weights() -> None:
    before = TrainSettings(updates=10, global_batch_size=4, learning_rate=0.1, ema_decay=0.9)
    rounding = {
        "micro_batch_size": 2,
        "gradient_checkpointing": True,
        "strategy": "fsdp",
        "shard_frozen": True,
        "compile": True,
        "ema_device": "cpu",
    }
    assert before.model_copy(update=rounding).of_the_weights() == before.of_the_weights()
    # As checkpoints have them that are older than the switches.
    assert {"ema_every", "frozen_dtype"}.isdisjoint(before.of_the_weights())
    assert before.model_copy(update={"ema_every": 2}).of_the_weights()["ema_every"] == 2
    assert before.model_copy(update={"frozen_dtype": "bfloat16"}).of_the_weights()["frozen_dtype"] == "bfloat16"


@pytest.mark.parametrize("device", ["network", "cpu"])
def test_an_average_of_every_third_update_takes_the_decays_of_three(device: Any) -> None:
    network = nn.Linear(1, 1, bias=False)
    ema = Ema(network, decay=0.9, every=3, device=device)
    average = network.weight.item()
    for update in range(11):
        network.weight.data.fill_(math.sin(update))
        ema.step(update)
        if update % 3 == 2:
            d = math.prod(min(0.9, (1 + k) / (10 + k)) for k in (update - 2, update - 1, update))
            average = d * average + (1 - d) * math.sin(update)
        assert float(ema.state_dict()["weight"]) == pytest.approx(average, rel=1e-6)


def test_an_average_in_main_memory_is_the_same_bit_for_bit() -> None:
    torch.manual_seed(0)
    network = nn.Linear(30, 30)
    here, beside = Ema(network, decay=0.99), Ema(network, decay=0.99, device="cpu")
    for update in range(20):
        for weight in network.parameters():
            weight.data.normal_()
        here.step(update)
        beside.step(update)
    ours, theirs = beside.state_dict(), here.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    beside.copy_to(network)
    assert torch.equal(network.weight, theirs["weight"])


def test_nan_names_the_batch_by_rows_position_and_keys(tmp_path: Path) -> None:
    with pytest.raises(FewstepError) as caught:
        train_in_process(unet_job(nan_at=(2, 5), log_every=4), folder=str(tmp_path))
    message = str(caught.value)
    assert "the loss became nan at update 3 of 4" in message
    position = '{"streams": {"0": [0, 6], "1": [0, 6], "2": [0, 6], "3": [0, 6]}}'
    assert f"Its batch: worker 0, rows 0-7, ending at data position {position}, samples 0/4, 0/5, 1/4" in message
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["update-00000002"]


def test_the_data_position_of_nan_is_where_it_can_be_looked_at() -> None:
    job = toy_job(mischief={"nan_at": 12}, log_every=7, checkpoint_every=7)
    with pytest.raises(FewstepError, match=r'update 13 of 30\. Its batch: .*position {"streams": {"0": \[0, 52\]'):
        train_in_process(job)
    batches = ToyBatches(rank=0, world_size=1, batch_size=16, nan_at=12)
    batches.load_state({"streams": {str(s): [0, 52 - 4] for s in range(4)}})
    assert next(iter(batches)).data["x"].isnan().any()

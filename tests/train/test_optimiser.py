"""Learning rate by hand values, the average by its formula."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from fewstep.train.ema import Ema
from fewstep.train.optimiser import learning_rate_factor, make_optimizer, set_learning_rate
from fewstep.train.settings import TrainSettings


def settings(**values: object) -> TrainSettings:
    return TrainSettings.model_validate({"updates": 10, "global_batch_size": 4, "learning_rate": 0.1, **values})


def factors(of: TrainSettings) -> list[float]:
    return [learning_rate_factor(of, update) for update in range(of.updates)]


def test_linear_decay_starts_at_the_peak_and_would_reach_zero_at_updates() -> None:
    assert factors(settings()) == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert learning_rate_factor(settings(), 10) == pytest.approx(0.0)


def test_warm_up_rises_to_the_peak_and_then_decays() -> None:
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert factors(settings(warmup_updates=4)) == pytest.approx(expected)


def test_cosine_and_constant() -> None:
    assert learning_rate_factor(settings(decay="cosine"), 5) == pytest.approx(0.5)
    assert learning_rate_factor(settings(decay="cosine"), 1) == pytest.approx(0.5 * (1 + math.cos(math.pi / 10)))
    assert factors(settings(decay="constant", warmup_updates=2)) == [0.5, *[1.0] * 9]


def test_own_parameter_groups_keep_their_ratio() -> None:
    class Objective:
        network = nn.Linear(2, 2)

        def parameter_groups(self, learning_rate: float) -> list[dict[str, object]]:
            return [{"params": [self.network.weight]}, {"params": [self.network.bias], "lr": 10 * learning_rate}]

    optimizer = make_optimizer(Objective(), settings())  # type: ignore[arg-type]
    set_learning_rate(optimizer, settings(), 5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.5])


def test_frozen_weights_are_left_out() -> None:
    class Objective:
        network = nn.Linear(2, 2)

    Objective.network.bias.requires_grad_(False)
    optimizer = make_optimizer(Objective(), settings())  # type: ignore[arg-type]
    assert [p.shape for group in optimizer.param_groups for p in group["params"]] == [(2, 2)]


def test_ema_follows_its_formula() -> None:
    network = nn.Linear(1, 1, bias=False)
    ema = Ema(network, decay=0.3)
    average = network.weight.item()
    for update, weight in enumerate([2.0, -1.0, 5.0, 0.5]):
        network.weight.data.fill_(weight)
        ema.step(update)
        d = min(0.3, (1 + update) / (10 + update))
        average = d * average + (1 - d) * weight
        assert float(ema.state_dict()["weight"]) == pytest.approx(average, rel=1e-6)
    assert [ema.decay_at(k) for k in (0, 1, 100)] == [0.1, 2 / 11, 0.3]
    ema.copy_to(network)
    assert network.weight.item() == pytest.approx(average, rel=1e-6)


def test_ema_state_goes_round() -> None:
    torch.manual_seed(0)
    network = nn.Linear(3, 3)
    ema, other = Ema(network, decay=0.9), Ema(nn.Linear(3, 3), decay=0.9)
    ema.step(5)
    other.load_state_dict(ema.state_dict())
    assert all(torch.equal(other.state_dict()[name], value) for name, value in ema.state_dict().items())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"warmup_updates": 11}, "warmup_updates=11 is more than updates=10"),
        ({"hand_over": "ema"}, "set ema_decay"),
        ({"betas": (0.9, 1.0)}, "must both lie in"),
        ({"lerning_rate": 1}, "lerning_rate"),
        ({"updates": 0}, "updates"),
    ],
)
def test_settings_that_cannot_work_are_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        settings(**values)

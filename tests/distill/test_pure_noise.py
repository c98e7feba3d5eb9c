"""What `pure_noise_at_end` does where a schedule leaves a trace of the picture at its last time, and what it does not.

Stable Diffusion's alpha is 0.068 at the end. A picture of 1024 pixels that all have one brightness is, along the
direction of brightness, one number sqrt(1024) times as large: 0.068 of it is not little beside unit noise.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from distill.fields import SCHEDULES, Oracle, denoiser, field_denoiser, rows
from fewstep.diffusion import CosineSchedule, RowRandom, ddim
from fewstep.distill import GuidanceObjective, ProgressiveObjective

STABLE_DIFFUSION = SCHEDULES["stable diffusion"]
PIXELS, BRIGHTNESS, SPREAD = 1024, 0.5, 0.5


@pytest.mark.parametrize("name", ["stable diffusion", "cosine"])
def test_only_the_last_time_gets_pure_noise(name: str) -> None:
    schedule = SCHEDULES[name]
    x, eps = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    time = schedule.times(4)
    z = schedule.noise(x, eps, time, pure_noise_at_end=True)
    assert torch.equal(z[4], eps[4])
    assert torch.equal(z[:4], schedule.noise(x, eps, time)[:4])
    assert not torch.equal(schedule.noise(x, eps, time)[4], eps[4])


@pytest.mark.parametrize("steps", [1, 2])
def test_networks_see_it_and_the_formulas_keep_their_alpha(steps: int) -> None:
    """The oracle knows nothing of the switch: it makes the teacher's jumps from whatever state it is shown."""
    teacher = field_denoiser("stable diffusion", "v_prediction", w_input=True)
    objective = ProgressiveObjective(teacher, num_inference_steps=steps, w_min=0.0, w_max=4.0, pure_noise_at_end=True)
    paths = {2 * i: [2 * i, 2 * i - 1, 2 * i - 2] for i in range(1, steps + 1)}
    oracle = Oracle(teacher.network, "stable diffusion", "v_prediction", units=2 * steps, paths=paths)
    shown: list[Tensor] = []

    class Listens(nn.Module):
        def forward(self, z: Tensor, told: Tensor, *more: Any) -> Tensor:
            shown.append(z[told == 999])
            return oracle(z, told, *more)

    batch = rows(32)
    batch["latent_mean"] += 100.0
    loss, _ = objective.loss(Listens(), batch, RowRandom(seed=0, step=0, rows=range(32)))
    assert float(loss) < (1e-10 if steps == 1 else 1e-6)  # the other time sees numbers of 50, and their rounding
    assert len(shown[0]) >= 8
    assert float(shown[0].abs().max()) < 5, "no trace of a picture of brightness 100"


def test_stage_one_sees_it_too() -> None:
    teacher = field_denoiser("stable diffusion", "v_prediction")
    seen: dict[bool, Tensor] = {}
    for switch in (False, True):
        objective = GuidanceObjective(teacher, w_min=0.0, w_max=4.0, pure_noise_at_end=switch)

        class Listens(nn.Module):
            def __init__(self, key: bool) -> None:
                super().__init__()
                self.key = key

            def forward(self, z: Tensor, told: Tensor, *more: Any) -> Tensor:
                seen[self.key] = z[told == 999]
                return z

        batch = rows(3000)
        batch["latent_mean"] = torch.full((3000, 6), 100.0)
        objective.loss(Listens(switch), batch, RowRandom(seed=0, step=0, rows=range(3000)))
    assert len(seen[True]) > 0
    assert float(seen[True].abs().max()) < 5
    assert float(seen[False].mean()) == pytest.approx(6.83, abs=1.0)


class Brightness(ModelMixin, ConfigMixin):
    """The exact network of one number, as v: bright or dark at ±(sqrt(PIXELS) · BRIGHTNESS), with a spread or without.

    As a mixture of two Gaussians of weights `bright` and 1 − bright.
    """

    @register_to_config
    def __init__(self, schedule: str, bright: float, spread: float, time_cond_proj_dim: int | None = None) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, z: Tensor, told: Tensor, label: Tensor, w_embedding: Tensor | None) -> Tensor:
        alpha, sigma = (value.double() for value in SCHEDULES[self.config.schedule].alpha_sigma(told, ndim=2))
        z = z.double()
        place, of_data = PIXELS**0.5 * BRIGHTNESS, PIXELS * self.config.spread**2
        variance = alpha**2 * of_data + sigma**2
        log_odds = 2 * alpha * place * z / variance + torch.tensor(self.config.bright).double().logit()
        middle = place * (2 * log_odds.sigmoid() - 1)
        from_middle = (z - alpha * middle) / variance
        return alpha * sigma * from_middle - sigma * (middle + alpha * of_data * from_middle)


def _mean_brightness(name: str, *, steps: int) -> float:
    """Mean brightness of what the exact network makes of pure noise, data N(BRIGHTNESS, SPREAD²)."""
    model = denoiser(Brightness(name, bright=1.0 - 1e-12, spread=SPREAD), name, "v_prediction")
    end = ddim(
        model.conditional({"label": torch.zeros(1)}),
        torch.zeros(1, 1),  # the flow is affine: the mean of the noise goes to the mean
        schedule=SCHEDULES[name],
        prediction_type="v_prediction",
        num_inference_steps=steps,
    )
    return float(end) / PIXELS**0.5


def test_sampling_from_pure_noise_greys_pictures_on_stable_diffusions_betas() -> None:
    """The flow keeps distances in units of the spread: begun at 0 instead of alpha mu, it ends at mu (1 − s alpha/√V).

    With these numbers brightness 0.5 comes out as 0.13; with zero terminal SNR it comes out as 0.5.
    """
    spread, alpha = PIXELS**0.5 * SPREAD, STABLE_DIFFUSION.last_alpha
    kept = 1 - spread * alpha / (alpha**2 * spread**2 + 1 - alpha**2) ** 0.5
    assert kept == pytest.approx(0.262, abs=1e-3)
    assert _mean_brightness("stable diffusion", steps=1000) == pytest.approx(kept * BRIGHTNESS, abs=0.01)
    assert _mean_brightness("zero terminal snr", steps=1000) == pytest.approx(0.5, abs=0.01)


def test_the_switch_does_not_mend_that_a_student_is_as_grey_as_its_teacher() -> None:
    """Its target is where the teacher goes from that noise, so a student without error repeats the teacher's end."""
    name = "stable diffusion"
    teacher = denoiser(Brightness(name, bright=1.0 - 1e-12, spread=SPREAD), name, "v_prediction")
    objective = ProgressiveObjective(
        teacher, num_inference_steps=1, teacher_steps=100, w_min=0, w_max=0, pure_noise_at_end=True
    )
    line = _fit(objective, mean=PIXELS**0.5 * BRIGHTNESS, spread=PIXELS**0.5 * SPREAD)
    alpha, sigma = (float(value) for value in STABLE_DIFFUSION.alpha_sigma(torch.tensor([999]), ndim=1))
    of_student = -sigma * float(line.offset.detach()) / PIXELS**0.5  # x̂ = alpha z − sigma v at z = 0
    assert alpha > 0.06
    assert of_student == pytest.approx(_mean_brightness(name, steps=100), abs=1e-3)


class Line(nn.Module):
    """A student of too little capacity: v = slope · z + offset."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.offset = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, z: Tensor, told: Tensor, label: Tensor, w_embedding: Tensor | None) -> Tensor:
        return self.slope * z + self.offset


def _fit(objective: ProgressiveObjective, *, mean: float, spread: float, signs: bool = False) -> Line:
    """Return the line of least loss over 2000 rows (the loss is a square: one Newton step each is enough)."""
    line, count = Line(), 2000
    generator = torch.Generator().manual_seed(0)
    x = mean + spread * torch.randn(count, 1, generator=generator)
    if signs:
        x = x * torch.sign(torch.randn(count, 1, generator=generator))
    batch = {"latent_mean": x, "latent_std": torch.zeros(count, 1), "label": torch.zeros(count)}
    optimiser = torch.optim.LBFGS(line.parameters(), max_iter=20)

    def loss() -> Tensor:
        optimiser.zero_grad()
        value, _ = objective.loss(line, batch, RowRandom(seed=1, step=0, rows=range(count)))
        value.backward()
        return value

    optimiser.step(loss)  # type: ignore[arg-type]
    return line


def test_what_it_does_is_to_fit_a_student_where_sampling_begins() -> None:
    """Pictures that are bright or dark, and a student too small to follow its teacher everywhere: it is best where it
    was trained. On noised data it minds states that sampling never begins with."""
    name = "stable diffusion"
    teacher = denoiser(Brightness(name, bright=0.5, spread=0.0), name, "v_prediction")
    z = torch.randn(4000, 1, generator=torch.Generator().manual_seed(5))
    error: dict[bool, float] = {}
    for switch in (False, True):
        objective = ProgressiveObjective(
            teacher, num_inference_steps=1, teacher_steps=50, w_min=0, w_max=0, pure_noise_at_end=switch
        )
        line = _fit(objective, mean=PIXELS**0.5 * BRIGHTNESS, spread=0.0, signs=True)
        label = {"label": torch.zeros(len(z))}
        common: dict[str, Any] = {"schedule": STABLE_DIFFUSION, "prediction_type": "v_prediction"}
        of_teacher = ddim(teacher.conditional(label), z, num_inference_steps=50, **common)
        of_student = ddim(lambda z, time, line=line: line(z, time, z, None), z, num_inference_steps=1, **common)
        error[switch] = float((of_student - of_teacher).square().mean() / of_teacher.square().mean())
    assert error[True] < 0.9 * error[False]


@pytest.mark.parametrize(("weight", "share"), [("snr", 2.06e-9), ("min_snr", 2.06e-9), ("truncated_snr", 1.0)])
def test_on_the_cosine_schedule_plain_snr_teaches_a_one_step_student_nothing(weight: Any, share: float) -> None:
    """At t = 1 the SNR is e^−20: the only time of a one-step student, and all of its gradient."""
    teacher = field_denoiser("cosine", "v_prediction", w_input=True)

    def gradient(loss_weight: Any) -> float:
        objective = ProgressiveObjective(teacher, num_inference_steps=1, w_min=0, w_max=4, loss_weight=loss_weight)
        line = Line()
        loss, _ = objective.loss(line, rows(16), RowRandom(seed=0, step=0, rows=range(16)))
        loss.backward()
        assert line.offset.grad is not None
        assert line.slope.grad is not None
        return float(torch.cat([line.offset.grad, line.slope.grad]).norm())

    plain = gradient("snr_plus_one")
    assert plain > 0.1
    assert gradient(weight) / plain == pytest.approx(share, rel=1e-2)
    assert CosineSchedule().snr(torch.ones(1, dtype=torch.float64)).item() == pytest.approx(2.06e-9, rel=1e-2)

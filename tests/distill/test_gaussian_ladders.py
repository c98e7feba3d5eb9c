"""Ladders on Gaussian data, where every rung can be fitted without error and every variance is known."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from distill.fields import SCHEDULES, denoiser, w_of
from distill.gaussian import MEAN, OF_CLASS, OF_NONE, VARIANCE, Fitted, Gaussian, W, ladder, moments, rung
from fewstep.diffusion import CosineSchedule, ddim, ddim_encode, guide, interval_weight
from fewstep.diffusion.samplers import Model
from fewstep.models.student import StudentKind

COSINE = CosineSchedule()


@pytest.fixture(scope="module")
def ladders() -> dict[str, dict[int, Fitted]]:
    """Students from a teacher of 4096 steps down to one, of each kind."""
    kinds: tuple[StudentKind, ...] = ("deterministic", "stochastic", "encoder")
    return {kind: ladder(COSINE, kind, first=4096)[0] for kind in kinds}


def test_the_guided_pair_of_two_gaussians_is_a_gaussian() -> None:
    z, time = torch.linspace(-2, 2, 8, dtype=torch.float64)[:, None], COSINE.times(7)
    guided = guide(Gaussian(COSINE, OF_CLASS)(z, time), Gaussian(COSINE, OF_NONE)(z, time), W)
    torch.testing.assert_close(guided, Gaussian(COSINE, MEAN)(z, time), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["cosine", "stable diffusion", "zero terminal snr"])
@pytest.mark.parametrize("kind", ["deterministic", "stochastic", "encoder"])
def test_every_rung_makes_its_teachers_jumps(kind: StudentKind, name: str) -> None:
    schedule = SCHEDULES[name]
    _, apart = ladder(schedule, kind, first=512)
    assert apart < 1e-6
    _, apart = ladder(schedule, kind, first=729 if name == "cosine" else 243, factor=3)
    assert apart < 1e-6


def test_deterministic_students_have_the_whole_variance_where_ddim_has_lost_it(
    ladders: dict[str, dict[int, Fitted]],
) -> None:
    lost = {1: 0.000, 2: 0.053, 4: 0.139, 8: 0.207, 16: 0.249, 64: 0.287, 1024: 0.299}
    for steps, variance in lost.items():
        mean, of_ddim = moments(Gaussian(COSINE), COSINE, steps, sampler="ddim")
        assert of_ddim == pytest.approx(variance, abs=1e-3)
        assert mean == pytest.approx(MEAN, abs=1e-3)
        mean, of_student = moments(ladders["deterministic"][steps], COSINE, steps, sampler="ddim")
        assert of_student == pytest.approx(VARIANCE, abs=3e-4)
        assert mean == pytest.approx(MEAN, abs=1e-3)


def test_all_rungs_end_where_the_first_teacher_does(ladders: dict[str, dict[int, Fitted]]) -> None:
    z = torch.tensor([[-1.5], [0.0], [2.0]])

    def sample(model: Model, steps: int) -> Tensor:
        return ddim(model, z, schedule=COSINE, prediction_type="v_prediction", num_inference_steps=steps)

    first = sample(Gaussian(COSINE), 4096)
    for steps in (64, 16, 8, 4, 2, 1):
        student = ladders["deterministic"][steps]
        # 4096 steps in float32 leave some rounding.
        torch.testing.assert_close(sample(student, steps), first, rtol=0, atol=3e-4)


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_stochastic_students_have_the_whole_variance_in_their_own_sampler(
    ladders: dict[str, dict[int, Fitted]], steps: int
) -> None:
    mean, variance = moments(ladders["stochastic"][steps], COSINE, steps, sampler="stochastic")
    assert 0.299 <= variance <= 0.300
    assert mean == pytest.approx(MEAN, abs=1e-3)


def test_the_stochastic_chain_composes_down_to_one_step(ladders: dict[str, dict[int, Fitted]]) -> None:
    """At N = 1 both samplers are one; the last stochastic rung copies the jump 1 → 0 of the rung of two steps."""
    of_two, of_one = ladders["stochastic"][2], ladders["stochastic"][1]
    torch.testing.assert_close(of_one.outputs[-1], of_two.outputs[-1], rtol=0, atol=1e-6)
    for sampler in ("ddim", "stochastic"):
        assert moments(of_one, COSINE, 1, sampler=sampler)[1] == pytest.approx(0.2995, abs=5e-4)


def test_a_stochastic_student_jumps_twice_as_far_except_from_its_last_time(
    ladders: dict[str, dict[int, Fitted]],
) -> None:
    """Held against the exact flow: from i/N to (i − 2)/N for i >= 2, from 1/N to the clean end for i = 1."""
    student, steps = ladders["stochastic"][4], 4
    phi = COSINE.angle(COSINE.times(steps))
    z = torch.tensor([[-1.0], [2.0]], dtype=torch.float64)
    for i in range(1, steps + 1):
        k = max(i - 2, 0)
        v = student(z, COSINE.times(steps)[[i, i]])
        turn = phi[i] - phi[k]
        landed = turn.cos() * z - turn.sin() * v
        exact = Gaussian(COSINE).flow(z, phi[i].cos(), phi[i].sin(), phi[k].cos(), phi[k].sin())
        torch.testing.assert_close(landed, exact, rtol=0, atol=2e-3)


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_each_network_is_for_its_own_sampler(ladders: dict[str, dict[int, Fitted]], steps: int) -> None:
    """The deterministic students jump too short in the stochastic sampler, the others too far in the plain one."""

    def loss_of_variance(network: StudentKind, sampler: str) -> float:
        return abs(moments(ladders[network][steps], COSINE, steps, sampler=sampler)[1] - VARIANCE)

    own = loss_of_variance("deterministic", "ddim"), loss_of_variance("stochastic", "stochastic")
    strange = loss_of_variance("deterministic", "stochastic"), loss_of_variance("stochastic", "ddim")
    assert max(own) < 1e-3
    assert min(strange) > 0.06


@pytest.mark.parametrize("factors", [(1024, 256, 32, 4, 1), (1024, 128, 1), (1024, 1)])
def test_longer_jumps_skip_rungs_without_loss(factors: tuple[int, ...]) -> None:
    teacher: Model = Gaussian(COSINE)
    for before, steps in pairwise(factors):
        teacher, apart = rung(teacher, COSINE, "deterministic", steps, teacher_steps=before)
        assert apart < 1e-6
    assert moments(teacher, COSINE, 1, sampler="ddim")[1] == pytest.approx(
        moments(Gaussian(COSINE), COSINE, 1024, sampler="ddim")[1], abs=1e-5
    )


@pytest.mark.parametrize("steps", [1, 2, 16])
def test_encoder_students_turn_data_into_standard_noise(ladders: dict[str, dict[int, Fitted]], steps: int) -> None:
    x = torch.tensor([[0.0], [1.0]])
    at_zero, at_one = ddim_encode(
        ladders["encoder"][steps],
        x,
        schedule=COSINE,
        prediction_type="v_prediction",
        num_inference_steps=steps,
    ).flatten()
    gain = float(at_one - at_zero)
    assert gain**2 * VARIANCE == pytest.approx(1, abs=1.5e-3)
    assert float(at_zero) + MEAN * gain == pytest.approx(0, abs=2e-4)


@pytest.mark.parametrize("steps", [1, 2, 16])
def test_there_and_back_with_students_is_exact_and_with_ddim_is_not(
    ladders: dict[str, dict[int, Fitted]], steps: int
) -> None:
    x = torch.tensor([[-0.5], [1.0], [2.0]])

    def error(encoder: Model, decoder: Model) -> float:
        noise = ddim_encode(encoder, x, schedule=COSINE, prediction_type="v_prediction", num_inference_steps=steps)
        back = ddim(decoder, noise, schedule=COSINE, prediction_type="v_prediction", num_inference_steps=steps)
        return float((back - x).abs().max())

    students = error(ladders["encoder"][steps], ladders["deterministic"][steps])
    assert students < 2e-3
    assert error(Gaussian(COSINE), Gaussian(COSINE)) > 50 * students


@pytest.mark.parametrize("name", ["cosine", "zero terminal snr"])
def test_ddim_there_and_back_has_an_error_of_first_order(name: str) -> None:
    schedule, x = SCHEDULES[name], torch.tensor([[-0.5], [2.0]])
    model = Gaussian(schedule)

    def error(steps: int) -> float:
        common: dict[str, Any] = {"schedule": schedule, "prediction_type": "v_prediction", "num_inference_steps": steps}
        noise = ddim_encode(model, x, **common)
        return float((ddim(model, noise, **common) - x).abs().max())

    errors = [error(steps) for steps in (50, 100, 200)]
    assert errors[0] < 0.2
    for coarse, fine in pairwise(errors):
        assert 1.7 < coarse / fine < 2.3


def test_style_transfer_between_two_gaussians_moves_the_mean_and_keeps_the_place(
    ladders: dict[str, dict[int, Fitted]],
) -> None:
    """Encode with one class, decode with another of the same spread: what was one deviation above stays so."""
    other = 3.0
    teacher: Model = Gaussian(COSINE, other)
    decoder, _ = rung(teacher, COSINE, "deterministic", 16, teacher_steps=4096)
    x = MEAN + VARIANCE**0.5 * torch.tensor([[-1.0], [0.0], [1.0]])
    common: dict[str, Any] = {"schedule": COSINE, "prediction_type": "v_prediction", "num_inference_steps": 16}
    noise = ddim_encode(ladders["encoder"][16], x, **common)
    torch.testing.assert_close(noise, torch.tensor([[-1.0], [0.0], [1.0]]), rtol=0, atol=2e-3)
    moved = ddim(decoder, noise, **common)
    torch.testing.assert_close(moved, x + other - MEAN, rtol=0, atol=2e-3)


@pytest.mark.parametrize("steps_to_run", [1, 2, 3, 4])
def test_image_to_image_keeps_less_of_the_picture_the_earlier_it_starts(
    ladders: dict[str, dict[int, Fitted]], steps_to_run: int
) -> None:
    """A picture noised to K/4 and decoded by the student's last K steps: what stays of it is known."""
    x, eps = torch.tensor([[0.0], [1.0], [0.0]]), torch.tensor([[0.0], [0.0], [1.0]])
    time = COSINE.times(4)[steps_to_run].expand(3)
    end = ddim(
        ladders["deterministic"][4],
        COSINE.noise(x, eps, time),
        schedule=COSINE,
        prediction_type="v_prediction",
        num_inference_steps=4,
        steps_to_run=steps_to_run,
    ).flatten()
    of_picture, of_noise = float(end[1] - end[0]), float(end[2] - end[0])
    phi = COSINE.angle(time[:1])
    alpha, sigma = float(phi.cos()), float(phi.sin())
    gain = (VARIANCE / (alpha**2 * VARIANCE + sigma**2)) ** 0.5
    assert of_picture == pytest.approx(gain * alpha, abs=2e-3)
    assert of_noise == pytest.approx(gain * sigma, abs=2e-3)
    # Whatever the start, data of the right kind keep their spread.
    assert of_picture**2 * VARIANCE + of_noise**2 == pytest.approx(VARIANCE, abs=2e-3)


@pytest.mark.parametrize(("steps", "quarter"), [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 3)])
def test_students_with_extra_start_times_begin_there(
    ladders: dict[str, dict[int, Fitted]], steps: int, quarter: int
) -> None:
    """From a state at j/4 to the clean end, as the exact flow: 3/4 in two jumps of the 2-step student, 1/2 and 1/4."""
    of_two, _ = rung(ladders["deterministic"][4], COSINE, "deterministic", 2, teacher_steps=4, start_times=4)
    of_one, _ = rung(of_two, COSINE, "deterministic", 1, teacher_steps=2, start_times=4)
    calls: list[float] = []

    def model(z: Tensor, time: Tensor) -> Tensor:
        calls.append(float(time[0]))
        return (of_one if steps == 1 else of_two)(z, time)

    z = torch.tensor([[-1.0], [2.0]])
    end = ddim(
        model,
        z,
        schedule=COSINE,
        prediction_type="v_prediction",
        num_inference_steps=steps,
        start=Fraction(quarter, 4),
    )
    phi = COSINE.angle(torch.tensor([quarter / 4, 0.0], dtype=torch.float64))
    exact = Gaussian(COSINE).flow(z.double(), phi[0].cos(), phi[0].sin(), phi[1].cos(), phi[1].sin())
    torch.testing.assert_close(end.double(), exact, rtol=0, atol=2e-3)
    assert calls == [quarter / 4, *([0.25] if (steps, quarter) == (2, 3) else [])]


def test_guidance_in_an_interval_of_time_reaches_a_w_conditioned_network() -> None:
    """Two Gaussians; guidance only in the first half of the time leaves a mean between the guided and the plain."""

    class Conditioned(torch.nn.Module):
        config: ClassVar = {"time_cond_proj_dim": 256}
        dtype: ClassVar = torch.float32

        def forward(self, z: Tensor, told: Tensor, label: Tensor, w_embedding: Tensor) -> Tensor:
            w = w_of(w_embedding)[:, None]
            time = COSINE.time_of_network(told)
            return Gaussian(COSINE, OF_CLASS)(z, time) * (1 + w) - Gaussian(COSINE, OF_NONE)(z, time) * w

    model = denoiser(Conditioned(), "cosine", "v_prediction")
    label = {"label": torch.zeros(1)}

    def mean(w: Any) -> float:
        end = ddim(
            model.conditional(label, w),
            torch.zeros(1, 1),
            schedule=COSINE,
            prediction_type="v_prediction",
            num_inference_steps=256,
        )
        return float(end)

    assert mean(W) == pytest.approx(MEAN, abs=5e-3)
    assert mean(0.0) == pytest.approx(OF_CLASS, abs=5e-3)
    assert mean(interval_weight(W, 0, 1)) == mean(W)
    early, late = mean(interval_weight(W, 0.5, 1)), mean(interval_weight(W, 0, 0.5))
    # The two halves share the guidance out between them.
    assert min(early, late) > OF_CLASS + 0.05
    assert early + late - 2 * OF_CLASS == pytest.approx(MEAN - OF_CLASS, abs=0.05)
    assert mean(interval_weight(0.0, 0.5, 1, outside=W)) == pytest.approx(late, abs=5e-3)

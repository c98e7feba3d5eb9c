"""Stage two: two steps of the teacher become one of the student."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion import RowRandom, ddim, step_indices
from fewstep.distill import ProgressiveObjective
from fewstep.distill.objective import Batch
from fewstep.errors import ModelError
from fewstep.models import TextToImageParts, initial_noise, make_student
from tiny import tiny_teacher


def _objective(teacher: TextToImageParts, w_teacher: Any, steps: int, **changes: Any) -> ProgressiveObjective:
    return ProgressiveObjective(
        teacher.denoiser().with_network(w_teacher),
        num_inference_steps=steps,
        w_min=0.5,
        w_max=4.0,
        **changes,
    )


def _random(step: int = 0) -> RowRandom:
    return RowRandom(seed=0, step=step, rows=range(4))


class Oracle(nn.Module):
    """A student that takes its teacher's two steps itself; Salimans & Ho's x target, turned into v."""

    def __init__(self, teacher: TextToImageParts, w_teacher: nn.Module, steps: int) -> None:
        super().__init__()
        self.unet, self.schedule, self.steps = w_teacher, teacher.schedule, steps

    def forward(
        self, z: Tensor, index: Tensor, text: Tensor, *, timestep_cond: Tensor, return_dict: bool
    ) -> tuple[Tensor]:
        grid = torch.tensor(step_indices(2 * self.steps))
        place = (grid[None, :] == index[:, None]).int().argmax(dim=1)
        state = z
        for step in range(2):
            (a, b), (c, d) = (self.schedule.alpha_sigma(grid[place + step + k]) for k in (0, 1))
            v = self.unet(state, grid[place + step], text, timestep_cond=timestep_cond).sample
            state = c * (a * state - b * v) + d * (b * state + a * v)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (self.schedule.alpha_sigma(grid[place + k]) for k in (0, 2))
        ratio = sigma_s / sigma_t
        x = (state - ratio * z) / (alpha_s - ratio * alpha_t)
        return ((alpha_t * z - x) / sigma_t,)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_teacher_runs_twice_the_student_once_on_the_grid(
    teacher: TextToImageParts, w_teacher: Any, batch: Batch, watch: Callable[[nn.Module], Any], steps: int
) -> None:
    objective = _objective(teacher, w_teacher, steps)
    of_teacher, of_student = watch(objective.teacher), watch(objective.network)
    grid = step_indices(2 * steps)
    seen = set()
    for update in range(6):
        with torch.no_grad():
            objective.loss(objective.network, batch, _random(update))
        assert (len(of_teacher), len(of_student)) == (2 * update + 2, update + 1)
        first, second, only = of_teacher.args[-2], of_teacher.args[-1], of_student.args[-1]
        assert torch.equal(first[0], only[0])
        assert torch.equal(first[1], only[1])
        for t, m in zip(first[1].tolist(), second[1].tolist(), strict=True):
            assert t in step_indices(steps)[:-1]
            assert m == grid[grid.index(t) + 1]
            seen.add(t)
        assert torch.equal(of_teacher.kwargs[-1]["timestep_cond"], of_student.kwargs[-1]["timestep_cond"])
    if steps <= 4:
        assert seen == set(step_indices(steps)[:-1]), "24 rows reach every time of so short a grid"


def test_only_the_student_gets_gradients(teacher: TextToImageParts, w_teacher: Any, batch: Batch) -> None:
    objective = _objective(teacher, w_teacher, 4)
    loss, figures = objective.loss(objective.network, batch, _random())
    loss.backward()
    assert all(parameter.grad is None for parameter in objective.teacher.parameters())
    assert not objective.teacher.training
    assert any(parameter.grad is not None for parameter in objective.network.parameters())
    assert not any(value.requires_grad for value in figures.values())


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_the_oracle_has_no_loss_and_the_untrained_copy_has(
    teacher: TextToImageParts, w_teacher: Any, batch: Batch, steps: int
) -> None:
    objective = _objective(teacher, w_teacher, steps)
    with torch.no_grad():
        oracle, _ = objective.loss(Oracle(teacher, objective.teacher, steps), batch, _random())
        fresh, _ = objective.loss(objective.network, batch, _random())
    assert float(fresh) > 1e-5
    assert float(oracle) < 1e-6 * float(fresh)


def test_a_student_without_loss_samples_like_its_teacher(teacher: TextToImageParts, w_teacher: Any) -> None:
    text = teacher.encode_prompts(["a red apple", "two birds on blue"])
    embedding = torch.randn(2, 16)
    w_teacher = w_teacher.eval()
    oracle = Oracle(teacher, w_teacher, 4)
    common: dict[str, Any] = {"schedule": teacher.schedule, "prediction_type": "v_prediction"}
    noise = initial_noise([1, 2], (4, 4, 4))
    by_teacher = ddim(
        lambda z, index: w_teacher(z, index, text, timestep_cond=embedding).sample,
        noise,
        num_inference_steps=8,
        **common,
    )
    by_student = ddim(
        lambda z, index: oracle(z, index, text, timestep_cond=embedding, return_dict=False)[0],
        noise,
        num_inference_steps=4,
        **common,
    )
    torch.testing.assert_close(by_student, by_teacher, rtol=0, atol=1e-4)


def test_updates_reduce_the_loss(
    teacher: TextToImageParts, w_teacher: Any, batch: Batch, loss_after: Callable[..., tuple[float, float]]
) -> None:
    before, after = loss_after(_objective(teacher, w_teacher, 2), batch, _random, updates=12, learning_rate=1e-3)
    assert after < 0.7 * before


def test_the_student_begins_as_its_teacher(teacher: TextToImageParts, w_teacher: Any) -> None:
    objective = _objective(teacher, w_teacher, 4)
    for name, parameter in objective.network.named_parameters():
        assert torch.equal(parameter, objective.teacher.get_parameter(name))
        assert parameter.requires_grad


def test_eps_at_zero_terminal_snr_is_refused() -> None:
    teacher = tiny_teacher(prediction_type="epsilon")
    with pytest.raises(ModelError, match="prediction_type=epsilon cannot be used"):
        _objective(teacher, make_student(teacher.unet, embedding_dim=16), 4)

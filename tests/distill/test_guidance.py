"""Stage one: what is compared with what, and how often each network runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion import RowRandom, guide
from fewstep.distill import GuidanceObjective, guided_relative_error
from fewstep.distill.objective import Batch
from fewstep.errors import ModelError
from fewstep.models import TextToImageParts, guidance_embedding, make_student
from tiny import tiny_teacher


def _objective(teacher: TextToImageParts, **changes: Any) -> GuidanceObjective:
    settings: dict[str, Any] = {"w_min": 0.5, "w_max": 4.0, "embedding_dim": 16, **changes}
    return GuidanceObjective(teacher.denoiser(), **settings)


def _random(step: int = 0, rows: int = 4) -> RowRandom:
    return RowRandom(seed=0, step=step, rows=range(rows))


class Oracle(nn.Module):
    """A student that knows the guided pair; it reads w from the slowest sine of its embedding, sin(0.1 w)."""

    def __init__(self, teacher: TextToImageParts) -> None:
        super().__init__()
        self.unet, self.null = teacher.unet, teacher.encode_prompts([""])

    def forward(
        self, z: Tensor, index: Tensor, text: Tensor, *, timestep_cond: Tensor, return_dict: bool
    ) -> tuple[Tensor]:
        w = 10 * timestep_cond[:, timestep_cond.shape[1] // 2 - 1].asin()
        conditional = self.unet(z, index, text).sample
        unconditional = self.unet(z, index, self.null.expand_as(text)).sample
        return (guide(conditional, unconditional, w),)


def test_both_branches_are_one_call_of_the_teacher_and_the_student_is_called_once(
    teacher: TextToImageParts, null_embedding: Tensor, batch: Batch, watch: Callable[[nn.Module], Any]
) -> None:
    objective = _objective(teacher)
    of_teacher, of_student = watch(objective.teacher), watch(objective.network)
    loss, _ = objective.loss(objective.network, batch, _random())
    loss.backward()
    assert [len(args[0]) for args in of_teacher.args] == [8]
    assert [len(args[0]) for args in of_student.args] == [4]
    z, index, text = of_student.args[0]
    assert torch.equal(of_teacher.args[0][0], torch.cat([z, z]))
    assert torch.equal(of_teacher.args[0][1], torch.cat([index, index]))
    assert torch.equal(of_teacher.args[0][2][:4], text)
    assert torch.equal(of_teacher.args[0][2][4:], null_embedding.expand(4, -1, -1))
    assert len({tuple(row) for row in of_student.kwargs[0]["timestep_cond"].tolist()}) == 4, "one w for each row"


def test_only_the_student_gets_gradients(teacher: TextToImageParts, batch: Batch) -> None:
    objective = _objective(teacher)
    before = {name: value.clone() for name, value in teacher.unet.state_dict().items()}
    loss, figures = objective.loss(objective.network, batch, _random())
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.unet.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.unet.state_dict().items())
    assert not any(value.requires_grad for value in figures.values())
    # The new input starts at zero but not stuck: its gradient is there from the first update on.
    new: Any = objective.network
    assert float(new.time_embedding.cond_proj.weight.grad.abs().max()) > 0


def test_the_oracle_has_no_loss_and_the_new_student_has(teacher: TextToImageParts, batch: Batch) -> None:
    objective = _objective(teacher)
    with torch.no_grad():
        oracle, figures = objective.loss(Oracle(teacher), batch, _random())
        fresh, _ = objective.loss(objective.network, batch, _random())
    assert float(fresh) > 1e-6
    assert float(oracle) < 1e-6 * float(fresh)
    assert float(figures["relative_error"]) < 1e-3


def test_with_w_zero_the_target_is_the_conditional_teacher(teacher: TextToImageParts, batch: Batch) -> None:
    objective = _objective(teacher, w_min=0.0, w_max=1e-9)
    with torch.no_grad():
        loss, figures = objective.loss(objective.network, batch, _random())
    assert float(loss) < 1e-10
    assert float(figures["relative_error"]) < 1e-5


def test_rows_are_independent_of_how_they_are_shared_out(teacher: TextToImageParts, batch: Batch) -> None:
    objective = _objective(teacher)
    with torch.no_grad():
        whole, _ = objective.loss(objective.network, batch, _random())
        parts = [
            objective.loss(
                objective.network,
                {name: value[rows] for name, value in batch.items()},
                RowRandom(seed=0, step=0, rows=rows),
            )[0]
            for rows in ([0, 2], [3, 1])
        ]
    torch.testing.assert_close(sum(parts) / 2, whole, rtol=1e-5, atol=0)


def test_updates_reduce_the_loss(
    teacher: TextToImageParts, batch: Batch, loss_after: Callable[..., tuple[float, float]]
) -> None:
    objective = _objective(teacher)
    before, after = loss_after(objective, batch, _random, updates=12, learning_rate=1e-3)
    assert after < 0.7 * before


def test_eps_at_zero_terminal_snr_is_refused() -> None:
    teacher = tiny_teacher(prediction_type="epsilon")
    with pytest.raises(ModelError, match="prediction_type=epsilon cannot be used on a schedule that ends at alpha = 0"):
        _objective(teacher)
    _objective(tiny_teacher(prediction_type="epsilon", rescale_betas_zero_snr=False))


def _error(teacher: TextToImageParts, student: Any, batch: Batch, weights: list[float]) -> dict[float, float]:
    model = teacher.denoiser()
    return guided_relative_error(model, model.with_network(student), [batch, batch], weights=weights, seed=3).by_w


def test_relative_error_of_a_new_student_is_zero_at_w_zero_only(teacher: TextToImageParts, batch: Batch) -> None:
    errors = _error(teacher, make_student(teacher.unet, embedding_dim=16), batch, [0.0, 2.0, 4.0])
    assert errors[0.0] < 1e-5
    assert 1e-4 < errors[2.0] < errors[4.0]


def test_relative_error_of_a_scaled_output_is_the_scale(teacher: TextToImageParts, batch: Batch) -> None:
    student = make_student(teacher.unet, embedding_dim=16)
    with torch.no_grad():
        student.conv_out.weight.mul_(1.1)
        student.conv_out.bias.mul_(1.1)
    assert _error(teacher, student, batch, [0.0])[0.0] == pytest.approx(0.1, rel=1e-3)


def test_relative_error_by_time_holds_the_same_rows(teacher: TextToImageParts, batch: Batch) -> None:
    """A student that is right below the middle of the times has all its error above it."""
    right, wrong = Oracle(teacher), make_student(teacher.unet, embedding_dim=256)

    class Half(nn.Module):
        config: ClassVar = {"time_cond_proj_dim": 256}
        dtype: ClassVar = torch.float32

        def forward(
            self, z: Tensor, index: Tensor, text: Tensor, *, timestep_cond: Tensor, return_dict: bool
        ) -> tuple[Tensor]:
            good = right(z, index, text, timestep_cond=timestep_cond, return_dict=False)[0]
            bad = wrong(z, index, text, timestep_cond=timestep_cond).sample
            return (torch.where((index < 500)[:, None, None, None], good, bad),)

    model = teacher.denoiser()
    errors = guided_relative_error(model, model.with_network(Half()), [batch] * 8, weights=[1.0, 3.0], seed=3)
    assert list(errors.by_time) == ["0-249", "250-499", "500-749", "750-999"]
    assert errors.by_time["0-249"] < 1e-3
    assert errors.by_time["250-499"] < 1e-3
    assert min(errors.by_time["500-749"], errors.by_time["750-999"]) > 0.9 * errors.mean
    assert errors.mean == pytest.approx((errors.by_w[1.0] + errors.by_w[3.0]) / 2)


@pytest.mark.parametrize("kind", ["epsilon", "sample"])
def test_relative_error_is_one_of_v_for_every_prediction_type(kind: str, batch: Batch) -> None:
    """‖Δv‖² = ‖Δeps‖²/alpha² = ‖Δx‖²/sigma², checked against the sums written out for one batch and one weight."""
    teacher = tiny_teacher(prediction_type=kind, rescale_betas_zero_snr=False)
    student = make_student(teacher.unet, embedding_dim=16)
    batch = {**batch, "latent_std": torch.zeros(4, 4, 4, 4)}
    w = 3.0
    model = teacher.denoiser()
    got = guided_relative_error(model, model.with_network(student), [batch], weights=[w], seed=3).by_w[w]

    random = RowRandom(seed=3, step=0, rows=range(4))
    random.normal(4, 4, 4)  # the posterior's draw, of no effect here
    index = random.integers(0, 1000)
    alpha, sigma = teacher.schedule.alpha_sigma(index)
    z = alpha * batch["latent_mean"] + sigma * random.normal(4, 4, 4)
    with torch.no_grad():
        null = teacher.encode_prompts([""]).expand(4, -1, -1)
        cond = teacher.unet(z, index, batch["text"]).sample
        target = cond + w * (cond - teacher.unet(z, index, null).sample)
        embedding = guidance_embedding(torch.full((4,), w), 16)
        output = student(z, index, batch["text"], timestep_cond=embedding).sample

    def v(o: Tensor) -> Tensor:
        x = o if kind == "sample" else (z - sigma * o) / alpha
        eps = o if kind == "epsilon" else (z - alpha * o) / sigma
        return alpha * eps - sigma * x

    expected = float((v(output) - v(target)).square().sum().sqrt() / v(target).square().sum().sqrt())
    assert got == pytest.approx(expected, rel=1e-3)

"""What the rungs of all ladders share: the frozen teacher, the jumps, what is drawn, and how errors become a loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.diffusion.prediction import PredictionType, from_velocity
from fewstep.diffusion.random import RowRandom
from fewstep.distill.clean import draw_clean
from fewstep.distill.errors import ErrorName, as_large_as, row_error
from fewstep.distill.guidance import refuse_epsilon_without_signal
from fewstep.distill.jumps import Jumps
from fewstep.distill.objective import Batch
from fewstep.distill.weights import LossWeight, output_weight
from fewstep.models.denoiser import Condition, Denoiser


@dataclass(frozen=True)
class Drawn:
    """What is drawn for the rows of a batch.

    Attributes:
        x: clean samples, (B, C, h, w).
        eps: noise of the same shape.
        condition: the teacher's, B rows.
        start, end: where each row's jump begins and ends, on the rung's grid, (B,).
        time: the network's time at the start, (B,).
        at_start, at_end: alpha and sigma there, (B, 1, 1, 1) each.
    """

    x: Tensor
    eps: Tensor
    condition: Condition
    start: Tensor
    end: Tensor
    time: Tensor
    at_start: tuple[Tensor, Tensor]
    at_end: tuple[Tensor, Tensor]


class Rung:
    """A frozen teacher and the student that learns its jumps.

    Args:
        teacher: frozen.
        network: the student's network, trained.
        prediction_type: what the student outputs.
        jumps: of the rung.
        w_min, w_max: range of the guidance weight.
        loss_weight: name of omega.
        error: how a row's error is measured.
        denoising_weight: gamma of the denoising loss; see `ProgressiveObjective`.
    """

    def __init__(
        self,
        teacher: Denoiser,
        network: nn.Module,
        *,
        prediction_type: PredictionType,
        jumps: Jumps,
        w_min: float,
        w_max: float,
        loss_weight: LossWeight,
        error: ErrorName,
        denoising_weight: float,
    ) -> None:
        for each in (teacher.prediction_type, prediction_type):
            refuse_epsilon_without_signal(teacher.schedule, each)
        self.of_teacher = teacher
        self.teacher: nn.Module = teacher.network.requires_grad_(False).eval()
        self.network = network
        self.prediction_type: PredictionType = prediction_type
        self.of_student = teacher.with_network(network, prediction_type=prediction_type)
        self.frozen = [self.teacher]
        self.jumps = jumps
        self.w_min, self.w_max = w_min, w_max
        self.loss_weight: LossWeight = loss_weight
        self.error: ErrorName = error
        self.denoising_weight = denoising_weight
        self._times = teacher.schedule.times(jumps.grid_steps)

    def _draw(self, batch: Batch, random: RowRandom) -> Drawn:
        teacher, schedule = self.of_teacher, self.of_teacher.schedule
        x = draw_clean(batch, random)
        eps = random.normal(*x.shape[1:])
        start, end = self.jumps.draw(random.integers(0, len(self.jumps.starts)))
        times = self._times = self._times.to(x.device)
        at_start, at_end = (schedule.alpha_sigma(times[u], ndim=x.ndim) for u in (start, end))
        return Drawn(x, eps, teacher.condition_of(batch), start, end, times[start], at_start, at_end)

    def _compare(self, output: Tensor, target: Tensor, drawn: Drawn) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted error of each row, (B,), and figures."""
        squared = (output - target).detach().square().mean()
        figures = {"output_mse": squared, "relative_error": (squared / target.square().mean()).sqrt()}
        return self._weight(drawn) * row_error(output, target, self.error), figures

    def _add_denoising(
        self, each_row: Tensor, output: Tensor, z: Tensor, drawn: Drawn, figures: dict[str, Tensor]
    ) -> Tensor:
        """Return the rows' errors with the denoising loss of `output` at the same input, scaled to them."""
        if not self.denoising_weight:
            return each_row
        alpha, sigma = drawn.at_start
        # The noise in the state that the network sees, which may be pure where the schedule leaves a trace of x. Near
        # the clean end, where encoders begin, it is the drawn one, and the division would lose it.
        eps = torch.where(sigma > 0.5, (z - alpha * drawn.x) / sigma.clamp_min(0.5), drawn.eps)
        data = from_velocity(alpha * eps - sigma * drawn.x, z, alpha, sigma, self.prediction_type)
        denoising = self._weight(drawn) * row_error(output, data, self.error)
        figures["denoising_loss"] = denoising.detach().mean()
        return each_row + self.denoising_weight * as_large_as(denoising, each_row)

    def _weight(self, drawn: Drawn) -> Tensor:
        return output_weight(self.loss_weight, *drawn.at_start, self.prediction_type).flatten()

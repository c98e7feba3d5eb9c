"""The negative control: distilling the guided pair itself, step by step, without stage one (Meng et al. B.8)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewstep.diffusion.guidance import guide
from fewstep.diffusion.prediction import from_velocity
from fewstep.diffusion.random import RowRandom
from fewstep.distill.clean import draw_clean
from fewstep.distill.errors import ErrorName, as_large_as, row_error
from fewstep.distill.guidance import refuse_epsilon_at_zero_snr
from fewstep.distill.jumps import follow, plan_jumps
from fewstep.distill.objective import Batch
from fewstep.distill.targets import step_target
from fewstep.distill.weights import LossWeight, output_weight
from fewstep.models.denoiser import Denoiser
from fewstep.models.student import copy_unet


class NaiveProgressiveObjective:
    """A rung whose student keeps both branches and is guided like its teacher: Algorithm 5 of the paper.

    The guided output of the student, (1 + w) ô_c − w ô_∅, is trained towards what takes z_t where the guided teacher's
    steps take it. It fails at few steps, which is why stage one exists; it is here to show that.

    With `guided_share` below one the rest of the rows trains the conditional branch alone on the unguided teacher's
    steps: SnapFusion's (Li et al. 2023, eqs. 10 and 11) "CFG-aware" mixture, for a student that keeps its two
    evaluations a step. Theirs is guided_share 0.1, drawn for a whole update where here it is drawn row by row;
    guidance scales 2 … 14, which is w in 1 … 13; and denoising_weight 0.2.

    Args:
        teacher: sampled with classifier-free guidance; frozen.
        num_inference_steps: N of the student.
        w_min, w_max: range of the guidance weight.
        loss_weight: name of omega.
        teacher_steps: steps of the teacher; None: twice the student's.
        error: how a row's error is measured.
        guided_share: probability of a row to be trained under guidance.
        denoising_weight: as in `ProgressiveObjective`; of the conditional branch.
    """

    def __init__(
        self,
        teacher: Denoiser,
        *,
        num_inference_steps: int,
        w_min: float,
        w_max: float,
        loss_weight: LossWeight = "truncated_snr",
        teacher_steps: int | None = None,
        error: ErrorName = "mse",
        guided_share: float = 1.0,
        denoising_weight: float = 0.0,
    ) -> None:
        refuse_epsilon_at_zero_snr(teacher.schedule, teacher.prediction_type)
        self.of_teacher = teacher
        self.teacher: nn.Module = teacher.network.requires_grad_(False).eval()
        self.network: nn.Module = copy_unet(teacher.network)
        self.of_student = teacher.with_network(self.network)
        self.frozen = [self.teacher]
        self.w_min, self.w_max = w_min, w_max
        self.loss_weight: LossWeight = loss_weight
        self.error: ErrorName = error
        self.guided_share = guided_share
        self.denoising_weight = denoising_weight
        self.jumps = plan_jumps("naive", num_inference_steps, teacher_steps=teacher_steps or 2 * num_inference_steps)
        self._times = teacher.schedule.times(self.jumps.grid_steps)

    def loss(self, network: nn.Module, batch: Batch, random: RowRandom) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss over clean samples (see `draw_clean`) and the teacher's condition, B rows each."""
        teacher, schedule = self.of_teacher, self.of_teacher.schedule
        x = draw_clean(batch, random)
        condition = teacher.condition_of(batch)
        eps = random.normal(*x.shape[1:])
        start, end = self.jumps.draw(random.integers(0, len(self.jumps.starts)))
        # w = 0 is the conditional branch alone, for teacher and student alike.
        w = random.uniform(self.w_min, self.w_max) * (random.uniform() < self.guided_share)
        times = self._times = self._times.to(x.device)
        at_start, at_end = (schedule.alpha_sigma(times[u], ndim=x.ndim) for u in (start, end))
        z = schedule.noise(x, eps, times[start])
        z_end = follow(
            teacher.guided(condition, w),
            z,
            start,
            end,
            stride=self.jumps.stride,
            num_jumps=max(self.jumps.teacher_steps),
            together=True,
            times=times,
            schedule=schedule,
            prediction_type=teacher.prediction_type,
        )
        target = step_target(z, z_end, *at_start, *at_end, teacher.prediction_type)
        unconditional = teacher.unconditional(condition)
        both = {name: torch.cat([value, unconditional[name]]) for name, value in condition.items()}
        outputs = self.of_student.call(network, torch.cat([z, z]), times[start].repeat(2), both)
        with_condition, without = outputs.chunk(2)
        output = guide(with_condition, without, w)
        weight = output_weight(self.loss_weight, *at_start, teacher.prediction_type).flatten()
        squared = (output - target).detach().square().mean()
        figures = {"output_mse": squared, "relative_error": (squared / target.square().mean()).sqrt()}
        each_row = weight * row_error(output, target, self.error)
        if self.denoising_weight:
            alpha, sigma = at_start
            data = from_velocity(alpha * eps - sigma * x, z, alpha, sigma, teacher.prediction_type)
            denoising = weight * row_error(with_condition, data, self.error)
            figures["denoising_loss"] = denoising.detach().mean()
            each_row = each_row + self.denoising_weight * as_large_as(denoising, each_row)
        return each_row.mean(), figures

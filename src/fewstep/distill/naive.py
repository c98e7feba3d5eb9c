"""The negative control: distilling the guided pair itself, step by step, without stage one (Meng et al. B.8)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewstep.diffusion.guidance import guide
from fewstep.diffusion.random import RowRandom
from fewstep.distill.errors import ErrorName
from fewstep.distill.jumps import follow, plan_jumps
from fewstep.distill.objective import Batch
from fewstep.distill.rung import Rung
from fewstep.distill.targets import step_target
from fewstep.distill.weights import LossWeight
from fewstep.models.denoiser import Denoiser
from fewstep.models.student import copy_unet


class NaiveProgressiveObjective(Rung):
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
        super().__init__(
            teacher,
            copy_unet(teacher.network),
            prediction_type=teacher.prediction_type,
            jumps=plan_jumps("naive", num_inference_steps, teacher_steps=teacher_steps or 2 * num_inference_steps),
            w_min=w_min,
            w_max=w_max,
            loss_weight=loss_weight,
            error=error,
            denoising_weight=denoising_weight,
        )
        self.guided_share = guided_share

    def loss(self, network: nn.Module, batch: Batch, random: RowRandom) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss over clean samples (see `draw_clean`) and the teacher's condition, B rows each."""
        teacher, schedule = self.of_teacher, self.of_teacher.schedule
        drawn = self._draw(batch, random)
        condition = drawn.condition
        # w = 0 is the conditional branch alone, for teacher and student alike.
        w = random.uniform(self.w_min, self.w_max) * (random.uniform() < self.guided_share)
        z = schedule.noise(drawn.x, drawn.eps, drawn.time)
        z_end = follow(
            teacher.guided(condition, w),
            z,
            drawn.start,
            drawn.end,
            stride=self.jumps.stride,
            num_jumps=max(self.jumps.teacher_steps),
            together=True,
            times=self._times,
            schedule=schedule,
            prediction_type=teacher.prediction_type,
        )
        target = step_target(z, z_end, *drawn.at_start, *drawn.at_end, teacher.prediction_type)
        unconditional = teacher.unconditional(condition)
        both = {name: torch.cat([value, unconditional[name]]) for name, value in condition.items()}
        outputs = self.of_student.call(network, torch.cat([z, z]), drawn.time.repeat(2), both)
        with_condition, without = outputs.chunk(2)
        each_row, figures = self._compare(guide(with_condition, without, w), target, drawn)
        return self._add_denoising(each_row, with_condition, z, drawn, figures).mean(), figures

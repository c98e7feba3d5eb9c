"""Stage two: a student whose one step does what several steps of its teacher do (Meng et al. §3.2, Algorithms 2–4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewstep.diffusion.prediction import PredictionType, ddim_step
from fewstep.diffusion.random import RowRandom
from fewstep.distill.errors import StepErrorName
from fewstep.distill.features import TeacherFeatures
from fewstep.distill.jumps import follow, plan_jumps
from fewstep.distill.objective import Batch
from fewstep.distill.rung import Rung
from fewstep.distill.targets import step_target
from fewstep.distill.weights import LossWeight
from fewstep.errors import ModelError, RecipeError
from fewstep.models.denoiser import Condition, Denoiser
from fewstep.models.student import StudentKind, copy_unet


class ProgressiveObjective(Rung):
    """One rung of the ladder: each jump of the student imitates several smaller ones of its teacher.

    For a deterministic student of N steps from a teacher of 2N: i uniform in 1 … N; t = i/N, m = (i − 0.5)/N,
    s = (i − 1)/N on the shared grid; two teacher DDIM steps t → m → s without gradients, in float32 and unclipped; the
    target is the output that takes the student from z_t to z_s at once. `plan_jumps` has the jumps of other kinds.

    Args:
        teacher: network of `teacher_steps` steps (for the first rung, stage one's); frozen.
        num_inference_steps: N of the student.
        w_min, w_max: range of the guidance weight.
        loss_weight: name of omega; the paper uses "truncated_snr".
        kind: of the student.
        teacher_steps: steps of the teacher; None: twice the student's.
        start_times: M, for a student that may also start at the times j/M.
        error: how a row's error is measured; "features" is the mse, and `TeacherFeatures` of where the step leads.
        feature_weight: factor on the distance in features, which the loss weight leaves alone.
        prediction_type: what the student outputs; None: what the teacher does.
        pure_noise_at_end: what the network sees at the noisiest time; see `NoiseSchedule.noise`.
        trajectory_inputs: train on states of the teacher's own sampler, from pure noise, instead of on noised data
            (Habibian et al. 2024, Clockwork Diffusion; Perez Jensen & Sadat 2025, AGD); costs the teacher's steps down
            to the drawn time.
        denoising_weight: gamma of SnapFusion (Li et al. 2023, eq. 11), which adds the ordinary denoising loss on the
            data; they take 0.2. As theirs it is scaled to the size of the step's loss first, as it would drown that
            one (their Fig. 7b); here row by row, so that micro-batches and workers change nothing. It is taken at the
            same input: at the times of the steps, where theirs may be any, and at the drawn w, where it pulls guided
            outputs towards unguided ones. Their students have no w.
        guided_teacher: the teacher takes its steps under classifier-free guidance: the first rung of a student of a
            single w that has no stage one (Meng et al.'s baseline "single-w").
        student: the network to train, such as one with adapters; None: a copy of the teacher's.
    """

    def __init__(
        self,
        teacher: Denoiser,
        *,
        num_inference_steps: int,
        w_min: float,
        w_max: float,
        loss_weight: LossWeight = "truncated_snr",
        kind: StudentKind = "deterministic",
        teacher_steps: int | None = None,
        start_times: int | None = None,
        error: StepErrorName = "mse",
        feature_weight: float = 1.0,
        prediction_type: PredictionType | None = None,
        pure_noise_at_end: bool = False,
        trajectory_inputs: bool = False,
        denoising_weight: float = 0.0,
        guided_teacher: bool = False,
        student: nn.Module | None = None,
    ) -> None:
        outputs: PredictionType = prediction_type or teacher.prediction_type
        for each in (teacher.prediction_type, outputs):
            if kind == "encoder" and each != "v_prediction":
                raise ModelError(
                    f"prediction_type={each} cannot be used for an encoder: near the clean picture an error of x̂ or "
                    "eps-hat would be multiplied by thousands. Convert the teacher to v_prediction first (convert)"
                )
        if trajectory_inputs and kind != "deterministic":
            raise RecipeError(f"trajectory_inputs is for deterministic students; this ladder is {kind}")
        if trajectory_inputs and denoising_weight:
            raise RecipeError(
                f"denoising_weight={denoising_weight:g} cannot be used with trajectory_inputs: a state of the "
                "teacher's own sampler comes from no picture of the data that could be its target. Leave out one"
            )
        super().__init__(
            teacher,
            copy_unet(teacher.network) if student is None else student,
            prediction_type=outputs,
            jumps=plan_jumps(
                kind,
                num_inference_steps,
                teacher_steps=teacher_steps or 2 * num_inference_steps,
                start_times=start_times,
            ),
            w_min=w_min,
            w_max=w_max,
            loss_weight=loss_weight,
            error="mse" if error == "features" else error,
            denoising_weight=denoising_weight,
        )
        self.num_inference_steps = num_inference_steps
        self.features = TeacherFeatures(teacher) if error == "features" else None
        self.feature_weight = feature_weight
        self.pure_noise_at_end = pure_noise_at_end
        self.trajectory_inputs = trajectory_inputs
        self.guided_teacher = guided_teacher

    def loss(self, network: nn.Module, batch: Batch, random: RowRandom) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss over clean samples (see `draw_clean`) and the teacher's condition, B rows each."""
        drawn = self._draw(batch, random)
        condition, start, end = drawn.condition, drawn.start, drawn.end
        w = random.uniform(self.w_min, self.w_max)
        schedule = self.of_teacher.schedule
        z = schedule.noise(drawn.x, drawn.eps, drawn.time, pure_noise_at_end=self.pure_noise_at_end)
        if self.trajectory_inputs:
            top, down = torch.full_like(start, self.jumps.grid_steps), self.jumps.grid_steps // self.jumps.stride
            z = self._follow(drawn.eps, top, start, condition, w, num_jumps=down, together=False)
        each = self.jumps.teacher_steps
        z_end = self._follow(z, start, end, condition, w, num_jumps=max(each), together=len(set(each)) == 1)
        target = step_target(z, z_end, *drawn.at_start, *drawn.at_end, self.prediction_type)
        output = self.of_student.call(network, z, drawn.time, condition, w)
        each_row, figures = self._compare(output, target, drawn)
        if self.features is not None:
            reached = ddim_step(output, z, *drawn.at_start, *drawn.at_end, self.prediction_type)
            distance = self.features.distance(reached, z_end, self._times[end], condition, w)
            figures["feature_distance"] = distance.detach().mean()
            each_row = each_row + self.feature_weight * distance
        return self._add_denoising(each_row, output, z, drawn, figures).mean(), figures

    def _follow(
        self, z: Tensor, start: Tensor, end: Tensor, condition: Condition, w: Tensor, *, num_jumps: int, together: bool
    ) -> Tensor:
        teacher = self.of_teacher
        return follow(
            teacher.guided(condition, w) if self.guided_teacher else teacher.conditional(condition, w),
            z,
            start,
            end,
            stride=self.jumps.stride,
            num_jumps=num_jumps,
            together=together,
            times=self._times,
            schedule=teacher.schedule,
            prediction_type=teacher.prediction_type,
        )

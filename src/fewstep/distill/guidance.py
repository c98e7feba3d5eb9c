"""Stage one: one w-conditioned network that matches the classifier-free-guided pair (Meng et al. §3.1, eq. 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewstep.diffusion.prediction import PredictionType, convert_output
from fewstep.diffusion.random import RowRandom
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.distill.clean import draw_clean
from fewstep.distill.errors import ErrorName, row_error
from fewstep.distill.objective import Batch
from fewstep.distill.weights import LossWeight, output_weight
from fewstep.errors import ModelError
from fewstep.models.denoiser import Denoiser
from fewstep.models.student import make_student


class GuidanceObjective:
    """E[ omega(lambda_t) ||x̂_student(z_t, c, w) − ((1 + w) x̂(z_t, c) − w x̂(z_t, ∅))||² ] (eq. 3).

    One w ~ U[w_min, w_max], one t uniform over the schedule's times and one noise for each row; the inputs are noised
    data. The teacher's two branches run in one batch of 2B without gradients; the student is only ever conditional.
    Guidance commutes with the prediction type, so outputs are compared as they are and the weight is converted.

    Args:
        teacher: sampled with classifier-free guidance; frozen.
        w_min, w_max: range of the guidance weight; guidance_scale is 1 + w. Equal ones make a student of a single w,
            without an input for it (the paper's baseline "single-w").
        embedding_dim: width of the w embedding (`time_cond_proj_dim`).
        loss_weight: name of omega; the paper's "constant" for latent models is "x".
        error: how a row's error is measured.
        prediction_type: what the student outputs; None: what the teacher does.
        pure_noise_at_end: what the network sees at the noisiest time; see `NoiseSchedule.noise`.
        student: the network to train, such as one with adapters; None: a copy of the teacher's, with an input for w
            where there is a range of it.
    """

    def __init__(
        self,
        teacher: Denoiser,
        *,
        w_min: float,
        w_max: float,
        embedding_dim: int = 256,
        loss_weight: LossWeight = "x",
        error: ErrorName = "mse",
        prediction_type: PredictionType | None = None,
        pure_noise_at_end: bool = False,
        student: nn.Module | None = None,
    ) -> None:
        self.prediction_type: PredictionType = prediction_type or teacher.prediction_type
        for kind in (teacher.prediction_type, self.prediction_type):
            refuse_epsilon_without_signal(teacher.schedule, kind)
        self.of_teacher = teacher
        self.teacher: nn.Module = teacher.network.requires_grad_(False).eval()
        if student is None:
            made = make_student(teacher.network, embedding_dim=None if w_min == w_max else embedding_dim)
            student = made.requires_grad_(True)
        self.network: nn.Module = student
        self.of_student = teacher.with_network(student, prediction_type=self.prediction_type)
        self.frozen = [self.teacher]
        self.w_min, self.w_max = w_min, w_max
        self.loss_weight: LossWeight = loss_weight
        self.error: ErrorName = error
        self.pure_noise_at_end = pure_noise_at_end

    def loss(self, network: nn.Module, batch: Batch, random: RowRandom) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss over clean samples (see `draw_clean`) and the teacher's condition, B rows each."""
        schedule = self.of_teacher.schedule
        x = draw_clean(batch, random)
        condition = self.of_teacher.condition_of(batch)
        eps = random.normal(*x.shape[1:])
        time = schedule.random_times(random)
        w = random.uniform(self.w_min, self.w_max)
        alpha, sigma = schedule.alpha_sigma(time, ndim=x.ndim)
        z = schedule.noise(x, eps, time, pure_noise_at_end=self.pure_noise_at_end)
        with torch.no_grad():
            guided = self.of_teacher.guided(condition, w)(z, time)
            target = convert_output(
                guided, z, alpha, sigma, source=self.of_teacher.prediction_type, target=self.prediction_type
            )
        output = self.of_student.call(network, z, time, condition, w)
        error = row_error(output, target, self.error)
        weight = output_weight(self.loss_weight, alpha, sigma, self.prediction_type).flatten()
        squared = (output - target).detach().square().mean()
        relative = (squared / target.square().mean()).sqrt()
        return (weight * error).mean(), {"output_mse": squared, "relative_error": relative}


#: alpha at the last time below which eps cannot be turned into a picture in float32.
_LEAST_ALPHA = 1e-3


def refuse_epsilon_without_signal(schedule: NoiseSchedule, prediction_type: PredictionType) -> None:
    """Refuse eps-prediction on a schedule whose last time is next to pure noise: x̂ = (z − sigma epŝ)/alpha multiplies
    an error by 1/alpha, which is 15 with Stable Diffusion's betas and 22,000 on the cosine schedule of ±20.

    Raises:
        ModelError: the two are combined.
    """
    if prediction_type == "epsilon" and schedule.last_alpha < _LEAST_ALPHA:
        raise ModelError(
            f"prediction_type=epsilon cannot be used on a schedule that ends at alpha = {schedule.last_alpha:.2g} "
            "(rescale_betas_zero_snr, or the continuous cosine one): there eps says nothing of the picture. Use a "
            "v_prediction teacher (the stage convert makes one), or betas without the rescaling"
        )

"""Whether a teacher can be taken down the ladders of a recipe: told before anything is trained."""

from __future__ import annotations

import math

from torch import nn

from fewstep.diffusion.grid import check_ladder
from fewstep.diffusion.prediction import PredictionType
from fewstep.diffusion.schedule import DiscreteSchedule
from fewstep.distill.guidance import refuse_epsilon_without_signal
from fewstep.distill.settings import ProgressiveSettings
from fewstep.errors import ModelError, RecipeError
from fewstep.models.denoiser import Denoiser


def check_ladders(
    settings: ProgressiveSettings, teacher: Denoiser, *, prediction_type: PredictionType | None = None
) -> None:
    """Refuse ladders that this teacher has no times, no output or no layers for.

    Args:
        settings: of stage two.
        teacher: to be distilled.
        prediction_type: what stage one outputs; None: what the teacher does.

    Raises:
        RecipeError: more steps, or extra start times, than there are times.
        ModelError: eps where alpha vanishes; encoders of a network that does not output v; features without down
            blocks.
    """
    if isinstance(teacher.schedule, DiscreteSchedule):
        count = teacher.schedule.num_train_timesteps
        check_ladder(settings.ladder, first_teacher_steps=settings.first_teacher_steps, num_train_timesteps=count)
        for steps, start_times in settings.start_times.items():
            needed = math.lcm(settings.teacher_of(steps)[1], start_times)
            if needed > count:
                raise RecipeError(
                    f"start_times[{steps}]={start_times} and the teacher's {settings.teacher_of(steps)[1]} steps need "
                    f"a grid of {needed} times, and the teacher was trained on {count}: take a start_times that shares "
                    "more factors with its steps"
                )
    outputs = prediction_type or teacher.prediction_type
    for each in (teacher.prediction_type, outputs, *settings.prediction_type.values()):
        refuse_epsilon_without_signal(teacher.schedule, each)
    if "encoder" in settings.kinds and outputs != "v_prediction":
        raise ModelError(
            f"kinds has encoder, and its ladder begins with a network that outputs {outputs}: encoders need "
            "v_prediction. Convert the teacher (convert), or set guidance.prediction_type to v_prediction"
        )
    if settings.error == "features" and not isinstance(getattr(teacher.network, "down_blocks", None), nn.ModuleList):
        raise ModelError(
            "error=features compares in the down blocks of the teacher's U-Net, and a "
            f"{type(teacher.network).__name__} has none: take mse or pseudo_huber"
        )

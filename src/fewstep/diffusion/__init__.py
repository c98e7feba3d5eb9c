"""The mathematics: noise schedule, step grid, prediction types, guidance and samplers, as pure functions of tensors."""

from fewstep.diffusion.grid import check_ladder, step_index, step_indices
from fewstep.diffusion.guidance import guide
from fewstep.diffusion.prediction import ddim_step, to_epsilon, to_sample, to_velocity
from fewstep.diffusion.random import RowRandom
from fewstep.diffusion.samplers import ddim
from fewstep.diffusion.schedule import NoiseSchedule

__all__ = [
    "NoiseSchedule",
    "RowRandom",
    "check_ladder",
    "ddim",
    "ddim_step",
    "guide",
    "step_index",
    "step_indices",
    "to_epsilon",
    "to_sample",
    "to_velocity",
]

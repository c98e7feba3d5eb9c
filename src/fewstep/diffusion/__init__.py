"""The mathematics: noise schedules, grids, prediction types, guidance and samplers, as pure functions of tensors."""

from fewstep.diffusion.cosine import CosineSchedule
from fewstep.diffusion.grid import check_ladder, step_index, step_indices
from fewstep.diffusion.guidance import guide, interval_weight
from fewstep.diffusion.prediction import convert_output, ddim_step, to_epsilon, to_sample, to_velocity
from fewstep.diffusion.random import RowRandom
from fewstep.diffusion.samplers import ddim, ddim_encode, stochastic, stochastic_etas
from fewstep.diffusion.schedule import DiscreteSchedule, NoiseSchedule

__all__ = [
    "CosineSchedule",
    "DiscreteSchedule",
    "NoiseSchedule",
    "RowRandom",
    "check_ladder",
    "convert_output",
    "ddim",
    "ddim_encode",
    "ddim_step",
    "guide",
    "interval_weight",
    "step_index",
    "step_indices",
    "stochastic",
    "stochastic_etas",
    "to_epsilon",
    "to_sample",
    "to_velocity",
]

"""What the paper adds: one objective a file, loss weights and targets."""

from fewstep.distill.autoencoder import AutoencoderObjective
from fewstep.distill.denoising import DenoisingObjective, TextToImageNetwork
from fewstep.distill.guidance import GuidanceObjective
from fewstep.distill.guided_error import GuidedError, guided_relative_error
from fewstep.distill.joint import joint_denoiser, joint_tokenizers, stored_conditions, take_weights
from fewstep.distill.jumps import Jumps, plan_jumps
from fewstep.distill.naive import NaiveProgressiveObjective
from fewstep.distill.objective import Objective
from fewstep.distill.progressive import ProgressiveObjective
from fewstep.distill.targets import step_target
from fewstep.distill.weights import LossWeight, output_weight

__all__ = [
    "AutoencoderObjective",
    "DenoisingObjective",
    "GuidanceObjective",
    "GuidedError",
    "Jumps",
    "LossWeight",
    "NaiveProgressiveObjective",
    "Objective",
    "ProgressiveObjective",
    "TextToImageNetwork",
    "guided_relative_error",
    "joint_denoiser",
    "joint_tokenizers",
    "output_weight",
    "plan_jumps",
    "step_target",
    "stored_conditions",
    "take_weights",
]

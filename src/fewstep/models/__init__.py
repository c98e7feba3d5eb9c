"""Networks and their folders: teacher, w-conditioned student, and a diffusers folder in and out."""

from fewstep.models.architecture import (
    SCHEDULER_CONFIG,
    AutoencoderArchitecture,
    TeacherArchitecture,
    add_pooled_text,
)
from fewstep.models.denoiser import Condition, Denoiser
from fewstep.models.embedding import guidance_embedding
from fewstep.models.load import load_model, load_parts
from fewstep.models.parts import Parts
from fewstep.models.sampling import guided_model, initial_noise, student_model
from fewstep.models.student import (
    StudentInfo,
    StudentKind,
    copy_student,
    copy_unet,
    make_student,
    read_student_info,
    save_student,
    student_scheduler_config,
)
from fewstep.models.text_latent import TextToImageParts, text_denoiser

__all__ = [
    "SCHEDULER_CONFIG",
    "AutoencoderArchitecture",
    "Condition",
    "Denoiser",
    "Parts",
    "StudentInfo",
    "StudentKind",
    "TeacherArchitecture",
    "TextToImageParts",
    "add_pooled_text",
    "copy_student",
    "copy_unet",
    "guidance_embedding",
    "guided_model",
    "initial_noise",
    "load_model",
    "load_parts",
    "make_student",
    "read_student_info",
    "save_student",
    "student_model",
    "student_scheduler_config",
    "text_denoiser",
]

"""Networks and their folders: teacher, w-conditioned student, and a diffusers folder in and out."""

from fewstep.models.architecture import (
    SCHEDULER_CONFIG,
    AutoencoderArchitecture,
    TeacherArchitecture,
    add_pooled_text,
)
from fewstep.models.class_conditional import COSINE_CONFIG, ClassArchitecture, ClassModel, ClassParts
from fewstep.models.class_pipeline import ClassConditionalPipeline, DiTStudentPipeline
from fewstep.models.denoiser import Condition, Denoiser
from fewstep.models.dit import ConditionedDiT, DiTParts
from fewstep.models.embedding import guidance_embedding
from fewstep.models.fresh import fresh_text_model
from fewstep.models.inpainting import InpaintingParts, add_inpainting, check_mask
from fewstep.models.latent import ClipParts, LatentParts
from fewstep.models.load import TextToImageModel, load_model, load_parts, load_text_to_image
from fewstep.models.parts import Parts
from fewstep.models.sampling import SeededNoise, initial_noise, sample_student
from fewstep.models.sdxl import SDXLParts
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
    "COSINE_CONFIG",
    "SCHEDULER_CONFIG",
    "AutoencoderArchitecture",
    "ClassArchitecture",
    "ClassConditionalPipeline",
    "ClassModel",
    "ClassParts",
    "ClipParts",
    "Condition",
    "ConditionedDiT",
    "Denoiser",
    "DiTParts",
    "DiTStudentPipeline",
    "InpaintingParts",
    "LatentParts",
    "Parts",
    "SDXLParts",
    "SeededNoise",
    "StudentInfo",
    "StudentKind",
    "TeacherArchitecture",
    "TextToImageModel",
    "TextToImageParts",
    "add_inpainting",
    "add_pooled_text",
    "check_mask",
    "copy_student",
    "copy_unet",
    "fresh_text_model",
    "guidance_embedding",
    "initial_noise",
    "load_model",
    "load_parts",
    "load_text_to_image",
    "make_student",
    "read_student_info",
    "sample_student",
    "save_student",
    "student_scheduler_config",
    "text_denoiser",
]

"""Networks and their folders: teacher, w-conditioned student, and a diffusers folder in and out."""

from fewstep.models.architecture import (
    SCHEDULER_CONFIG,
    AutoencoderArchitecture,
    TeacherArchitecture,
    add_pooled_text,
)
from fewstep.models.parts import TextToImageParts, load_parts
from fewstep.models.sampling import guided_model, initial_noise, student_model
from fewstep.models.student import (
    StudentInfo,
    copy_student,
    copy_unet,
    guidance_embedding,
    make_student,
    read_student_info,
    save_student,
    student_scheduler_config,
)

__all__ = [
    "SCHEDULER_CONFIG",
    "AutoencoderArchitecture",
    "StudentInfo",
    "TeacherArchitecture",
    "TextToImageParts",
    "add_pooled_text",
    "copy_student",
    "copy_unet",
    "guidance_embedding",
    "guided_model",
    "initial_noise",
    "load_parts",
    "make_student",
    "read_student_info",
    "save_student",
    "student_model",
    "student_scheduler_config",
]

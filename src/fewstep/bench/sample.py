"""`fewstep bench sample`: our sampler with a student, in turns with the bare network calls and the guided teacher."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from diffusers import UNet2DConditionModel

from fewstep.bench.calls import SampleCalls, sample_flops
from fewstep.bench.device import (
    Elapsed,
    Stopwatch,
    measure_matmul_tflops,
    prepare_network,
    resolve_device,
    tuned,
)
from fewstep.bench.result import Environment, SampleBenchResult
from fewstep.bench.sd15 import sd15_parts
from fewstep.bench.settings import Precision, SampleBenchSettings
from fewstep.errors import SamplingError
from fewstep.models import StudentInfo, TextToImageParts, load_parts, make_student, read_student_info
from fewstep.serve.sample import sample_pixels
from fewstep.train.meters import peak_memory_bytes
from fewstep.train.peak import peak_tflops

logger = logging.getLogger("fewstep.bench")

_PROMPT = "a red apple"
_STEPS = 4


def bench_sample(
    settings: SampleBenchSettings, *, model: Path | str | None = None, name: str = "sd15", command: str = ""
) -> SampleBenchResult:
    """Measure sampling and return its figures.

    Every round draws one batch with `sample_pixels` and the student, prompts to pictures in main memory; then makes the
    same network calls (text encoder, N times the U-Net, VAE decoder); then draws the batch with the guided teacher.
    Student and teacher are the same network with and without the input for w, so a student's teacher need not be had.

    Args:
        settings: what to measure and how.
        model: local folder of a student or teacher; None: Stable Diffusion 1.5's sizes with random weights.
        name: what to call it.
        command: what was typed, for the record.

    Raises:
        ModelError: the folder is no model.
        SamplingError: a step count that the student was not made for, or a resolution beside a model.
        FewstepError: no such device, or an option without effect.
    """
    device = resolve_device(settings.device, settings.tuning)
    on_gpu = device.type == "cuda"
    precision: Precision = "bfloat16" if on_gpu else "float32"
    if settings.precision != "auto":
        precision = settings.precision
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    environment = Environment.here(device, command)
    batch_size = settings.batch_size or (16 if on_gpu else 8)

    with tuned(settings.tuning):
        matmul_size, matmul_tflops = measure_matmul_tflops(device, precision)
        info = None if model is None else read_student_info(model)
        steps = _steps(settings, info)
        parts = _load(settings, model, device, dtype)
        student = student_parts(parts)
        for network in (student.unet, student.vae.decoder):
            prepare_network(network, settings.tuning)
        run_student = _sampler(student, batch_size=batch_size, steps=steps, device=device)
        run_bare = _bare(student, batch_size=batch_size, steps=steps, device=device)
        gflop = sample_flops(SampleCalls.make(student, batch_size=batch_size, num_inference_steps=steps)) / 1e9

        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        run_student()
        peak_memory = peak_memory_bytes(device)
        run_bare()
        run_teacher = None
        if settings.teacher_steps:
            teacher = teacher_parts(parts)
            prepare_network(teacher.unet, settings.tuning)
            run_teacher = _sampler(teacher, batch_size=batch_size, steps=settings.teacher_steps, device=device)
            _sampler(teacher, batch_size=batch_size, steps=2, device=device)()  # warm up

        rounds: list[_Round] = []
        for number in range(settings.rounds):
            one = _Round(run_student(), run_bare(), run_teacher() if run_teacher else None)
            rounds.append(one)
            logger.info(
                "round %d of %d: %.4g images/s, bare network calls %.4g",
                number + 1,
                settings.rounds,
                batch_size / one.student.seconds,
                batch_size / one.bare.seconds,
            )

    images_per_second = median(batch_size / one.student.seconds for one in rounds)
    tflops = images_per_second * gflop / 1e3
    peak = peak_tflops(environment.device_name, precision)
    shares = [one.bare.seconds / one.student.seconds for one in rounds]
    guided = [(one.teacher.seconds, one.student.seconds) for one in rounds if one.teacher is not None]
    return SampleBenchResult(
        precision=precision,
        tuning=settings.tuning.names(),
        batch_size=batch_size,
        rounds=settings.rounds,
        images_per_second=images_per_second,
        gflop_per_image=gflop,
        tflops=tflops,
        peak_tflops=peak,
        mfu=None if peak is None else tflops / peak,
        matmul_size=matmul_size,
        matmul_tflops=matmul_tflops,
        matmul_share=tflops / matmul_tflops,
        bare_images_per_second=median(batch_size / one.bare.seconds for one in rounds),
        bare_share=median(shares),
        bare_share_by_round=shares,
        bare_share_cpu_time=None
        if on_gpu
        else median(one.bare.cpu_seconds / one.student.cpu_seconds for one in rounds),
        peak_memory_bytes=peak_memory,
        model=name,
        resolution=parts.resolution,
        num_inference_steps=steps,
        seconds_per_image=1 / images_per_second,
        teacher_steps=settings.teacher_steps,
        teacher_images_per_second=median(batch_size / teacher_s for teacher_s, _ in guided) if guided else None,
        speedup=median(teacher_s / student_s for teacher_s, student_s in guided) if guided else None,
        environment=environment,
    )


@dataclass(frozen=True)
class _Round:
    student: Elapsed
    bare: Elapsed
    teacher: Elapsed | None


def _steps(settings: SampleBenchSettings, info: StudentInfo | None) -> int:
    own = None if info is None else info.num_inference_steps
    steps = settings.num_inference_steps or own or _STEPS
    if info is not None:
        info.check(num_inference_steps=steps, guidance_scale=info.guidance_scale)
    return steps


def _load(
    settings: SampleBenchSettings, model: Path | str | None, device: torch.device, dtype: torch.dtype
) -> TextToImageParts:
    if model is None:
        return sd15_parts(device, dtype, resolution=settings.resolution)
    if settings.resolution != SampleBenchSettings().resolution:
        raise SamplingError(
            f"resolution={settings.resolution} has no effect on a model, which draws pictures of its own size: "
            "leave it out, or bench --shape sd15"
        )
    return load_parts(model, dtype=dtype).to(device)


def student_parts(parts: TextToImageParts) -> TextToImageParts:
    if parts.unet.config.time_cond_proj_dim is not None:
        return parts
    with torch.device(parts.device):
        return replace(parts, unet=make_student(parts.unet).requires_grad_(False).eval())


def teacher_parts(parts: TextToImageParts) -> TextToImageParts:
    config = dict(parts.unet.config)
    if config["time_cond_proj_dim"] is None:
        return parts
    with torch.device(parts.device):
        unet = UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": None})
    weights = {key: value for key, value in parts.unet.state_dict().items() if "cond_proj" not in key}
    unet.load_state_dict(weights)
    return replace(parts, unet=unet.to(parts.device, parts.unet.dtype).requires_grad_(False).eval())


def _sampler(parts: TextToImageParts, *, batch_size: int, steps: int, device: torch.device) -> Callable[[], Elapsed]:
    """Return a function that draws one batch and returns its time."""
    w = torch.full((batch_size,), 3.0)

    def run() -> Elapsed:
        watch = Stopwatch(device)
        pixels = sample_pixels(
            parts, prompts=[_PROMPT] * batch_size, seeds=range(batch_size), num_inference_steps=steps, w=w
        )
        pixels.cpu()  # a picture is done when it can be sent; this waits for the device
        return watch.stop()

    return run


def _bare(parts: TextToImageParts, *, batch_size: int, steps: int, device: torch.device) -> Callable[[], Elapsed]:
    calls = SampleCalls.make(parts, batch_size=batch_size, num_inference_steps=steps)

    def run() -> Elapsed:
        watch = Stopwatch(device)
        calls.run()
        return watch.stop()

    return run

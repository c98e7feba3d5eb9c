"""`fewstep bench train`: our training loop with the real objective, in turns with the bare network calls."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn

from fewstep.bench.calls import UpdateCalls, UpdateFlops, update_flops
from fewstep.bench.device import Elapsed, measure_matmul_tflops, prepare_network, resolve_device, tuned
from fewstep.bench.result import Environment, FlopsResult, TrainBenchResult
from fewstep.bench.sd15 import sd15_train_workload
from fewstep.bench.settings import TrainBenchSettings
from fewstep.bench.workload import TrainWorkload, planned_train_workload, recipe_train_workload
from fewstep.distill import GuidanceObjective, ProgressiveObjective
from fewstep.errors import RecipeError
from fewstep.models import make_student
from fewstep.recipe import Recipe
from fewstep.storage import open_storage
from fewstep.train.in_process import train_in_process
from fewstep.train.job import TrainJob
from fewstep.train.optimiser import make_optimizer
from fewstep.train.peak import peak_tflops
from fewstep.train.precision import resolve_precision
from fewstep.train.settings import TrainSettings

logger = logging.getLogger("fewstep.bench")

#: Steps of the student in a rung of stage two; the number changes no speed.
_RUNG = 8


def bench_train(settings: TrainBenchSettings, *, recipe: Recipe | None = None, command: str = "") -> TrainBenchResult:
    """Measure the training loop and return its figures.

    Every round runs `train_in_process` with the stage's own objective, then the same network calls (teacher's forwards,
    student's forward and backward, optimiser step) on a fixed batch. Both warm up for half of their measured updates.

    Args:
        settings: what to measure and how.
        recipe: its network, data and training settings; None: Stable Diffusion 1.5's sizes.
        command: what was typed, for the record.

    Raises:
        RecipeError: the recipe has no such stage, or a setting does not fit it.
        ModelError, StorageError: the recipe's teacher or store cannot be had.
        FewstepError: no such device, or an option without effect.
    """
    device = resolve_device(settings.device, settings.tuning)
    with open_workload(settings, recipe) as workload, tuned(settings.tuning):
        return bench_workload(workload, settings, device=device, command=command)


def count_train(settings: TrainBenchSettings, *, recipe: Recipe | None = None) -> FlopsResult:
    """Count one picture's FLOPs on meta tensors; nothing is run, fetched or read. Raises as `bench_train`."""
    if recipe is None:
        workload = sd15_train_workload(settings.resolution)
    else:
        _check_resolution(settings)
        workload = planned_train_workload(recipe, settings.stage)
    flops = flops_of(workload, settings)
    return FlopsResult(
        workload=workload.name,
        stage=settings.stage,
        parameters=flops.parameters,
        latent_shape=workload.sample_shape,
        forward_gflop_per_image=flops.forward / 1e9,
        gflop_per_image=flops.update / 1e9,
    )


def bench_workload(
    workload: TrainWorkload, settings: TrainBenchSettings, *, device: torch.device, command: str = ""
) -> TrainBenchResult:
    """Measure one workload on a device; see `bench_train`."""
    environment = Environment.here(device, command)
    train = train_settings(workload, settings, device)
    precision = resolve_precision(train.precision, device)
    batch_size, warmup = train.global_batch_size, train.log_every
    flops = flops_of(workload, settings)
    matmul_size, matmul_tflops = measure_matmul_tflops(device, precision)

    objective = make_objective(workload, settings, device)
    for network in (objective.teacher, objective.network):
        prepare_network(network, settings.tuning)
    calls = UpdateCalls.make(
        settings.stage,
        objective.of_teacher,
        objective.network,
        batch_size=batch_size,
        sample_shape=workload.sample_shape,
        conditions=workload.conditions,
    )
    job = make_job(objective, workload, settings, train)
    rounds: list[_Round] = []
    for number in range(settings.rounds):
        loop = run_loop(job, device)
        bare = calls.run(
            settings.updates, warmup=warmup, optimizer=make_optimizer(objective, train), precision=precision
        )
        rounds.append(_Round(loop, bare))
        logger.info(
            "round %d of %d: %.4g images/s, bare network calls %.4g",
            number + 1,
            settings.rounds,
            settings.updates * batch_size / loop.time.seconds,
            settings.updates * batch_size / bare.seconds,
        )

    images = settings.updates * batch_size
    images_per_second = median(images / one.loop.time.seconds for one in rounds)
    tflops = images_per_second * flops.update / 1e12
    peak = peak_tflops(environment.device_name, precision)
    shares = [one.bare.seconds / one.loop.time.seconds for one in rounds]
    return TrainBenchResult(
        precision=precision,
        tuning=settings.tuning.names(),
        batch_size=batch_size,
        rounds=settings.rounds,
        images_per_second=images_per_second,
        gflop_per_image=flops.update / 1e9,
        tflops=tflops,
        peak_tflops=peak,
        mfu=None if peak is None else tflops / peak,
        matmul_size=matmul_size,
        matmul_tflops=matmul_tflops,
        matmul_share=tflops / matmul_tflops,
        bare_images_per_second=median(images / one.bare.seconds for one in rounds),
        bare_share=median(shares),
        bare_share_by_round=shares,
        bare_share_cpu_time=None
        if device.type == "cuda"
        else median(one.bare.cpu_seconds / one.loop.time.cpu_seconds for one in rounds),
        peak_memory_bytes=max(one.loop.peak_memory_bytes for one in rounds),
        workload=workload.name,
        stage=settings.stage,
        network=workload.network,
        data=workload.data,
        parameters=flops.parameters,
        latent_shape=workload.sample_shape,
        updates=settings.updates,
        seconds_per_update=batch_size / images_per_second,
        forward_gflop_per_image=flops.forward / 1e9,
        data_wait_share=sum(one.loop.waited_s for one in rounds) / sum(one.loop.time.seconds for one in rounds),
        environment=environment,
    )


def make_objective(
    workload: TrainWorkload, settings: TrainBenchSettings, device: torch.device
) -> GuidanceObjective | ProgressiveObjective:
    """Return the stage's own objective on a device. In stage two the weights of the w input are zeros, which changes no
    speed."""
    model = workload.build(device)
    with torch.device(device):  # the student's weights are made where they will be
        if settings.stage == "guidance":
            return GuidanceObjective(
                model,
                w_min=workload.w_min,
                w_max=workload.w_max,
                embedding_dim=workload.embedding_dim,
            )
        return ProgressiveObjective(
            model.with_network(make_student(model.network, embedding_dim=workload.embedding_dim)),
            num_inference_steps=_RUNG,
            w_min=workload.w_min,
            w_max=workload.w_max,
        )


def make_job(
    objective: GuidanceObjective | ProgressiveObjective,
    workload: TrainWorkload,
    settings: TrainBenchSettings,
    train: TrainSettings,
) -> TrainJob:
    """Return the training of one objective that was made already; every run of it trains the same networks on."""
    return TrainJob(
        name=f"bench {settings.stage}",
        fingerprint="bench",
        objective=lambda _: objective,
        batches=workload.batch_factory(train.global_batch_size),
        export=_export_nothing,
        settings=train,
    )


@dataclass(frozen=True)
class LoopRun:
    """What the loop's own meters say of all windows after the first."""

    time: Elapsed
    waited_s: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class _Round:
    loop: LoopRun
    bare: Elapsed


def run_loop(job: TrainJob, device: torch.device) -> LoopRun:
    """Run the training once and return what its own meters say of all windows after the first."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    readings: list[dict[str, float]] = []
    cpu_s: list[float] = []

    def note(_: int, figures: dict[str, float]) -> None:
        readings.append(figures)
        cpu_s.append(time.process_time())

    result = train_in_process(job, device=device, on_log=note)
    images = job.settings.log_every * job.settings.global_batch_size
    windows = [(images / figures["images_per_second"], figures["data_wait_share"]) for figures in readings[1:]]
    return LoopRun(
        time=Elapsed(sum(seconds for seconds, _ in windows), cpu_s[-1] - cpu_s[0]),
        waited_s=sum(seconds * share for seconds, share in windows),
        peak_memory_bytes=result.peak_memory_bytes,
    )


def train_settings(workload: TrainWorkload, settings: TrainBenchSettings, device: torch.device) -> TrainSettings:
    """Return the workload's training settings for one round: a window to warm up and two that are measured."""
    window = settings.updates // 2
    usual = workload.train
    precision = resolve_precision(usual.precision, device)
    if settings.precision != "auto":
        precision = settings.precision
    elif workload.name == "sd15":
        precision = "bfloat16" if device.type == "cuda" else "float32"
    return usual.model_copy(
        update={
            "updates": 3 * window,
            "log_every": window,
            "checkpoint_every": 3 * window,
            "warmup_updates": 0,
            "global_batch_size": settings.batch_size or usual.global_batch_size,
            "precision": precision,
        }
    )


def flops_of(workload: TrainWorkload, settings: TrainBenchSettings) -> UpdateFlops:
    return update_flops(
        settings.stage,
        workload.build,
        embedding_dim=workload.embedding_dim,
        sample_shape=workload.sample_shape,
        conditions=workload.conditions,
    )


@contextmanager
def open_workload(settings: TrainBenchSettings, recipe: Recipe | None) -> Iterator[TrainWorkload]:
    if recipe is None:
        yield sd15_train_workload(settings.resolution)
        return
    _check_resolution(settings)
    with open_storage(recipe.storage) as storage:
        storage.check()
        yield recipe_train_workload(recipe, settings.stage, storage)


def _check_resolution(settings: TrainBenchSettings) -> None:
    if settings.resolution != TrainBenchSettings().resolution:
        raise RecipeError(
            f"resolution={settings.resolution} has no effect on a recipe, whose pictures have the teacher's own size: "
            "leave it out, or bench --shape sd15"
        )


def _export_nothing(network: nn.Module, folder: str) -> None:
    """Keep nothing: a benchmark's weights are of no use."""

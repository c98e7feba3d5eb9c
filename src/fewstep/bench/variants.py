"""`fewstep bench train --variants`: the same training run in several ways, in turns."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from fewstep.bench.device import resolve_device, tuned
from fewstep.bench.result import Environment, TrainVariantsResult, VariantSpeed
from fewstep.bench.settings import EAGER, SWITCHES, TrainBenchSettings
from fewstep.bench.train import LoopRun, flops_of, make_job, make_objective, open_workload, run_loop, train_settings
from fewstep.bench.workload import TrainWorkload
from fewstep.distill import GuidanceObjective, ProgressiveObjective
from fewstep.recipe import Recipe
from fewstep.train.job import TrainJob
from fewstep.train.peak import peak_tflops
from fewstep.train.precision import resolve_precision
from fewstep.train.settings import TrainSettings

logger = logging.getLogger("fewstep.bench")


def bench_variants(
    settings: TrainBenchSettings, *, recipe: Recipe | None = None, command: str = ""
) -> TrainVariantsResult:
    """Measure the training loop in each of `settings.variants`; arguments and errors as `bench_train`.

    Every round runs each variant once, so that a device that grows hot, or other programs on it, slow down all of them
    alike; a variant's ratio is taken within a round. Each has networks of its own, which wait on the CPU meanwhile.
    """
    device = resolve_device(settings.device, settings.tuning)
    with open_workload(settings, recipe) as workload, tuned(settings.tuning):
        return compare_variants(workload, settings, device=device, command=command)


def compare_variants(
    workload: TrainWorkload, settings: TrainBenchSettings, *, device: torch.device, command: str = ""
) -> TrainVariantsResult:
    """Measure one workload on a device; see `bench_variants`."""
    environment = Environment.here(device, command)
    train = train_settings(workload, settings, device)
    model = workload.build(device)  # often the same network each time, and a switch that is on stays on
    network: Any = model.network
    copied = replace(workload, build=lambda _: model.with_network(copy.deepcopy(network)))
    variants = [_Variant(name, copied, settings, train, device) for name in settings.variants]
    network.to("cpu")
    for number in range(settings.rounds):
        for variant in variants:
            variant.run(device)
        speeds = ", ".join(f"{variant.name} {variant.images_per_second[-1]:.4g}" for variant in variants)
        logger.info("round %d of %d, images/s: %s", number + 1, settings.rounds, speeds)

    precision = resolve_precision(train.precision, device)
    flops = flops_of(workload, settings)
    peak = peak_tflops(environment.device_name, precision)
    eager = next(variant for variant in variants if variant.name == EAGER)
    return TrainVariantsResult(
        workload=workload.name,
        stage=settings.stage,
        network=workload.network,
        data=workload.data,
        parameters=flops.parameters,
        latent_shape=workload.sample_shape,
        precision=precision,
        tuning=settings.tuning.names(),
        batch_size=train.global_batch_size,
        rounds=settings.rounds,
        updates=settings.updates,
        gflop_per_image=flops.update / 1e9,
        peak_tflops=peak,
        variants=[variant.speed(eager, gflop=flops.update / 1e9, peak=peak) for variant in variants],
        environment=environment,
    )


class _Variant:
    """One way to train, its networks, and what was measured so far."""

    def __init__(
        self,
        name: str,
        workload: TrainWorkload,
        settings: TrainBenchSettings,
        train: TrainSettings,
        device: torch.device,
    ) -> None:
        self.name = name
        off = {key: False for switch in SWITCHES.values() for key in switch}
        on = {key: value for part in name.split("+") for key, value in SWITCHES[part].items()}
        alone = {"strategy": "ddp", "shard_frozen": False}  # whatever the recipe says: there is this one process
        self._objective: GuidanceObjective | ProgressiveObjective = make_objective(workload, settings, device)
        self._job: TrainJob = make_job(
            self._objective, workload, settings, train.model_copy(update={**off, **on, **alone})
        )
        self._runs: list[LoopRun] = []
        self._on_gpu = device.type == "cuda"
        self._images = settings.updates * train.global_batch_size
        self._move(torch.device("cpu"))

    @property
    def images_per_second(self) -> list[float]:
        return [self._images / one.time.seconds for one in self._runs]

    def run(self, device: torch.device) -> None:
        self._move(device)
        self._runs.append(run_loop(self._job, device))
        self._objective.network.zero_grad(set_to_none=True)
        self._move(torch.device("cpu"))

    def speed(self, eager: _Variant, *, gflop: float, peak: float | None) -> VariantSpeed:
        """Return the figures: medians over the rounds, and in each round how many times as fast as eager it was."""
        images_per_second = median(self.images_per_second)
        tflops = images_per_second * gflop / 1e3
        ratios = [theirs.time.seconds / ours.time.seconds for theirs, ours in zip(eager._runs, self._runs, strict=True)]
        return VariantSpeed(
            name=self.name,
            images_per_second=images_per_second,
            images_per_second_by_round=self.images_per_second,
            against_eager=median(ratios),
            against_eager_by_round=ratios,
            tflops=tflops,
            mfu=None if peak is None else tflops / peak,
            peak_memory_bytes=max(one.peak_memory_bytes for one in self._runs) if self._on_gpu else None,
        )

    def _move(self, device: torch.device) -> None:
        for network in (self._objective.teacher, self._objective.network):
            network.to(device)

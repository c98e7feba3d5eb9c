"""What a benchmark returns: for machines as JSON, for people as lines. `page` makes a table of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from fewstep.bench.device import device_name
from fewstep.bench.settings import EAGER, Precision


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Environment(_Model):
    """Where and when a benchmark ran."""

    device: str
    device_name: str
    torch_version: str
    fewstep_version: str
    num_threads: int
    load_average: float = Field(
        description="processes that wanted a CPU in the minute before; others were at work if high"
    )
    time_utc: str
    command: str

    @classmethod
    def here(cls, device: torch.device, command: str) -> Environment:
        """Return this process's."""
        return cls(
            device=device.type,
            device_name=device_name(device),
            torch_version=torch.__version__,
            fewstep_version=version("fewstep"),
            num_threads=torch.get_num_threads(),
            load_average=round(os.getloadavg()[0], 2),
            time_utc=datetime.now(UTC).isoformat(timespec="seconds"),
            command=command,
        )


class Speed(_Model):
    """What both benchmarks measure.

    `peak_tflops` and `mfu` are null where the device's peak is not known; `matmul_share` relates to one large matrix
    product on the same device just before. `bare_share` is the median over the rounds of (bare time / our time);
    `bare_share_cpu_time` the same in CPU seconds of the process, null on a GPU.
    """

    precision: Precision
    tuning: list[str]
    batch_size: int
    rounds: int
    images_per_second: float
    gflop_per_image: float
    tflops: float
    peak_tflops: float | None
    mfu: float | None
    matmul_size: int
    matmul_tflops: float
    matmul_share: float
    bare_images_per_second: float
    bare_share: float
    bare_share_by_round: list[float]
    bare_share_cpu_time: float | None
    peak_memory_bytes: int

    def speed_lines(self) -> list[tuple[str, str]]:
        """Return names and values for people."""
        if self.mfu is None or self.peak_tflops is None:
            mfu = "not known: this device is not in the table of peaks"
        else:
            mfu = f"{self.mfu:.1%} of {self.peak_tflops:g} TFLOP/s ({self.precision}, data sheet)"
        spread = f"{min(self.bare_share_by_round):.1%} … {max(self.bare_share_by_round):.1%}"
        lines = [
            ("images/s", f"{self.images_per_second:.4g}"),
            ("TFLOP/s", f"{self.tflops:.4g} ({self.gflop_per_image:,.4g} GFLOP an image)"),
            ("MFU", mfu),
            (
                "of a matrix product",
                f"{self.matmul_share:.1%} of {self.matmul_tflops:.4g} TFLOP/s at {self.matmul_size}³",
            ),
            (
                "of bare network time",
                f"{self.bare_share:.1%} (median of {self.rounds} rounds, {spread}; "
                f"bare calls: {self.bare_images_per_second:.4g} images/s)",
            ),
        ]
        if self.bare_share_cpu_time is not None:
            lines.append(
                ("  the same in CPU time", f"{self.bare_share_cpu_time:.1%} (which other programs hardly change)")
            )
        return [*lines, ("peak memory", memory(self.peak_memory_bytes))]


class TrainBenchResult(Speed):
    """Result of `bench_train`."""

    kind: Literal["train"] = "train"
    workload: str
    stage: str
    network: str
    data: str
    parameters: int
    latent_shape: tuple[int, int, int]
    updates: int
    seconds_per_update: float
    forward_gflop_per_image: float
    data_wait_share: float
    environment: Environment

    def to_json(self) -> dict[str, Any]:
        """Return the result as a JSON object."""
        return self.model_dump(mode="json")

    def table(self) -> str:
        """Return the result for people, one line a figure."""
        lines = [
            *_head(self.environment),
            ("training", f"{self.workload}, stage {self.stage}, batch {self.batch_size}, {mode(self)}"),
            ("network", f"{self.network}; {self.parameters / 1e6:,.1f} M weights, latents {_shape(self.latent_shape)}"),
            ("data", self.data),
            *self.speed_lines(),
            ("seconds per update", f"{self.seconds_per_update:.4g}"),
            ("data wait", f"{self.data_wait_share:.2%} of the loop's time"),
        ]
        return _aligned(lines)


class VariantSpeed(_Model):
    """One way to train beside the others. `peak_memory_bytes` is null on a CPU, where a process's peak never falls."""

    name: str
    images_per_second: float
    images_per_second_by_round: list[float]
    against_eager: float = Field(description="median over the rounds of (eager's time / its time): 2 is twice as fast")
    against_eager_by_round: list[float]
    tflops: float
    mfu: float | None
    peak_memory_bytes: int | None

    def ratio(self) -> str:
        """Return `1.31 × (1.28 … 1.33)`, how many times as fast as eager."""
        low, high = min(self.against_eager_by_round), max(self.against_eager_by_round)
        return f"{self.against_eager:.3g} × ({low:.3g} … {high:.3g})"


class TrainVariantsResult(_Model):
    """Result of `bench_variants`: the first of the variants is eager, which the others are held against."""

    kind: Literal["train-variants"] = "train-variants"
    workload: str
    stage: str
    network: str
    data: str
    parameters: int
    latent_shape: tuple[int, int, int]
    precision: Precision
    tuning: list[str]
    batch_size: int
    rounds: int
    updates: int
    gflop_per_image: float
    peak_tflops: float | None
    variants: list[VariantSpeed]
    environment: Environment

    def to_json(self) -> dict[str, Any]:
        """Return the result as a JSON object."""
        return self.model_dump(mode="json")

    def table(self) -> str:
        """Return the result for people, one line a variant."""
        lines = [
            *_head(self.environment),
            ("training", f"{self.workload}, stage {self.stage}, batch {self.batch_size}, {mode(self)}"),
            ("network", f"{self.network}; {self.parameters / 1e6:,.1f} M weights, latents {_shape(self.latent_shape)}"),
            ("data", self.data),
            (
                "rounds",
                f"{self.rounds} of {self.updates} updates in turns; figures are medians, with the range of ratios",
            ),
        ]
        for variant in self.variants:
            said = [f"{variant.images_per_second:.4g} images/s"]
            if variant.name != EAGER:
                said.append(f"{variant.ratio()} as fast as eager")
            if variant.mfu is not None:
                said.append(f"MFU {variant.mfu:.1%}")
            if variant.peak_memory_bytes is not None:
                said.append(f"peak memory {memory(variant.peak_memory_bytes)}")
            lines.append((variant.name, " · ".join(said)))
        return _aligned(lines)


class SampleBenchResult(Speed):
    """Result of `bench_sample`. The teacher's figures are null when it was left out."""

    kind: Literal["sample"] = "sample"
    model: str
    resolution: int
    num_inference_steps: int
    seconds_per_image: float
    teacher_steps: int
    teacher_images_per_second: float | None
    speedup: float | None
    environment: Environment

    def to_json(self) -> dict[str, Any]:
        """Return the result as a JSON object."""
        return self.model_dump(mode="json")

    def table(self) -> str:
        """Return the result for people, one line a figure."""
        steps = f"{self.num_inference_steps} step{'s' if self.num_inference_steps > 1 else ''}"
        lines = [
            *_head(self.environment),
            ("sampling", f"{self.model}, {self.resolution} px, {steps}, batch {self.batch_size}, {mode(self)}"),
            *self.speed_lines(),
            ("seconds per image", f"{self.seconds_per_image:.4g}"),
        ]
        if self.teacher_images_per_second is not None and self.speedup is not None:
            lines.append(
                (
                    "against the teacher",
                    f"{self.speedup:.3g} × as fast as {self.teacher_steps} guided steps "
                    f"({self.teacher_images_per_second:.4g} images/s); network evaluations "
                    f"{self.num_inference_steps} against {2 * self.teacher_steps}",
                )
            )
        return _aligned(lines)


class FlopsResult(_Model):
    """Result of a dry run: what one picture of a training costs, on no device at all."""

    kind: Literal["flops"] = "flops"
    workload: str
    stage: str
    parameters: int
    latent_shape: tuple[int, int, int]
    forward_gflop_per_image: float
    gflop_per_image: float

    def to_json(self) -> dict[str, Any]:
        """Return the result as a JSON object."""
        return self.model_dump(mode="json")

    def table(self) -> str:
        """Return the result for people."""
        return _aligned(
            [
                ("training", f"{self.workload}, stage {self.stage}, latents {_shape(self.latent_shape)}"),
                ("weights", f"{self.parameters / 1e6:,.1f} M"),
                ("one forward pass", f"{self.forward_gflop_per_image:,.1f} GFLOP an image"),
                ("one update", f"{self.gflop_per_image:,.1f} GFLOP an image"),
            ]
        )


BenchResult = TrainBenchResult | TrainVariantsResult | SampleBenchResult


def _head(environment: Environment) -> list[tuple[str, str]]:
    return [
        ("device", f"{environment.device_name} · torch {environment.torch_version}"),
        ("when", f"{environment.time_utc}, load average {environment.load_average:g}"),
    ]


def mode(speed: Speed | TrainVariantsResult) -> str:
    """Return the precision and what was switched on: `bfloat16, channels_last`."""
    return ", ".join([speed.precision, *speed.tuning])


def memory(size_bytes: int) -> str:
    """Return a size in words: `12.34 GiB`."""
    return f"{size_bytes / 2**30:.2f} GiB"


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(str(side) for side in shape)


def _aligned(lines: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines)

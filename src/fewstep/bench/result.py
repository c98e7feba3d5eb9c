"""What a benchmark returns: for machines as JSON, for people as lines, for docs/benchmarks.md as a table."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fewstep.bench.device import device_name
from fewstep.bench.settings import Precision
from fewstep.errors import FewstepError

BEGIN, END = "<!-- gpu-check: begin -->", "<!-- gpu-check: end -->"


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
        return [*lines, ("peak memory", _memory(self.peak_memory_bytes))]


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
            ("training", f"{self.workload}, stage {self.stage}, batch {self.batch_size}, {_mode(self)}"),
            ("network", f"{self.network}; {self.parameters / 1e6:,.1f} M weights, latents {_shape(self.latent_shape)}"),
            ("data", self.data),
            *self.speed_lines(),
            ("seconds per update", f"{self.seconds_per_update:.4g}"),
            ("data wait", f"{self.data_wait_share:.2%} of the loop's time"),
        ]
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
            ("sampling", f"{self.model}, {self.resolution} px, {steps}, batch {self.batch_size}, {_mode(self)}"),
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


BenchResult = TrainBenchResult | SampleBenchResult


def read_result(file: Path) -> BenchResult:
    """Return a result that `--json` printed into a file.

    Raises:
        FewstepError: the file is none.
    """
    try:
        text = file.read_text(encoding="utf-8")
        model = SampleBenchResult if '"kind": "sample"' in text else TrainBenchResult
        return model.model_validate_json(text)
    except (OSError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise FewstepError(
            f"{file} is not what `fewstep bench train --json` or `bench sample --json` prints ({reason}): run it again"
        ) from error


def write_benchmarks_table(results: Sequence[BenchResult], page: Path) -> None:
    """Write the results as Markdown into the marked section of a page, in place of what was there.

    Raises:
        FewstepError: there are no results, or the page has no such section.
    """
    if not results:
        raise FewstepError("there are no results to write: name the JSON files that the benchmarks printed")
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise FewstepError(f"the page {page} cannot be read: {error.strerror}") from error
    section = re.compile(re.escape(BEGIN) + r".*?" + re.escape(END), re.DOTALL)
    if not section.search(text):
        raise FewstepError(
            f"{page} has no section between the lines {BEGIN} and {END}: add them where the table belongs"
        )
    page.write_text(section.sub(lambda _: f"{BEGIN}\n{_markdown(results)}\n{END}", text, count=1), encoding="utf-8")


def _markdown(results: Sequence[BenchResult]) -> str:
    first = results[0].environment
    lines = [
        f"{first.device_name}, torch {first.torch_version}, fewstep {first.fewstep_version}, {first.time_utc[:10]}.",
        "",
        "| what | batch | precision, options | images/s | TFLOP/s | MFU | of a matrix product | of bare network time "
        "| data wait | memory | against the guided teacher |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        if isinstance(result, TrainBenchResult):
            what = f"{result.workload}, stage {result.stage}"
            wait, ratio = f"{result.data_wait_share:.2%}", ""
        else:
            what = f"{result.model}, {result.num_inference_steps} steps, {result.resolution} px"
            wait, ratio = (
                "",
                "" if result.speedup is None else f"{result.speedup:.3g} × as fast as {result.teacher_steps} steps",
            )
        cells = [
            what,
            str(result.batch_size),
            _mode(result),
            f"{result.images_per_second:.4g}",
            f"{result.tflops:.4g}",
            "not known" if result.mfu is None else f"{result.mfu:.1%}",
            f"{result.matmul_share:.1%}",
            f"{result.bare_share:.1%}",
            wait,
            _memory(result.peak_memory_bytes),
            ratio,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", "```", *(result.environment.command for result in results), "```"])


def _head(environment: Environment) -> list[tuple[str, str]]:
    return [
        ("device", f"{environment.device_name} · torch {environment.torch_version}"),
        ("when", f"{environment.time_utc}, load average {environment.load_average:g}"),
    ]


def _mode(speed: Speed) -> str:
    return ", ".join([speed.precision, *speed.tuning])


def _memory(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(str(side) for side in shape)


def _aligned(lines: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines)

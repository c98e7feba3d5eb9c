"""A plan as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from fewstep.plan.gpus import GIB
from fewstep.plan.memory import MEMORY_ERROR, Memory
from fewstep.plan.plan import Plan, Step

_HEAD = ("", "updates", "samples", "GFLOP each", "GPUs", "GPU-hours", "hours", "read", "kept", "GiB a GPU")

_PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "moments": "AdamW's moments",
    "average": "average",
    "frozen": "frozen teacher",
    "gathered": "gathered by FSDP",
    "activations": "activations",
    "inputs": "batch",
    "reserve": "reserve",
}


def render(plan: Plan) -> str:
    """Return a plan as text for a terminal."""
    lines = [
        f"{plan.recipe}: {plan.teacher}",
        f"shape {plan.shape} ({plan.about}): {plan.weights / 1e6:,.1f} M weights, "
        f"{plan.forward_flops / 1e9:,.1f} GFLOP a forward pass",
        f"{plan.num_workers} × {plan.gpu.name} ({plan.gpu.memory_bytes // GIB} GiB, "
        f"{plan.gpu.flops_per_second('bfloat16') / 1e12:,.0f} TFLOP/s in bfloat16) at an MFU of {plan.mfu:.0%}; "
        f"{number(plan.num_samples)} training samples ({plan.samples_from})",
        *_elastic(plan),
        "",
        *_table(plan),
        "",
        *_memory(plan),
        _store(plan),
        "",
        f"in short: {summary(plan)}",
        "Estimates from counted FLOPs and bytes; nothing was run. Not in the time: waiting for data, writing "
        "checkpoints, loading, pictures and figures. Memory is right to about "
        f"{MEMORY_ERROR:.0%}.",
    ]
    return "\n".join(lines)


def _elastic(plan: Plan) -> list[str]:
    if plan.fewest_workers == plan.num_workers:
        return []
    return [
        f"the number of workers may change: time is for {plan.num_workers}, the memory of a GPU for "
        f"{plan.fewest_workers}, who have most rows"
    ]


def summary(plan: Plan) -> str:
    """Return a plan in one line."""
    fullest = plan.fullest
    memory = ""
    if fullest is not None:
        memory = f", {fullest.memory.total / GIB:.1f} of {plan.gpu.memory_bytes // GIB} GiB"
    read, stored = (bytes_in_words(plan.total(name)) for name in ("read_bytes", "stored_bytes"))
    return (
        f"{plan.num_workers} × {plan.gpu.name}{memory}; {number(plan.gpu_hours)} GPU-hours, "
        f"{number(plan.hours)} hours; {read} read, {stored} stored"
    )


def number(value: float) -> str:
    """Return a number with three digits that count, such as <0.01, 0.57, 4.57, 108 or 10.2 M."""
    for size, name in ((1e9, " G"), (1e6, " M")):
        if value >= size:
            return f"{value / size:.3g}{name}"
    if value >= 100:
        return f"{value:,.0f}"
    return "<0.01" if 0 < value < 0.01 else f"{value:.3g}"


def bytes_in_words(size: float) -> str:
    """Return a number of bytes such as 4.57 GB, in powers of 1000."""
    for unit, name in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{number(size / unit)} {name}"
    return f"{number(size / 1e3)} kB"


def _table(plan: Plan) -> list[str]:
    rows = [_HEAD, *(_row(step) for step in plan.steps)]
    rows.append(
        (
            "in all", "", "", "", "", number(plan.gpu_hours), number(plan.hours),
            bytes_in_words(plan.total("read_bytes")), bytes_in_words(plan.total("stored_bytes")), "",
        )
    )  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    return ["  ".join(_cell(text, width, first=n == 0) for n, (text, width) in enumerate(zip(row, widths, strict=True)))
            for row in rows]  # fmt: skip


def _cell(text: str, width: int, *, first: bool) -> str:
    return text.ljust(width) if first else text.rjust(width)


def _row(step: Step) -> tuple[str, ...]:
    return (
        step.label,
        "" if step.updates is None else f"{step.updates:,}",
        number(step.samples),
        number(step.flops / 1e9),
        str(step.num_gpus),
        number(step.gpu_seconds / 3600),
        number(step.seconds / 3600),
        bytes_in_words(step.read_bytes),
        bytes_in_words(step.stored_bytes),
        f"{step.memory.total / GIB:.1f}",
    )


def _memory(plan: Plan) -> list[str]:
    fullest = plan.fullest
    if fullest is None:
        return ["nothing is computed, so no GPU is needed"]
    lines = [f"memory of a GPU in {fullest.label}: {_parts(fullest.memory)}"]
    if fullest.memory.host_average:
        lines.append(f"main memory of a worker for the average: {fullest.memory.host_average / GIB:.1f} GiB")
    if plan.fits:
        lines.append(f"everything fits the {plan.gpu.memory_bytes // GIB} GiB of {plan.gpu.name}")
        if fullest.memory.total > (1 - MEMORY_ERROR) * plan.gpu.memory_bytes:
            key = fullest.batch_key or "micro_batch_size"
            lines.append(f"… but by less than the estimate may be wrong: try it, or take a smaller {key}")
        return lines
    seen: set[tuple[str, ...]] = set()
    for step in plan.too_large:
        ways = tuple(each.in_words() for each in step.switches)
        if (step.stage, *ways) in seen:
            continue
        seen.add((step.stage, *ways))
        lines += _does_not_fit(plan, step)
    return lines


def _store(plan: Plan) -> str:
    rate = max((step.read_bytes / step.seconds for step in plan.trainings), default=0.0)
    kept = max((step.checkpoint_bytes for step in plan.trainings), default=0)
    return (
        f"the store gives up to {bytes_in_words(rate)}/s to all workers, and takes {bytes_in_words(kept)} of "
        f"checkpoints at a time; {bytes_in_words(plan.total('written_bytes'))} are written in all"
    )


def _does_not_fit(plan: Plan, step: Step) -> Sequence[str]:
    head = f"DOES NOT FIT: {step.label} needs {step.memory.total / GIB:.1f} GiB of {plan.gpu.memory_bytes // GIB}."
    if step.batch_key:
        return [f"{head} Take a smaller {step.batch_key}, or a GPU with more memory for the driver"]
    if not step.switches:
        return [
            f"{head} No micro-batch, gradient checkpointing, FSDP or average in main memory would make it fit: take "
            "more workers, or GPUs with more memory"
        ]
    ways = [f"  {each.in_words()}  ({each.memory.total / GIB:.1f} GiB)" for each in step.switches]
    return [f"{head} It would with, under the stage's train key:", *ways]


def _parts(memory: Memory) -> str:
    sizes = asdict(memory)
    return ", ".join(f"{words} {sizes[name] / GIB:.1f}" for name, words in _PARTS.items() if sizes[name]) + " GiB"

"""docs/benchmarks.md: results that `--json` printed, as a table in the page's marked section."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from fewstep.bench.result import (
    BenchResult,
    SampleBenchResult,
    TrainBenchResult,
    TrainVariantsResult,
    memory,
    mode,
)
from fewstep.errors import FewstepError

BEGIN, END = "<!-- gpu-check: begin -->", "<!-- gpu-check: end -->"

_KINDS: dict[str, type[TrainBenchResult | TrainVariantsResult | SampleBenchResult]] = {
    "train": TrainBenchResult,
    "train-variants": TrainVariantsResult,
    "sample": SampleBenchResult,
}


def read_result(file: Path) -> BenchResult:
    """Return a result that `--json` printed into a file.

    Raises:
        FewstepError: the file is none.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        kind = content.get("kind") if isinstance(content, dict) else None
        return _KINDS.get(str(kind), TrainBenchResult).model_validate(content)
    except (OSError, ValueError) as error:  # pydantic's and json's are ValueErrors
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
        "| data wait | memory | as fast as |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        rows = _variant_rows(result) if isinstance(result, TrainVariantsResult) else [_row(result)]
        lines += [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([*lines, "", "```", *(result.environment.command for result in results), "```"])


def _row(result: TrainBenchResult | SampleBenchResult) -> list[str]:
    if isinstance(result, TrainBenchResult):
        what = f"{result.workload}, stage {result.stage}"
        wait, ratio = f"{result.data_wait_share:.2%}", ""
    else:
        what = f"{result.model}, {result.num_inference_steps} steps, {result.resolution} px"
        wait = ""
        ratio = "" if result.speedup is None else f"{result.speedup:.3g} × the teacher's {result.teacher_steps} steps"
    return [
        what,
        str(result.batch_size),
        mode(result),
        f"{result.images_per_second:.4g}",
        f"{result.tflops:.4g}",
        _mfu(result.mfu),
        f"{result.matmul_share:.1%}",
        f"{result.bare_share:.1%}",
        wait,
        memory(result.peak_memory_bytes),
        ratio,
    ]


def _variant_rows(result: TrainVariantsResult) -> list[list[str]]:
    return [
        [
            f"{result.workload}, stage {result.stage}: {variant.name}",
            str(result.batch_size),
            mode(result),
            f"{variant.images_per_second:.4g}",
            f"{variant.tflops:.4g}",
            _mfu(variant.mfu),
            "",
            "",
            "",
            "" if variant.peak_memory_bytes is None else memory(variant.peak_memory_bytes),
            f"{variant.ratio()} eager",
        ]
        for variant in result.variants
    ]


def _mfu(share: float | None) -> str:
    return "not known" if share is None else f"{share:.1%}"

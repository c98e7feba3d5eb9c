"""Rows of a report with chosen figures."""

from __future__ import annotations

from typing import Any

import torch

from fewstep.evaluate.baselines import Method, RowSpec
from fewstep.evaluate.distances import Estimate, percentile_interval
from fewstep.evaluate.rows import RowOutcome
from fewstep.evaluate.schema import Floor, Ratios, Report, Result


def result(method: Method, steps: int, **figures: Any) -> Result:
    values: dict[str, Any] = {
        "method": method,
        "num_inference_steps": steps,
        "guidance_scale": 4.0,
        "network_evaluations": steps if method == "student" else 2 * steps,
        "num_images": 1000,
    }
    metrics = {
        "kid_lite0_to_real": 0.1,
        "kid_lite0_to_teacher": 0.01,
        "fd_lite0_to_real": 100.0,
        "alignment": 0.3,
        "paired_mse": 0.05,
        "seconds_per_image": 0.01,
    } | figures
    intervals = {f"{name}_ci": None if value is None else (value, value) for name, value in metrics.items()}
    return Result(**values, **metrics, **intervals)


def outcome(method: Method, steps: int, kid: float, *, spread: float = 0.001, seed: int = 0) -> RowOutcome:
    """Return a row whose KID draws share a common part (the real pictures) and have one of their own."""
    common = torch.randn(2000, generator=torch.Generator().manual_seed(99), dtype=torch.float64) * 0.01
    own = torch.randn(2000, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread
    draws = kid + common + own
    estimate = Estimate(kid, percentile_interval(draws), draws)
    grid = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    return RowOutcome(RowSpec(method, steps), result(method, steps, kid_lite0_to_real=kid), estimate, grid)


def report(*rows: Result) -> Report:
    floor = Floor(
        kid_lite0=0.0,
        kid_lite0_ci=(-0.001, 0.001),
        fd_lite0=50.0,
        fd_lite0_ci=(45.0, 55.0),
        num_images=500,
        vae_kid_lite0=0.02,
        vae_kid_lite0_ci=(0.01, 0.03),
        alignment=None,
        alignment_ci=None,
    )
    ratios = Ratios(excess=[], kid_to_teachers_own=[], wall_clock=None)
    return Report(
        results=list(rows), floor=floor, ratios=ratios, settings={}, num_real_images=1000, versions={"torch": "2"}
    )

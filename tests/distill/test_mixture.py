"""The whole chain in short, on points whose guided distribution is known: one run, and what the paper says of it.

The bounds are wide: the run is a twentieth of `fewstep bench mixture`, whose figures docs/method.md has.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from fewstep.bench.mixture import run_mixture, to_markdown
from fewstep.bench.mixture_run import QUICK, Experiment, MixtureSettings
from fewstep.bench.plane import NUM_CLASSES, Plane
from fewstep.diffusion import CosineSchedule

pytestmark = pytest.mark.slow
WEIGHTS = (0.0, 1.0, 4.0)


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return run_mixture(MixtureSettings.model_validate(QUICK))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ladder": (4,)}, "must be of 1 step, below another"),
        ({"ladder": (4, 3, 1)}, "is not a divisor below 4"),
        ({"ladder": (4, 2, 1), "encoder": 16}, "encoder=16 is not in the ladder"),
        ({"num_points": 1000}, "no multiple of the 3 classes"),
        ({"weights": (9.0,)}, r"the weights \[9.0\] are outside 0"),
        ({"first_teacher_steps": 1}, "first_teacher_steps=1 is no multiple"),
    ],
)
def test_experiments_that_cannot_work_are_told_before_any_training(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixtureSettings.model_validate(changes)


#: Everything that the short form leaves out, at no length at all.
_REST = {
    "schedule": "stable_diffusion",
    "ladder": (4, 2, 1),
    "first_teacher_steps": 8,
    "naive": (),
    "encoder": 2,
    "single_w": (1.0,),
    "teacher_updates": 40,
    "guidance_updates": 20,
    "rung_updates": 10,
    "last_updates": 10,
    "last_rung_budgets": (),
    "teacher_steps": 20,
    "num_points": 300,
}


def test_what_the_short_form_leaves_out_runs_too() -> None:
    result = run_mixture(MixtureSettings.model_validate(_REST))
    methods = {row["method"] for row in result["rows"]}
    assert methods == {
        "teacher", "ddim", "stage_one", "student", "single_w", "stochastic", "stochastic_in_ddim",
        "student_in_stochastic",
    }  # fmt: skip
    figures = [value for row in result["rows"] for value in row.values() if isinstance(value, float)]
    assert all(math.isfinite(value) for value in figures)
    trip = result["round_trip"]
    assert trip["steps"] == 2
    assert all(math.isfinite(trip[name]) and trip[name] > 0 for name in ("students", "ddim"))


def test_exact_jumps_of_the_stochastic_sampler_end_at_the_data() -> None:
    """At w = 0 the exact denoiser in the stochastic sampler draws the data, at any number of steps."""
    run = Experiment(
        MixtureSettings.model_validate({**_REST, "schedule": "cosine", "num_points": 3000}), lambda line: None
    )
    figures = run.figures(run.exact(0.0, stochastic_steps=8), run.plane.draw(run.labels, run.generator))
    assert figures["sliced_wasserstein"] < 0.06


def _row(result: dict[str, Any], method: str, w: float, steps: int) -> dict[str, float]:
    (found,) = [row for row in result["rows"] if (row["method"], row["w"], row["steps"]) == (method, w, steps)]
    return found


def _of_teacher(result: dict[str, Any], w: float) -> dict[str, float]:
    return _row(result, "teacher", w, QUICK["teacher_steps"])


@pytest.mark.long
def test_one_network_replaces_the_guided_pair(result: dict[str, Any]) -> None:
    """Claim 1: error on weights that no table has, and the beginning as the conditional teacher."""
    facts = result["stage_one"]
    assert facts["new_student_is_the_conditional_teacher"]
    assert facts["relative_error"] < 0.05
    assert max(facts["by_w"].values()) < 0.07


@pytest.mark.long
def test_evaluations_are_halved_and_then_as_many_as_steps(result: dict[str, Any]) -> None:
    """Claims 2 and 8, counted."""
    for w in WEIGHTS:
        assert _of_teacher(result, w)["evaluations"] == 2 * QUICK["teacher_steps"]
        assert _row(result, "stage_one", w, QUICK["teacher_steps"])["evaluations"] == QUICK["teacher_steps"]
        for steps in (4, 2, 1):
            assert _row(result, "student", w, steps)["evaluations"] == steps
            assert _row(result, "naive", w, steps)["evaluations"] == 2 * steps


@pytest.mark.long
@pytest.mark.parametrize("steps", [16, 4, 2, 1])
def test_w_trades_spread_for_class_as_in_the_teacher(result: dict[str, Any], steps: int) -> None:
    """Claim 3: one model for the whole range of w."""
    rows = [_row(result, "student", w, steps) for w in WEIGHTS]
    for less, more in pairwise(rows):
        assert more["own_class"] > less["own_class"] + 0.05
        assert more["spread"] < less["spread"] - 0.05
    for w, row in zip(WEIGHTS, rows, strict=True):
        teacher = _of_teacher(result, w)
        assert row["own_class"] == pytest.approx(teacher["own_class"], abs=0.05)
        assert row["spread"] == pytest.approx(teacher["spread"], abs=0.08)


@pytest.mark.long
@pytest.mark.parametrize("w", WEIGHTS)
def test_students_of_few_steps_are_far_better_than_ddim(result: dict[str, Any], w: float) -> None:
    """Claim 6, at one and two steps; at four DDIM is near the floor that the teacher's own error sets."""
    for steps, share in ((1, 0.4), (2, 0.6)):
        student, plain = (_row(result, method, w, steps) for method in ("student", "ddim"))
        assert student["sliced_wasserstein"] < share * plain["sliced_wasserstein"]
        assert student["to_teacher"] < 0.4 * plain["to_teacher"]


@pytest.mark.long
@pytest.mark.parametrize("steps", [16, 4, 2, 1])
@pytest.mark.parametrize("w", WEIGHTS)
def test_students_keep_their_teachers_distance_to_the_truth(result: dict[str, Any], w: float, steps: int) -> None:
    """Claim 7: what the many-step guided teacher has, from 4 steps on; one step has lost a little more."""
    student, teacher = _row(result, "student", w, steps), _of_teacher(result, w)
    assert student["sliced_wasserstein"] < teacher["sliced_wasserstein"] + (0.07 if steps >= 4 else 0.12)
    if w > 0 and steps >= 4:
        # Point by point too, where DDIM at as many steps is not: by distributions alone 16 steps of it would pass.
        assert student["to_teacher"] < 0.7 * _row(result, "ddim", w, steps)["to_teacher"]


@pytest.mark.long
def test_the_guided_pair_distilled_as_it_is_fails_at_few_steps(result: dict[str, Any]) -> None:
    """Claim 14."""
    for steps, times in ((2, 2.0), (1, 3.0)):
        naive, student = (
            sum(_row(result, method, w, steps)["to_teacher"] for w in WEIGHTS) for method in ("naive", "student")
        )
        assert naive > times * student
    distances = [
        sum(_row(result, method, w, 1)["sliced_wasserstein"] for w in WEIGHTS) for method in ("naive", "student")
    ]
    assert distances[0] > 1.8 * distances[1]


@pytest.mark.long
def test_longer_training_of_the_last_rung_helps(result: dict[str, Any]) -> None:
    """Claim 9: the one-step student after a fifth of the updates, and after all of them."""
    short, whole = result["last_rung"]["0.2"], result["last_rung"]["1"]
    assert whole["to_teacher"] < 0.6 * short["to_teacher"]


@pytest.mark.long
def test_precision_and_recall_of_few_steps(result: dict[str, Any]) -> None:
    """Claim 22: precision like DDIM's of 32 steps, recall far above DDIM's of as few; w costs recall."""
    many = _row(result, "ddim", 1.0, 32)
    for steps in (1, 2, 4):
        student, plain = _row(result, "student", 1.0, steps), _row(result, "ddim", 1.0, steps)
        assert student["precision"] > many["precision"] - 0.08
        assert student["recall"] > many["recall"] - 0.15
        if steps < 4:
            assert student["recall"] > plain["recall"] + 0.1
    assert _row(result, "student", 4.0, 1)["recall"] < _row(result, "student", 0.0, 1)["recall"] - 0.1


@pytest.mark.long
def test_the_table_has_every_method(result: dict[str, Any]) -> None:
    table = to_markdown(result)
    for method in ("teacher", "ddim", "stage_one", "student", "naive"):
        assert table.count(f"| {method}") == len(WEIGHTS)


def test_the_exact_denoiser_is_the_mean_of_the_posterior() -> None:
    """E[v | z] by drawing: among many (x, eps) those whose z_t falls near z."""
    plane, generator = Plane.make(), torch.Generator().manual_seed(0)
    labels = torch.full((400_000,), 1)
    x, eps = plane.draw(labels, generator), torch.randn(len(labels), 2, generator=generator)
    alpha, sigma = torch.tensor([[0.8]]), torch.tensor([[0.6]])
    z, v = alpha * x + sigma * eps, alpha * eps - sigma * x
    for place in torch.tensor([[0.0, 0.0], [-0.5, 1.0], [-0.3, 0.5]]):
        near = (z - place).norm(dim=1) < 0.06
        expected = plane.velocity(place[None], alpha, sigma, torch.tensor([1]))
        torch.testing.assert_close(v[near].mean(0), expected[0], rtol=0, atol=0.06)


def test_the_exact_flow_has_the_data_at_w_zero_and_drops_the_common_cloud_at_w_four() -> None:
    run = Experiment(MixtureSettings(num_points=900), lambda line: None)
    data = run.plane.draw(run.labels, run.generator)
    in_the_middle = [
        float((points.norm(dim=1) < 0.75).float().mean()) for points in (data, run.exact(0.0), run.exact(4.0))
    ]
    assert in_the_middle[:2] == pytest.approx([0.5, 0.5], abs=0.06)
    assert in_the_middle[2] < 0.02
    for label in range(NUM_CLASSES):
        own, drawn = (points[run.labels == label] for points in (run.exact(0.0), data))
        torch.testing.assert_close(own.mean(0), drawn.mean(0), rtol=0, atol=0.2)
    assert isinstance(run.schedule, CosineSchedule)

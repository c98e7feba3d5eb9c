"""The whole chain of the paper on points of a plane, where the guided distribution is known: minutes on one core.

A small network is trained as a teacher for classifier-free guidance, then distilled: stage one, and ladders of every
kind. Each student is held against the exact guided flow (1000 steps of the exact denoiser) from the same noise, beside
DDIM with the teacher at the same number of steps.

`fewstep bench mixture` runs it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.bench.mixture_run import PRECISION_STEPS, Experiment, MixtureSettings, root_mean_square
from fewstep.bench.plane import NUM_CLASSES, PlaneNetwork, plane_denoiser
from fewstep.diffusion import ddim, ddim_encode
from fewstep.distill import DenoisingObjective, GuidanceObjective, guided_relative_error
from fewstep.models.denoiser import Denoiser


def run_mixture(settings: MixtureSettings | None = None, *, say: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Return the figures of the whole chain, as JSON has them.

    Keys: settings, seconds (of CPU), stage_one (relative errors by held-out w and by time; whether the new student
    equals the conditional teacher), rows (one for each method, w and number of steps), last_rung (the one-step student
    by its budget), round_trip (there and back, with the encoder students and with DDIM).

    A row's sliced_wasserstein is the mean over classes of the distance to what the exact flow makes of the same noise
    (for the stochastic sampler: to what it makes with exact jumps and the same draws); own_class the mean probability
    of the asked class; spread the root mean square distance from the class's mean; to_exact and to_teacher root mean
    square distances of end points begun at the same noise; precision and recall (3 nearest neighbours) are against
    data of the class, whatever w.

    Args:
        settings: None: the defaults.
        say: called with a line after each training.
    """
    settings = settings or MixtureSettings()
    started = time.process_time()
    run = Experiment(settings, say or (lambda line: None))
    everything = (0.0, settings.w_max)

    torch.manual_seed(settings.seed)
    teacher = plane_denoiser(PlaneNetwork(), run.schedule)
    run.train(DenoisingObjective(teacher), settings.teacher_updates)
    stage_one, facts = _stage_one(run, teacher)
    for w in settings.weights:
        run.measure("teacher", teacher, w, settings.teacher_steps, guided=True)
        for steps in sorted({*settings.ladder, *PRECISION_STEPS}):
            run.measure("ddim", teacher, w, steps, guided=True)
        run.measure("stage_one", stage_one, w, settings.teacher_steps)

    students = run.ladder("deterministic", stage_one, w=everything)
    _measure_all(run, "student", students)
    if settings.naive:
        _measure_all(run, "naive", run.ladder("naive", teacher, w=everything), guided=True)
    for w in settings.single_w:
        _measure_all(run, "single_w", run.ladder("single_w", teacher, w=(w, w)), weights=(w,))
    if settings.stochastic:
        of_sampler = run.ladder("stochastic", stage_one, w=everything)
        _measure_all(run, "stochastic", of_sampler, sampler="stochastic")
        _measure_all(run, "stochastic_in_ddim", of_sampler)
        _measure_all(run, "student_in_stochastic", students, sampler="stochastic")
    result = {
        "settings": settings.model_dump(mode="json"),
        "stage_one": facts,
        "rows": run.rows,
        "last_rung": _last_rung(run, students),
        "round_trip": _round_trip(run, stage_one, students) if settings.encoder else None,
    }
    return {**result, "seconds": time.process_time() - started}


def _measure_all(
    run: Experiment,
    method: str,
    students: dict[int, Denoiser],
    *,
    weights: Sequence[float] | None = None,
    guided: bool = False,
    sampler: str = "ddim",
) -> None:
    for steps, student in students.items():
        for w in run.settings.weights if weights is None else weights:
            run.measure(method, student, w, steps, guided=guided, sampler=sampler)


def _stage_one(run: Experiment, teacher: Denoiser) -> tuple[Denoiser, dict[str, Any]]:
    given = run.settings
    objective = GuidanceObjective(
        teacher, w_min=0.0, w_max=given.w_max, embedding_dim=given.embedding_dim, loss_weight="snr_plus_one"
    )
    held_out = run.batch(given.num_points)
    z, at = run.noise, run.schedule.times(2)[1].expand(len(run.noise))
    with torch.no_grad():
        of_teacher = teacher.conditional(run.condition)(z, at)
        equal = all(
            torch.equal(objective.of_student.conditional(run.condition, w)(z, at), of_teacher) for w in given.weights
        )
    run.train(objective, given.guidance_updates)
    student = objective.of_student
    errors = guided_relative_error(teacher, student, [held_out], weights=given.held_out_weights, seed=given.seed)
    run.say(f"stage one: relative error {errors.mean:.3f}")
    return student, {
        "relative_error": errors.mean,
        "by_w": {f"{w:g}": error for w, error in errors.by_w.items()},
        "by_time": errors.by_time,
        "new_student_is_the_conditional_teacher": equal,
    }


def _last_rung(run: Experiment, students: dict[int, Denoiser]) -> dict[str, dict[str, float]]:
    """Train the one-step student again with other budgets; return mean distances over the weights, by budget."""
    *_, before, last = run.settings.ladder
    trained = {1.0: students[last]}
    for budget in run.settings.last_rung_budgets:
        objective = run.rung(
            "deterministic",
            students[before],
            w=(0.0, run.settings.w_max),
            first=False,
            num_inference_steps=last,
            teacher_steps=before,
        )
        run.train(objective, round(budget * run.settings.last_updates))
        trained[budget] = objective.of_student
    by_budget = {}
    for budget, student in sorted(trained.items()):
        figures = []
        for w in run.settings.weights:
            ends = run.sample(student.conditional(run.condition, w), last)
            # Against the teacher of this rung: what it had to learn.
            target = run.sample(students[before].conditional(run.condition, w), before)
            figures.append((run.figures(ends, run.exact(w))["sliced_wasserstein"], root_mean_square(ends - target)))
        means = torch.tensor(figures, dtype=torch.float64).mean(0).tolist()
        by_budget[f"{budget:g}"] = {"sliced_wasserstein": means[0], "to_teacher": means[1]}
    return by_budget


def _round_trip(run: Experiment, stage_one: Denoiser, students: dict[int, Denoiser]) -> dict[str, float]:
    """Encode data and decode them again at w = 0; return root mean square errors, and what a change of class does."""
    steps = run.settings.encoder
    assert steps is not None
    encoder = run.ladder("encoder", stage_one, w=(0.0, 0.0), last=steps)[steps]
    x = run.plane.draw(run.labels, run.generator)
    common: dict[str, Any] = {
        "schedule": run.schedule,
        "prediction_type": "v_prediction",
        "num_inference_steps": steps,
    }

    def there_and_back(up: Denoiser, down: Denoiser, back_as: Tensor) -> Tensor:
        noise = ddim_encode(up.conditional(run.condition, 0.0), x, **common)
        return ddim(down.conditional({"label": back_as}, 0.0), noise, **common)

    other = (run.labels + 1) % NUM_CLASSES
    moved = there_and_back(encoder, students[steps], other)
    return {
        "steps": steps,
        "students": root_mean_square(there_and_back(encoder, students[steps], run.labels) - x),
        "ddim": root_mean_square(there_and_back(stage_one, stage_one, run.labels) - x),
        "own_class_of_data": float(run.plane.own_class(x, run.labels).mean()),
        "new_class_after_transfer": float(run.plane.own_class(moved, other).mean()),
        "old_class_after_transfer": float(run.plane.own_class(moved, run.labels).mean()),
    }


def to_markdown(result: dict[str, Any]) -> str:
    """Return the distances to the exact guided distribution as a table: methods and weights by number of steps."""
    steps = sorted({row["steps"] for row in result["rows"] if row["steps"] <= 64}, reverse=True)
    lines = ["| method | w | " + " | ".join(f"N = {n}" for n in steps) + " |", "|---" * (len(steps) + 2) + "|"]
    for method in dict.fromkeys(row["method"] for row in result["rows"]):
        for w in dict.fromkeys(row["w"] for row in result["rows"] if row["method"] == method):
            found = {row["steps"]: row for row in result["rows"] if (row["method"], row["w"]) == (method, w)}
            cells = [f"{found[n]['sliced_wasserstein']:.3f}" if n in found else "" for n in steps]
            more = [f", {n} steps: {row['sliced_wasserstein']:.3f}" for n, row in found.items() if n not in steps]
            lines.append(f"| {method}{''.join(more)} | {w:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)

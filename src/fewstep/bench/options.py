"""`fewstep bench options`: one rung of the ladder trained with each option from later work, and what came of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fewstep.bench.cells import with_interval
from fewstep.bench.checked import checked
from fewstep.errors import ModelError, RecipeError
from fewstep.plain_errors import plain_errors

if TYPE_CHECKING:
    from torch import Tensor

    from fewstep.bench.options_rung import OptionsSettings

UNTRAINED, AVERAGED = "before training", "ema handed on"


def run_options(
    settings: OptionsSettings | None = None, *, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Train one rung with each option, same seed and updates, and measure it against the guided teacher; JSON.

    Every row has the paired mean squared error of its latents to the teacher's (same prompt and noise), KID and the
    Fréchet distance to held-out real pictures in the features of `evaluate.features`, each with a 95 % interval over
    prompts; and the differences of the first two to the baseline's, drawn together. An option "does something" in a
    figure if that interval leaves out 0, and the difference is larger than any in the interval of what another seed
    makes: the first is chance in the prompts alone, the second chance in the training too.

    Args:
        settings: of the experiment.
        say: takes a line for each row, when it is measured.

    Raises:
        RecipeError: an unknown variant, or no baseline among them.
        ModelError: a model cannot be had, or they do not fit together.
    """
    import torch

    from fewstep.bench.options_rung import BASELINE, VARIANTS, OptionsSettings
    from fewstep.bench.result import Environment
    from fewstep.evaluate.features import limited_threads

    settings = settings or OptionsSettings()
    strangers = [name for name in settings.variants if name not in VARIANTS]
    if strangers or BASELINE not in settings.variants:
        raise RecipeError(
            f"variants={list(settings.variants)}: they must be among {list(VARIANTS)}, and {BASELINE!r} one of them"
        )
    began = time.perf_counter()
    with limited_threads(settings.num_threads):
        environment = Environment.here(torch.device("cpu"), "fewstep bench options")
        rows = _rows(settings, say)
    _compare_to_baseline(rows)
    for row in rows.values():
        row.pop("draws")
    return {
        "settings": settings.model_dump(mode="json"),
        "environment": environment.model_dump(mode="json"),
        "seconds": time.perf_counter() - began,
        "rows": rows,
    }


def _rows(settings: OptionsSettings, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    from fewstep.bench.options_rung import VARIANTS, make_data, sample_guided, sample_rung, train_rung
    from fewstep.evaluate.features import Lite0Features
    from fewstep.models import load_model, read_student_info
    from fewstep.tracking.fetch import fetch_model

    folder = fetch_model(settings.student)
    student, info = load_model(folder), read_student_info(folder)
    if info is None:
        raise ModelError(f"student={settings.student} is no student of fewstep: it has no fewstep.json")
    teacher = load_model(fetch_model(settings.teacher))
    features = Lite0Features(num_threads=settings.num_threads)
    data = make_data(settings, teacher)
    real, w = features(data.real), settings.guidance_scale - 1
    guided = sample_guided(teacher.denoiser(), data, num_inference_steps=settings.reference_steps, w=w)
    say(f"the teacher's {settings.reference_steps} guided steps are drawn")

    def measure(name: str, network: Any, **more: Any) -> dict[str, Any]:
        latents = sample_rung(student.denoiser(), network, data, num_inference_steps=settings.num_inference_steps, w=w)
        row = {**more, **_figures(latents, guided, features(teacher.decode(latents)), real, settings)}
        say(f"{name}: paired MSE {row['paired_mse']:.4f}, KID {row['kid']:.3f}")
        return row

    rows = {UNTRAINED: measure(UNTRAINED, student.network, source="")}
    for name in settings.variants:
        trained = train_rung(VARIANTS[name], settings, student, info, data)
        cost = {
            "cpu_seconds_per_update": trained.cpu_seconds_per_update,
            "trained_weights": trained.trained_weights,
        }
        rows[name] = measure(name, trained.network, source=VARIANTS[name].source, **cost)
        if trained.averaged is not None:
            rows[AVERAGED] = measure(AVERAGED, trained.averaged, source="decay 0.98, of the baseline", **cost)
    return rows


def _figures(latents: Tensor, guided: Tensor, drawn: Tensor, real: Tensor, settings: OptionsSettings) -> dict[str, Any]:
    from fewstep.evaluate import distances

    draws: dict[str, Any] = {"num_bootstrap": settings.num_bootstrap, "seed": settings.seed}
    mse = distances.mean_with_interval(distances.paired_mse(latents, guided), **draws)
    kid = distances.kid_with_interval(drawn, real, **draws)
    fd = distances.frechet_with_interval(drawn, real, seed=settings.seed)
    return {
        "paired_mse": mse.value,
        "paired_mse_ci": mse.interval,
        "kid": kid.value,
        "kid_ci": kid.interval,
        "fd": fd.value,
        "fd_ci": fd.interval,
        "draws": {"paired_mse": mse.draws, "kid": kid.draws},
    }


def _compare_to_baseline(rows: dict[str, dict[str, Any]]) -> None:
    """Add the differences to the baseline, and what they say."""
    from fewstep.bench.options_rung import BASELINE, OTHER_SEED
    from fewstep.evaluate.distances import percentile_interval

    baseline = rows[BASELINE]
    for row in rows.values():
        for name in ("paired_mse", "kid"):
            row[f"{name}_difference"] = row[name] - baseline[name]
            row[f"{name}_difference_ci"] = percentile_interval(row["draws"][name] - baseline["draws"][name])
    for label, row in rows.items():
        row["verdict"] = "" if label in (BASELINE, OTHER_SEED, UNTRAINED) else _verdict(row, rows.get(OTHER_SEED))


def _verdict(row: dict[str, Any], other_seed: dict[str, Any] | None) -> str:
    found = []
    for name, label in (("paired_mse", "paired MSE"), ("kid", "KID")):
        difference, (low, high) = row[f"{name}_difference"], row[f"{name}_difference_ci"]
        chance = 0.0 if other_seed is None else max(abs(end) for end in other_seed[f"{name}_difference_ci"])
        if (low > 0 or high < 0) and abs(difference) > chance:
            found.append(f"{'better' if difference < 0 else 'worse'} in {label}")
    return f"does something: {', '.join(found)}" if found else "does nothing measurable here"


def options_table(result: Mapping[str, Any]) -> str:
    """Return what `run_options` found as a Markdown table, with what it was taken on above it."""
    from fewstep.bench.options_rung import BASELINE

    settings, environment = result["settings"], result["environment"]
    head = (
        f"{settings['student']} to {settings['num_inference_steps']} steps: {settings['updates']} updates of "
        f"{settings['batch_size']} on {settings['num_train']} scenes; {settings['num_prompts']} held-out prompts at "
        f"guidance scale {settings['guidance_scale']:g}, {settings['num_real']} real pictures; 95 % intervals over "
        f"prompts; seed {settings['seed']}. {environment['device_name']}, {result['seconds'] / 60:.0f} min."
    )
    names = (
        "option", "source", "paired MSE to the teacher", "less that of the baseline", "kid_lite0 to real",
        "less that of the baseline", "fd_lite0 to real", "CPU s an update", "trained weights", "verdict",
    )  # fmt: skip
    lines = [head, "", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for name, row in result["rows"].items():
        cells = [
            name,
            row["source"],
            with_interval(row, "paired_mse"),
            "" if name == BASELINE else with_interval(row, "paired_mse_difference", sign="+"),
            with_interval(row, "kid"),
            "" if name == BASELINE else with_interval(row, "kid_difference", sign="+"),
            with_interval(row, "fd", digits=1),
            f"{row['cpu_seconds_per_update']:.2f}" if "cpu_seconds_per_update" in row else "",
            f"{row['trained_weights'] / 1e6:.2f} M" if "trained_weights" in row else "",
            row["verdict"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--student", help="MODEL that teaches the rung.  [default: asset:emoji-student-4]")
@click.option("--steps", "num_inference_steps", type=int, help="Steps of the rung.  [default: 2]")
@click.option("--updates", type=int, help="Updates of each training.  [default: 200]")
@click.option("--variant", "variants", multiple=True, help="A row, once for each; the baseline must be one of them.")
@click.option("--seed", type=int, help="Seed of everything.  [default: 0]")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Also write all figures to this file.")
@plain_errors
def options(file: Path | None, **values: Any) -> None:
    """Train one rung of the emoji ladder with each option from later work, and print what came of it as a table.

    One CPU thread, about an hour.
    """
    from fewstep.bench.options_rung import OptionsSettings

    given = {name: value for name, value in values.items() if value not in (None, ())}
    settings = checked(OptionsSettings, given, names={"num_inference_steps": "steps", "variants": "variant"})
    result = run_options(settings, say=lambda line: click.echo(line, err=True))
    if file is not None:
        file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    click.echo(options_table(result), nl=False)

"""`fewstep bench translation`: pictures translated from one style to another by distilled encoders and decoders."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fewstep.bench.cells import with_interval
from fewstep.bench.checked import checked
from fewstep.plain_errors import plain_errors

if TYPE_CHECKING:
    from fewstep.bench.translation_run import TranslationSettings
    from fewstep.recipe import Recipe
    from fewstep.storage import Storage


def translation_table(result: Mapping[str, Any]) -> str:
    """Return what `run_translation` found as a Markdown table, with what it was taken on above it."""
    settings, environment = result["settings"], result["environment"]
    head = (
        f"{result['recipe']}: {result['count']} held-out pictures from {settings['source']} to {settings['target']}, "
        f"encoded at w = 0 and decoded at w = {settings['w']:g}; KID to {result['num_real']} real pictures of "
        f"{settings['target']}, and of the pictures as they came {result['kid_before']:.3f}; 95 % intervals over "
        f"pictures; seed {settings['seed']}. {environment['device_name']}, {result['seconds'] / 60:.0f} min."
    )
    names = ["encoder and decoder", "evaluations", "round trip, relative error", "round trip, pixel MSE"]
    names += ["translated: pixel MSE to the teacher's", "kid_lite0 to real"]
    lines = [head, "", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in result["rows"]:
        cells = [
            f"{row['method']}, {row['num_inference_steps']} + {row['num_inference_steps']} steps",
            str(row["evaluations"]),
            with_interval(row, "relative_error", digits=3),
            with_interval(row, "round_trip_mse"),
            with_interval(row, "translated_mse") if "translated_mse" in row else "",
            with_interval(row, "kid", digits=3),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def run_translation(
    recipe: Recipe, storage: Storage, settings: TranslationSettings | None = None, *, grid: Path | None = None
) -> dict[str, Any]:
    """Translate the recipe's held-out pictures with each pair of its students and with the teacher; JSON.

    Args:
        recipe: one whose progressive stage has run, with the kinds deterministic and encoder.
        storage: its object store.
        settings: of the experiment.
        grid: file for a picture of some of them, PNG.

    Raises:
        RecipeError: the recipe makes no such students, or not of one number of steps.
        DataError: too few held-out captions have the word.
    """
    from fewstep.bench.result import Environment
    from fewstep.bench.translation_run import TranslationSettings, load_pairs, read_pictures, translate_rows
    from fewstep.stages.device import driver_device

    settings = settings or TranslationSettings()
    began = time.perf_counter()
    device = driver_device(recipe.cluster)
    pairs = load_pairs(recipe, storage, settings, device=device)
    pictures = read_pictures(recipe, storage, settings, resolution=pairs[0].decoder.parts.resolution)
    found = translate_rows(pairs, pictures, settings)
    if grid is not None:
        found.draw(settings.num_shown).save(grid)
    return {
        "recipe": recipe.name,
        "settings": settings.model_dump(mode="json"),
        "environment": Environment.here(device, "fewstep bench translation").model_dump(mode="json"),
        "count": len(pictures.pixels),
        "num_real": len(pictures.real),
        "kid_before": found.kid_before,
        "seconds": time.perf_counter() - began,
        "rows": found.figures,
    }


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--from", "source", help="Word of the captions to begin from.  [default: twemoji]")
@click.option("--to", "target", help="Word to put in its place.  [default: openmoji]")
@click.option("-w", "w", type=float, help="Guidance weight of the decoder.  [default: 1]")
@click.option("--count", type=int, help="Pictures to translate.  [default: 128]")
@click.option("--reference-steps", type=int, help="Steps of the teacher, each way.  [default: 64]")
@click.option("--grid", type=click.Path(path_type=Path), help="Also draw some of them into this PNG file.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Also write all figures to this file.")
@plain_errors
def translation(recipe: Path, grid: Path | None, file: Path | None, **values: Any) -> None:
    """Translate held-out pictures of RECIPE from one style to another, and measure the round trip, with the students of
    each number of steps and with the teacher's DDIM.

    RECIPE must have run, with the ladders deterministic and encoder.

    Example: fewstep bench translation workflows/recipes/emoji-style-transfer.yaml
    """
    from fewstep.bench.translation_run import TranslationSettings
    from fewstep.recipe import load_recipe
    from fewstep.workplace import open_workplace

    given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    settings = checked(TranslationSettings, given, names={"source": "from", "target": "to"})
    loaded = load_recipe(recipe)
    with open_workplace(loaded) as workplace:
        result = run_translation(loaded, workplace.storage, settings, grid=grid)
    if file is not None:
        file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    click.echo(translation_table(result), nl=False)

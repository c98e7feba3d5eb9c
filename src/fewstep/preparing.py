"""`fewstep prepare`: the first stage by itself, and what it counted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fewstep.errors import RecipeError
from fewstep.recipe import Recipe
from fewstep.stages.fingerprints import drawn_splits
from fewstep.stages.metadata import report_lines, report_of, select_rows
from fewstep.train.cluster import local_ray
from fewstep.workflow import run_stage
from fewstep.workplace import open_workplace


def prepare_lines(recipe: Recipe, *, out: Path) -> Iterator[str]:
    """Run the prepare stage, and yield its report and the addresses of the shards as lines."""
    with open_workplace(recipe) as workplace, local_ray(recipe.cluster):
        facts = run_stage("prepare", recipe, workplace, out=out).facts
    if "report" in facts:
        yield from report_lines(facts["report"])
    for split in drawn_splits(recipe):
        if split in facts:
            yield f"{split:20} {facts[split]['uri']}"


def select_lines(recipe: Recipe) -> Iterator[str]:
    """Choose the rows of the recipe's metadata, and yield the report and the addresses of their tables as lines.

    Raises:
        RecipeError: the recipe prepares nothing from metadata.
    """
    settings = recipe.prepare_metadata
    if settings is None or "prepare" not in recipe.stages:
        raise RecipeError(
            "--select-only is for recipes that have prepare_metadata, and prepare among their stages; this one has not"
        )
    splits = [split for split in drawn_splits(recipe) if settings.num_samples(split) != 0]
    with open_workplace(recipe) as workplace, local_ray(recipe.cluster):
        selection = select_rows(settings, splits=splits, storage=workplace.storage, cluster=recipe.cluster)
    yield from report_lines(report_of(settings, selection.counts))
    for split in splits:
        parts = [part for part in selection.parts if part.split == split]
        folder = parts[0].uri.rpartition("/")[0] if parts else ""
        yield f"{split:20} {folder}/*.parquet ({sum(part.num_rows for part in parts):,} rows)"

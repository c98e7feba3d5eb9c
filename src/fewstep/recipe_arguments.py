"""The arguments by which commands take a recipe, and the folder of what they show."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from fewstep.recipe import Recipe

RECIPE = click.argument("recipe", type=click.Path(path_type=Path))

RECIPE_OPTION = click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    help="Recipe whose store and MLflow s3:// and models:/ mean.  [default: those of the environment, or the "
    "embedded ones in $FEWSTEP_HOME]",
)

SET_OPTION = click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a key of the recipe, such as cluster.num_workers=8; again for further ones. Wins over $FEWSTEP_SET.",
)

OUT_OPTION = click.option(
    "--out", type=click.Path(path_type=Path), help="Folder for the report.  [default: NAME in $FEWSTEP_RUNS, or runs]"
)


def out_folder(out: Path | None, name: str) -> Path:
    """Return the folder for what a user looks at: the one that is named, or NAME in $FEWSTEP_RUNS or ``runs``."""
    return out or Path(os.environ.get("FEWSTEP_RUNS") or "runs") / name


def recipe_of(path: Path | None) -> Recipe | None:
    """Return the recipe of an option; None when it was not given."""
    from fewstep.recipe import load_recipe

    return None if path is None else load_recipe(path)

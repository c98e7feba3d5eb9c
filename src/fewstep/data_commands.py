"""The commands that make shards and look at them."""

from __future__ import annotations

from pathlib import Path

import click

from fewstep.plain_errors import plain_errors
from fewstep.recipe_arguments import OUT_OPTION, RECIPE, SET_OPTION, out_folder, recipe_of


@click.command()
@RECIPE
@click.option("--select-only", is_flag=True, help="Choose the rows and print the report, but download nothing.")
@OUT_OPTION
@SET_OPTION
@plain_errors
def prepare(recipe: Path, select_only: bool, out: Path | None, changes: tuple[str, ...]) -> None:
    """Make the shards of RECIPE: choose rows of its metadata and download their pictures, or draw its picture set.

    Prints how many rows each filter left out, and what became of the downloads. A run that was stopped goes on where it
    was.
    """
    from fewstep.preparing import prepare_lines, select_lines
    from fewstep.recipe import load_recipe

    loaded = load_recipe(recipe, changes=changes)
    for line in select_lines(loaded) if select_only else prepare_lines(loaded, out=out_folder(out, loaded.name)):
        click.echo(line)


@click.command()
@click.argument("shards")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for the files.  [default: $FEWSTEP_RUNS/inspect, or runs/inspect]",
)
@click.option("--max-samples", type=click.IntRange(1), default=10_000, show_default=True, help="Samples looked at.")
@click.option("--show", type=click.IntRange(1), default=48, show_default=True, help="Pictures on the contact sheet.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of what is drawn.")
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    help="Recipe whose store s3:// means, and whose filters and captions are applied.  [default: that of the "
    "environment, or the embedded one]",
)
@plain_errors
def inspect(shards: str, out: Path | None, max_samples: int, show: int, seed: int, recipe: Path | None) -> None:
    """Look at SHARDS, a folder of webdataset tars: counts, sizes, captions, metadata, bad samples, a contact sheet.

    Example: fewstep inspect s3://distill/laion/train --recipe my-recipe.yaml
    """
    from fewstep.inspection import inspect_data

    folder = out_folder(out, "inspect")
    for line in inspect_data(
        shards, folder, recipe=recipe_of(recipe), max_samples=max_samples, num_shown=show, seed=seed
    ):
        click.echo(line)

"""The commands that show the versions of a registered model and move its aliases."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fewstep.errors import TrackingError
from fewstep.plain_errors import plain_errors
from fewstep.recipe_arguments import RECIPE_OPTION, recipe_of

if TYPE_CHECKING:
    from fewstep.tracking.registry import RegisteredModel, Registry


@click.command()
@click.argument("model")
@click.option("--alias", default="champion", show_default=True, help="Alias that is moved; champion is what is served.")
@click.option("--force", is_flag=True, help="Even if the version failed its gate.")
@RECIPE_OPTION
@plain_errors
def promote(model: str, alias: str, force: bool, recipe: Path | None) -> None:
    """Move an alias to MODEL, models:/NAME/VERSION or models:/NAME@ALIAS: to approve a version, or to roll back.

    What is served follows the alias. A version that failed its gate is refused, unless it is forced.

    Example: fewstep promote models:/fewstep-demo/3
    """
    registry = _registry(recipe)
    found = registry.get(model)
    if found.passed is False and alias != "candidate":
        if not force:
            raise TrackingError(
                f"{found.uri} failed its gate: {found.reason}. Take another version (`fewstep versions {found.name}`), "
                f"or --force to make it {alias} all the same"
            )
        click.echo(f"{found.uri} failed its gate: {found.reason}", err=True)
    before = registry.set_alias(found.name, alias, found.version)
    moved = f"version {found.version} as before" if before == found.version else f"version {before} → {found.version}"
    click.echo(f"models:/{found.name}@{alias}: {moved if before else f'none → version {found.version}'}")


@click.command()
@click.argument("name")
@RECIPE_OPTION
@plain_errors
def versions(name: str, recipe: Path | None) -> None:
    """List the versions of the registered model NAME, newest first: what may be promoted or rolled back to.

    Example: fewstep versions fewstep-demo
    """
    models = _registry(recipe).known_versions(name.removeprefix("models:/"))
    rows = [("version", "aliases", "steps", "gate", "created (UTC)"), *map(_row, models)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _row(model: RegisteredModel) -> tuple[str, ...]:
    verdict = {True: "passed", False: "failed", None: "not judged"}[model.passed]
    created = datetime.fromtimestamp(model.created_ms / 1000, UTC)
    return (
        str(model.version),
        ", ".join(model.aliases) or "-",
        str(model.num_inference_steps or "-"),
        verdict,
        f"{created:%Y-%m-%d %H:%M}",
    )


def _registry(recipe: Path | None) -> Registry:
    from fewstep.tracking.registry import Registry
    from fewstep.tracking.settings import TrackingSettings
    from fewstep.tracking.tracker import Tracker

    loaded = recipe_of(recipe)
    # Aliases and tags are MLflow's; the store, which has the files, is not needed.
    return Registry(Tracker.open(loaded.tracking if loaded else TrackingSettings()))

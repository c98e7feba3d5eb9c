"""The commands that run stages."""

from __future__ import annotations

from pathlib import Path

import click

from fewstep.plain_errors import plain_errors
from fewstep.recipe_arguments import OUT_OPTION, RECIPE, SET_OPTION, out_folder


@click.command()
@RECIPE
@OUT_OPTION
@SET_OPTION
@plain_errors
def run(recipe: Path, out: Path | None, changes: tuple[str, ...]) -> None:
    """Run all stages of RECIPE in order: skip what is done, go on with what was stopped."""
    from fewstep.recipe import load_recipe
    from fewstep.workflow import run_workflow
    from fewstep.workplace import open_workplace

    loaded = load_recipe(recipe, changes=changes)
    folder = out_folder(out, loaded.name)
    with open_workplace(loaded) as workplace:
        artifacts = run_workflow(loaded, workplace, out=folder)
    for name, artifact in artifacts.items():
        for label, uri in artifact.models().items() or [(name, artifact.uri)]:
            click.echo(f"{label:20} {uri}")
    if "evaluate" in artifacts:
        click.echo(f"{'report':20} {folder / 'report.html'}")


@click.command()
@click.argument("name")
@RECIPE
@OUT_OPTION
@SET_OPTION
@plain_errors
def stage(name: str, recipe: Path, out: Path | None, changes: tuple[str, ...]) -> None:
    """Run one stage NAME of RECIPE; the stages before it must have finished.

    NAME is prepare, teacher, encode, convert, guidance, progressive, evaluate, register or promote. This is what a
    Kubernetes job runs.
    """
    from typing import cast

    from fewstep.recipe import StageName, load_recipe
    from fewstep.workflow import run_stage
    from fewstep.workplace import open_workplace

    loaded = load_recipe(recipe, changes=changes)
    with open_workplace(loaded) as workplace:
        artifact = run_stage(cast(StageName, name), loaded, workplace, out=out_folder(out, loaded.name))
    for label, uri in artifact.models().items() or [(name, artifact.uri)]:
        click.echo(f"{label} {uri}")


@click.command()
@RECIPE
@click.argument("students", nargs=-1)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the report.")
@SET_OPTION
@plain_errors
def evaluate(recipe: Path, students: tuple[str, ...], out: Path, changes: tuple[str, ...]) -> None:
    """Compare STUDENTS with the teacher of RECIPE and its plain samplers, and write a report with pictures.

    Held-out shards, teacher and settings come from the recipe; each of STUDENTS is a MODEL that says itself how many
    steps it was made for. The stages before `encode` must have run.

    Example: fewstep evaluate workflows/recipes/demo.yaml models:/fewstep-demo@champion --out runs/compare
    """
    from fewstep.recipe import load_recipe
    from fewstep.stages.evaluate import evaluate_models
    from fewstep.workplace import open_workplace

    loaded = load_recipe(recipe, changes=changes)
    with open_workplace(loaded) as workplace:
        files = evaluate_models(loaded, workplace.storage, workplace.tracker, students=students, out=out)
    click.echo(str(files.html))


@click.command()
@click.option("--deadline-s", type=click.FloatRange(min=1), required=True, help="Seconds until this machine is gone.")
@click.option("--address", envvar="RAY_ADDRESS", required=True, help="The Ray cluster, host:port.  [$RAY_ADDRESS]")
@click.option("--node-id", help="This machine's node in it.  [default: the only one with its address]")
@plain_errors
def drain(deadline_s: float, address: str, node_id: str | None) -> None:
    """Tell Ray that this machine is about to be taken away, and wait until its training workers have gone.

    Trainings write a checkpoint at once and go on without it. Pods of workers run this before they are stopped
    (preStop); where no training worker is, it does nothing.
    """
    from fewstep.train.drain import drain_this_node

    if not drain_this_node(address, deadline_s=deadline_s, node_id=node_id):
        click.echo("no training worker runs here: nothing to drain")

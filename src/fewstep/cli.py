"""The command line: one command per job. Errors that a user can mend are one line and status 2."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from fewstep.bench.commands import bench
from fewstep.plain_errors import plain_errors

MODEL_HELP = "a folder, s3://…, models:/NAME@champion, asset:NAME, or a hub id ORG/NAME"
DEMO_RECIPE = Path("workflows/recipes/demo.yaml")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="fewstep")
@click.option("-v", "--verbose", is_flag=True, help="Say more.")
def main(verbose: bool) -> None:
    """Turn a classifier-free-guided diffusion model into a student that needs 1 to 4 steps, and serve it.

    Begin with `fewstep run RECIPE`: it runs every stage of a recipe on this machine and goes on where it was when it is
    called again. MODEL is always a folder, an s3:// URI, a hub id, a models:/ URI of the registry, or asset:NAME.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("fewstep").setLevel(logging.DEBUG if verbose else logging.INFO)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _quiet_libraries()


main.add_command(bench)


def _quiet_libraries() -> None:
    import warnings

    # Progress bars and advice of the libraries would bury our own lines.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)


def _out_folder(out: Path | None, name: str) -> Path:
    return out or Path("runs") / name


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the report.  [default: runs/NAME]")
@plain_errors
def run(recipe: Path, out: Path | None) -> None:
    """Run all stages of RECIPE in order: skip what is done, go on with what was stopped."""
    from fewstep.recipe import load_recipe
    from fewstep.workflow import run_workflow
    from fewstep.workplace import open_workplace

    loaded = load_recipe(recipe)
    folder = _out_folder(out, loaded.name)
    with open_workplace(loaded) as workplace:
        artifacts = run_workflow(loaded, workplace, out=folder)
    for name, artifact in artifacts.items():
        for label, uri in artifact.models().items() or [(name, artifact.uri)]:
            click.echo(f"{label:20} {uri}")
    if "evaluate" in artifacts:
        click.echo(f"{'report':20} {folder / 'report.html'}")


@main.command()
@click.argument("name")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the report.  [default: runs/NAME]")
@plain_errors
def stage(name: str, recipe: Path, out: Path | None) -> None:
    """Run one stage NAME of RECIPE; the stages before it must have finished.

    NAME is prepare, teacher, encode, guidance, progressive, evaluate or register. This is what a Kubernetes job runs.
    """
    from typing import cast

    from fewstep.recipe import StageName, load_recipe
    from fewstep.workflow import run_stage
    from fewstep.workplace import open_workplace

    loaded = load_recipe(recipe)
    with open_workplace(loaded) as workplace:
        artifact = run_stage(cast(StageName, name), loaded, workplace, out=_out_folder(out, loaded.name))
    for label, uri in artifact.models().items() or [(name, artifact.uri)]:
        click.echo(f"{label} {uri}")


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path), default=DEMO_RECIPE)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the report.  [default: runs/NAME]")
@plain_errors
def demo(recipe: Path, out: Path | None) -> None:
    """Run the demo RECIPE to its end, serve the student for a moment, and fetch one picture over HTTP."""
    from fewstep.demo import run_demo

    for line in run_demo(recipe, out):
        click.echo(line)


_RECIPE_OPTION = click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    help="Recipe whose store and MLflow s3:// and models:/ mean.  [default: the embedded ones in $FEWSTEP_HOME]",
)


def _recipe(path: Path | None) -> Any:
    from fewstep.recipe import load_recipe

    return None if path is None else load_recipe(path)


@main.command()
@click.argument("model")
@click.argument("prompts", nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path(), help="Folder for the PNG files.  [default: .]")
@click.option("--steps", "num_inference_steps", type=int, help="Steps.  [default: those the student was made for]")
@click.option("--guidance-scale", type=float, help="Guidance scale, 1 + w.  [default: the student's]")
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of the first picture; one more for each next."
)
@_RECIPE_OPTION
@plain_errors
def sample(
    model: str,
    prompts: tuple[str, ...],
    out: Path,
    num_inference_steps: int | None,
    guidance_scale: float | None,
    seed: int,
    recipe: Path | None,
) -> None:
    """Make one PNG for each of PROMPTS with MODEL, a student or a teacher.

    Example: fewstep sample asset:emoji-student-4 "a red apple, twemoji" "two fruits on blue"
    """
    from fewstep.models import load_parts, read_student_info
    from fewstep.serve.files import default_device, save_images
    from fewstep.workplace import open_model

    with open_model(model, _recipe(recipe)) as folder:
        files = save_images(
            out,
            load_parts(folder).to(default_device()),
            read_student_info(folder),
            model=model,
            prompts=prompts,
            seeds=[seed + number for number in range(len(prompts))],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )
    for file in files:
        click.echo(str(file))


@main.command()
@click.argument("model")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--half", is_flag=True, help="Store the weights as float16, half the size.")
@click.option("--on", "base", metavar="NAME", help="Leave out what asset:NAME has: the U-Net alone is left, to ship.")
@_RECIPE_OPTION
@plain_errors
def export(model: str, folder: Path, half: bool, base: str | None, recipe: Path | None) -> None:
    """Write MODEL to FOLDER as a plain diffusers folder, which StableDiffusionPipeline.from_pretrained reads.

    Example: fewstep export models:/fewstep-demo@champion my-student
    """
    from fewstep.models.export import export_model
    from fewstep.workplace import open_model

    with open_model(model, _recipe(recipe)) as source:
        export_model(source, folder, half=half, base=base)
    click.echo(str(folder))


@main.command()
@click.argument("models", nargs=-1)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=int, default=8000, show_default=True, help="Port; 0 takes a free one.")
@_RECIPE_OPTION
@plain_errors
def serve(models: tuple[str, ...], host: str, port: int, recipe: Path | None) -> None:
    """Serve students over HTTP with the OpenAI Images API until Ctrl-C.

    MODELS are students, the first is the default. Without any: the champion that the demo left in the embedded
    registry, or else the emoji students that ship with fewstep.

    Example: fewstep serve models:/fewstep-demo@champion
    """
    from fewstep.serving import default_models, served

    loaded = _recipe(recipe)
    with served(models or default_models(loaded), host=host, port=port, recipe=loaded) as server:
        click.echo("Stop with Ctrl-C.")
        with suppress(KeyboardInterrupt):  # the way to stop it, so no error
            server.wait()
    click.echo("Stopped serving.")


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("students", nargs=-1)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the report.")
@plain_errors
def evaluate(recipe: Path, students: tuple[str, ...], out: Path) -> None:
    """Compare STUDENTS with the teacher of RECIPE and its plain samplers, and write a report with pictures.

    Held-out shards, teacher and settings come from the recipe; each of STUDENTS is a MODEL that says itself how many
    steps it was made for. The stages before `encode` must have run.

    Example: fewstep evaluate workflows/recipes/demo.yaml models:/fewstep-demo@champion --out runs/compare
    """
    from fewstep.recipe import load_recipe
    from fewstep.stages.evaluate import evaluate_models
    from fewstep.workplace import open_workplace

    loaded = load_recipe(recipe)
    with open_workplace(loaded) as workplace:
        files = evaluate_models(loaded, workplace.storage, workplace.tracker, students=students, out=out)
    click.echo(str(files.html))


@main.command()
@plain_errors
def keys() -> None:
    """List every key of a recipe with its default and meaning (Markdown)."""
    from fewstep.recipe_keys import recipe_keys

    click.echo(recipe_keys(), nl=False)


if __name__ == "__main__":
    main()

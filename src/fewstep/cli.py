"""The command line: one command per job. Errors that a user can mend are one line and status 2."""

from __future__ import annotations

import logging
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import click

from fewstep.bench.commands import bench
from fewstep.data_commands import inspect, prepare
from fewstep.plain_errors import plain_errors
from fewstep.recipe_arguments import OUT_OPTION, RECIPE, RECIPE_OPTION, SET_OPTION, recipe_of
from fewstep.registry_commands import promote, versions
from fewstep.stage_commands import drain, evaluate, run, stage

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


for command in (bench, drain, evaluate, inspect, prepare, promote, run, stage, versions):
    main.add_command(command)


def _quiet_libraries() -> None:
    import warnings

    # Progress bars and advice of the libraries would bury our own lines.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path), default=DEMO_RECIPE)
@OUT_OPTION
@plain_errors
def demo(recipe: Path, out: Path | None) -> None:
    """Run the demo RECIPE to its end, serve the student for a moment, and fetch one picture over HTTP."""
    from fewstep.demo import run_demo

    for line in run_demo(recipe, out):
        click.echo(line)


_INTERVAL_OPTION = click.option(
    "--guidance-interval",
    type=float,
    nargs=2,
    metavar="LOW HIGH",
    help="Guide only steps that begin at t in LOW … HIGH (0 clean, 1 noise); elsewhere with the least weight trained.",
)
_EXTRAPOLATE_OPTION = click.option(
    "--extrapolate", is_flag=True, help="Take a guidance scale outside the student's trained range on purpose."
)


@main.command()
@click.argument("model")
@click.argument("prompts", nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path(), help="Folder for the PNG files.  [default: .]")
@click.option("--steps", "num_inference_steps", type=int, help="Steps.  [default: those the student was made for]")
@click.option("--guidance-scale", type=float, help="Guidance scale, 1 + w.  [default: the student's]")
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of the first picture; one more for each next."
)
@click.option("--negative-prompt", help="What to lead away from: for teachers; a student has no branch for it.")
@_INTERVAL_OPTION
@_EXTRAPOLATE_OPTION
@RECIPE_OPTION
@plain_errors
def sample(
    model: str,
    prompts: tuple[str, ...],
    out: Path,
    num_inference_steps: int | None,
    guidance_scale: float | None,
    seed: int,
    negative_prompt: str | None,
    guidance_interval: tuple[float, float] | None,
    extrapolate: bool,
    recipe: Path | None,
) -> None:
    """Make one PNG for each of PROMPTS with MODEL, a student or a teacher.

    Each is drawn by the model's own sampler: a stochastic student's is deterministic for a seed too.

    Example: fewstep sample asset:emoji-student-4 "a red apple, twemoji" "two fruits on blue"
    """
    from fewstep.models import load_text_to_image, read_student_info
    from fewstep.serve.files import default_device, save_images
    from fewstep.workplace import open_model

    with open_model(model, recipe_of(recipe)) as folder:
        files = save_images(
            out,
            load_text_to_image(folder).to(default_device()),
            read_student_info(folder),
            model=model,
            prompts=prompts,
            seeds=[seed + number for number in range(len(prompts))],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            negative_prompt=negative_prompt,
            extrapolate=extrapolate,
        )
    for file in files:
        click.echo(str(file))


@main.command()
@click.argument("model")
@click.argument("image", type=click.Path(path_type=Path))
@click.option("--prompt", "prompts", multiple=True, required=True, help="What to draw; again for further pictures.")
@click.option("--strength", type=float, help="How far to go, in (0, 1].  [default: 0.5; with --mask 1]")
@click.option("--mask", type=click.Path(path_type=Path), help="Picture that is white where IMAGE is drawn anew.")
@click.option("--keep-pixels", is_flag=True, help="With --mask: put IMAGE's own pixels back around the hole.")
@click.option("--from-prompt", help="What IMAGE shows: it is encoded to noise and decoded as --prompt says.")
@click.option("--encoder", help="What encodes it: an encoder student or a teacher.  [default: MODEL, if a teacher]")
@click.option("--out", type=click.Path(path_type=Path), default=Path(), help="Folder for the PNG files.  [default: .]")
@click.option("--steps", "num_inference_steps", type=int, help="Steps of a teacher.  [default: 50; students: own]")
@click.option("--guidance-scale", type=float, help="Guidance scale, 1 + w.  [default: the student's]")
@click.option("--seed", type=int, help="Seed of the first picture; one more for each next.  [default: 0]")
@_INTERVAL_OPTION
@_EXTRAPOLATE_OPTION
@RECIPE_OPTION
@plain_errors
def edit(
    model: str,
    image: Path,
    prompts: tuple[str, ...],
    strength: float | None,
    mask: Path | None,
    keep_pixels: bool,
    from_prompt: str | None,
    encoder: str | None,
    out: Path,
    num_inference_steps: int | None,
    guidance_scale: float | None,
    seed: int | None,
    guidance_interval: tuple[float, float] | None,
    extrapolate: bool,
    recipe: Path | None,
) -> None:
    """Change the picture IMAGE with MODEL, a student or a teacher, into one PNG for each --prompt.

    Without further options it is noised and drawn over (image-to-image). --mask draws only a hole of it anew
    (inpainting); --from-prompt keeps its layout and changes what it shows (translation, such as of style).

    Example: fewstep edit asset:emoji-student-4 apple.png --prompt "a green apple, openmoji" --strength 0.5
    """
    from contextlib import ExitStack

    from fewstep.serve.edit import Edit, load_for_editing, save_edits
    from fewstep.workplace import open_model

    with ExitStack() as opened:
        loaded = recipe_of(recipe)
        drawing, encoding = load_for_editing(
            opened.enter_context(open_model(model, loaded)),
            name=model,
            num_inference_steps=num_inference_steps,
            encoder=None if encoder is None else opened.enter_context(open_model(encoder, loaded)),
            encoder_name=encoder or "",
        )
        files = save_edits(
            out,
            drawing,
            Edit(
                image,
                strength=strength,
                mask=mask,
                keep_pixels=keep_pixels,
                from_prompt=from_prompt,
                encoder=encoding,
                seed=seed,
            ),
            name=model,
            prompts=prompts,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            extrapolate=extrapolate,
        )
    for file in files:
        click.echo(str(file))


@main.command()
@click.argument("model")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--half", is_flag=True, help="Store the weights as float16, half the size.")
@click.option("--on", "base", metavar="NAME", help="Leave out what asset:NAME has: the U-Net alone is left, to ship.")
@RECIPE_OPTION
@plain_errors
def export(model: str, folder: Path, half: bool, base: str | None, recipe: Path | None) -> None:
    """Write MODEL to FOLDER as a plain diffusers folder, which StableDiffusionPipeline.from_pretrained reads.

    Example: fewstep export models:/fewstep-demo@champion my-student
    """
    from fewstep.models.export import export_model
    from fewstep.workplace import open_model

    with open_model(model, recipe_of(recipe)) as source:
        export_model(source, folder, half=half, base=base)
    click.echo(str(folder))


@main.command()
@click.argument("models", nargs=-1)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=int, default=8000, show_default=True, help="Port; 0 takes a free one.")
@RECIPE_OPTION
@plain_errors
def serve(models: tuple[str, ...], host: str, port: int, recipe: Path | None) -> None:
    """Serve students over HTTP with the OpenAI Images API until Ctrl-C or SIGTERM.

    MODELS are students, the first is the default. Without any: the champion that the demo left in the embedded
    registry, or else the emoji students that ship with fewstep.

    Example: fewstep serve models:/fewstep-demo@champion
    """
    from fewstep.serving import default_models, served

    loaded = recipe_of(recipe)
    with served(models or default_models(loaded), host=host, port=port, recipe=loaded) as server:
        click.echo("Stop with Ctrl-C.")
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as containers and service managers stop a program
        with suppress(KeyboardInterrupt):  # the way to stop it, so no error
            server.wait()
    click.echo("Stopped serving.")


@main.command()
@RECIPE
@click.option("--gpu", default="h100", show_default=True, help="Kind of GPU: h100, h200, a100-80, a100-40, l40s, …")
@click.option("--mfu", type=float, default=0.4, show_default=True, help="Share of the GPU's peak that is reached.")
@click.option("--workers", type=int, help="GPUs of a training.  [default: the recipe's; 1 where it says auto]")
@click.option("--samples", type=int, help="Training samples.  [default: the data set's, or as many as are seen]")
@click.option(
    "--shape", metavar="NAME", help="A shipped shape, or a folder with configurations, in the teacher's place."
)
@click.option("--rows", type=int, help="Rows of metadata to choose from: plan the data path too.")
@click.option("--shards", type=int, help="Shards of the samples: plan the data path too.  [default: samples / 10,000]")
@click.option(
    "--success", type=float, default=0.7, show_default=True, help="Share of addresses that still give a picture."
)
@click.option(
    "--rates",
    type=click.Path(path_type=Path),
    help="What `fewstep bench data --json` printed on your machine.  [default: shipped figures]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")
@SET_OPTION
@plain_errors
def plan(
    recipe: Path,
    gpu: str,
    mfu: float,
    workers: int | None,
    samples: int | None,
    shape: str | None,
    rows: int | None,
    shards: int | None,
    success: float,
    rates: Path | None,
    as_json: bool,
    changes: tuple[str, ...],
) -> None:
    """Estimate what the real run of RECIPE takes: FLOPs, memory of a GPU, GPU-hours, bytes; stage by stage.

    Everything is counted on networks without weights, so it needs no GPU, no network and no download. What does not fit
    is said, with the settings that would make it fit.

    With --rows or --shards it says as well what the data path takes: requests and bytes of the store, cores, memory,
    and the local disk that `encode` fills.

    Example: fewstep plan workflows/recipes/sdxl-laion-1024.yaml --gpu a100-80
    """
    import json

    from fewstep.plan import plan_data_of, plan_recipe, render, render_data
    from fewstep.recipe import load_recipe

    loaded = load_recipe(recipe, changes=changes)
    planned = plan_recipe(loaded, gpu=gpu, mfu=mfu, shape=shape, num_workers=workers, num_samples=samples)
    data = None
    if rows is not None or shards is not None:
        data = plan_data_of(planned, loaded, shape=shape, rows=rows, shards=shards, success=success, rates=rates)
    if as_json:
        click.echo(json.dumps(planned.to_json() | ({"data": data.to_json()} if data else {}), indent=2))
        return
    click.echo(render(planned))
    if data is not None:
        click.echo("\n" + render_data(data))


@main.command()
@plain_errors
def keys() -> None:
    """List every key of a recipe with its default and meaning (Markdown)."""
    from fewstep.recipe_keys import recipe_keys

    click.echo(recipe_keys(), nl=False)


if __name__ == "__main__":
    main()

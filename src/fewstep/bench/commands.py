"""`fewstep bench`: the command line of the benchmarks."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import click
from pydantic import BaseModel

from fewstep.bench.checked import checked
from fewstep.bench.data.command import data
from fewstep.bench.options import options
from fewstep.bench.translation import translation
from fewstep.plain_errors import plain_errors

Settings = TypeVar("Settings", bound=BaseModel)


@click.group()
def bench() -> None:
    """Measure training and sampling on this machine, and repeat experiments whose figures the docs have."""


bench.add_command(data)
bench.add_command(options)
bench.add_command(translation)


def _speed_options(command: Callable[..., Any]) -> Callable[..., Any]:
    options = [
        click.option(
            "--device",
            type=click.Choice(["auto", "cpu", "cuda"]),
            default="auto",
            show_default=True,
            help="Where to compute; auto takes a GPU if there is one.",
        ),
        click.option(
            "--precision",
            type=click.Choice(["auto", "float32", "bfloat16"]),
            default="auto",
            show_default=True,
            help="auto: the recipe's; otherwise bfloat16 on a GPU, float32 on a CPU.",
        ),
        click.option("--batch-size", type=int, help="Pictures at once.  [default: the recipe's, or a usual one]"),
        click.option(
            "--resolution", type=int, default=512, show_default=True, help="Side in pixels, for --shape sd15."
        ),
        click.option("--rounds", type=int, default=5, show_default=True, help="Comparisons; figures are medians."),
        click.option("--channels-last", is_flag=True, help="Keep convolutions as NHWC."),
        click.option("--compile", is_flag=True, help="torch.compile the networks."),
        click.option("--tf32", is_flag=True, help="TF32 for float32 products, on a GPU."),
        click.option("--cudnn-benchmark", is_flag=True, help="Let cuDNN look for its fastest kernels, on a GPU."),
        click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@bench.command()
@click.argument("recipe", required=False, type=click.Path(path_type=Path))
@click.option(
    "--shape",
    type=click.Choice(["recipe", "sd15"]),
    help="sd15: Stable Diffusion 1.5 with random weights, no download.  [default: recipe]",
)
@click.option(
    "--stage",
    type=click.Choice(["guidance", "progressive"]),
    default="guidance",
    show_default=True,
    help="Whose objective: stage one's or stage two's.",
)
@click.option(
    "--updates", type=int, default=10, show_default=True, help="Measured updates of each round; an even number."
)
@click.option(
    "--variants",
    metavar="NAME,…",
    callback=lambda _context, _option, names: tuple(names.split(",")) if names else (),
    help="Instead of the bare network calls, compare ways to train with each other, in turns: eager (always there), "
    "channels_last, compile, checkpoint, or several joined by +.",
)
@click.option("--dry", is_flag=True, help="Only count the FLOPs of one picture; needs no GPU and no memory.")
@_speed_options
@plain_errors
def train(recipe: Path | None, shape: str | None, dry: bool, as_json: bool, **options: Any) -> None:
    """Measure the training loop with the network of RECIPE, or of --shape sd15.

    The batches are the recipe's own latent shards if its encode stage has run; otherwise they are made in memory.

    Example: fewstep bench train workflows/recipes/demo.yaml
    """
    from fewstep.bench.settings import TrainBenchSettings
    from fewstep.bench.train import bench_train, count_train
    from fewstep.bench.variants import bench_variants
    from fewstep.recipe import load_recipe

    _one_of(recipe, shape, what="a RECIPE")
    settings = _settings(TrainBenchSettings, options)
    loaded = None if recipe is None else load_recipe(recipe)
    if dry:
        _show(count_train(settings, recipe=loaded), as_json)
    elif settings.variants:
        _show(bench_variants(settings, recipe=loaded, command=_command()), as_json)
    else:
        _show(bench_train(settings, recipe=loaded, command=_command()), as_json)


@bench.command()
@click.argument("model", required=False)
@click.option("--shape", type=click.Choice(["sd15"]), help="Stable Diffusion 1.5 with random weights, no download.")
@click.option("--steps", "num_inference_steps", type=int, help="Steps.  [default: the student's own, or 4]")
@click.option(
    "--teacher-steps", type=int, default=50, show_default=True, help="Guided steps of the teacher beside it; 0: none."
)
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    help="Recipe whose store and MLflow s3:// and models:/ mean.  [default: the embedded ones in $FEWSTEP_HOME]",
)
@_speed_options
@plain_errors
def sample(model: str | None, shape: str | None, recipe: Path | None, as_json: bool, **options: Any) -> None:
    """Measure sampling with MODEL, a student or a teacher, or with --shape sd15.

    Example: fewstep bench sample asset:emoji-student-4 --batch-size 1
    """
    from fewstep.bench.sample import bench_sample
    from fewstep.bench.settings import SampleBenchSettings
    from fewstep.recipe import load_recipe
    from fewstep.workplace import open_model

    _one_of(model, shape, what="a MODEL")
    settings = _settings(SampleBenchSettings, options)
    if model is None:
        _show(bench_sample(settings, command=_command()), as_json)
        return
    with open_model(model, None if recipe is None else load_recipe(recipe)) as folder:
        _show(bench_sample(settings, model=folder, name=model, command=_command()), as_json)


@bench.command()
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--into",
    type=click.Path(path_type=Path),
    default=Path("docs/benchmarks.md"),
    show_default=True,
    help="Markdown page with the marks gpu-check: begin and end.",
)
@plain_errors
def table(results: tuple[Path, ...], into: Path) -> None:
    """Write RESULTS, files of what --json printed, as a table into the marked section of a Markdown page."""
    from fewstep.bench.page import read_result, write_benchmarks_table

    write_benchmarks_table([read_result(file) for file in results], into)
    click.echo(str(into))


@bench.command()
@click.option("--quick", is_flag=True, help="A short form of half a minute.")
@click.option(
    "--schedule",
    type=click.Choice(["cosine", "stable_diffusion"]),
    default="cosine",
    show_default=True,
    help="Continuous times, or the 1000 of Stable Diffusion rescaled to zero terminal SNR.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything.")
@click.option("--json", "as_json", is_flag=True, help="Print all figures as JSON and nothing else.")
@plain_errors
def mixture(quick: bool, schedule: str, seed: int, as_json: bool) -> None:
    """Distil a guided teacher of points in a plane, where the truth is known, with every kind of ladder.

    Ten minutes of one core.
    """
    from fewstep.bench.mixture import run_mixture, to_markdown
    from fewstep.bench.mixture_run import QUICK, MixtureSettings

    settings = checked(MixtureSettings, {**(QUICK if quick else {}), "schedule": schedule, "seed": seed})
    result = run_mixture(settings, say=lambda line: click.echo(line, err=True))
    click.echo(json.dumps(result, indent=2) if as_json else to_markdown(result))


class _Result(Protocol):
    def to_json(self) -> dict[str, Any]: ...

    def table(self) -> str: ...


def _show(result: _Result, as_json: bool) -> None:
    click.echo(json.dumps(result.to_json(), indent=2) if as_json else result.table())


def _one_of(named: Path | str | None, shape: str | None, *, what: str) -> None:
    if named is None and shape != "sd15":
        raise click.UsageError(f"Name {what}, or take --shape sd15.")
    if named is not None and shape == "sd15":
        raise click.UsageError(f"--shape sd15 has its own networks: leave out {named}.")


def _settings(kind: type[Settings], options: dict[str, Any]) -> Settings:
    names = ("channels_last", "compile", "tf32", "cudnn_benchmark")
    tuning = {name: options.pop(name) for name in names}
    return checked(kind, {**options, "tuning": tuning})


def _command() -> str:
    return " ".join(["fewstep", *(shlex.quote(word) for word in sys.argv[1:])])

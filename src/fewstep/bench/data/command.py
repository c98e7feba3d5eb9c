"""The command line of `fewstep bench data`."""

from __future__ import annotations

import json
import shlex
import sys
from typing import Any

import click

from fewstep.bench.checked import checked
from fewstep.plain_errors import plain_errors


@click.command()
@click.option("--images", type=int, help="Pictures that are made.  [default: 1600]")
@click.option("--latents", type=int, help="Samples of latents that are made.  [default: 1600]")
@click.option("--resolution", type=int, help="Side of the pictures in pixels.  [default: 512]")
@click.option("--rounds", type=int, help="Turns of the readers; figures are medians.  [default: 5]")
@click.option("--seconds", type=float, help="Of one reader in one turn.  [default: 8]")
@click.option("--many-shards", type=int, help="Shards whose first batch is waited for.  [default: 10000]")
@click.option("--metadata-rows", type=int, help="Rows of metadata that are chosen from.  [default: 400000]")
@click.option("--stops", type=int, help="Random steps at which reading is resumed.  [default: 50]")
@click.option("--streaming-python", help="Python of an environment with mosaicml-streaming, to measure that too.")
@click.option("--memory-minutes", type=float, help="Of reading while memory is watched.  [default: 0, not measured]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")
@plain_errors
def data(as_json: bool, **options: Any) -> None:
    """Measure the reading of shards from an S3 server on this machine, beside other readers of the same bytes.

    Needs scikit-learn, for its photographs, and curl, for plain webdataset.

    Example: fewstep bench data --memory-minutes 20
    """
    from fewstep.bench.data.run import DataBenchSettings, bench_data, table

    given = {name: value for name, value in options.items() if value is not None}
    settings = checked(DataBenchSettings, given)
    command = " ".join(["fewstep", *(shlex.quote(word) for word in sys.argv[1:])])
    result = bench_data(settings, command=command, say=lambda line: click.echo(line, err=True))
    click.echo(json.dumps(result, indent=2) if as_json else table(result))

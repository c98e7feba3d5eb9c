"""What a core was measured to do on the data path: shipped figures, or those of a benchmark of one's own."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

from fewstep.errors import FewstepError


@dataclass(frozen=True)
class Rates:
    """Figures of one core.

    Attributes:
        about: where they are from, in words.
        pictures_per_s: read, decoded, cut to size and stacked.
        pictures_px: shorter side of those pictures.
        latent_bytes_per_s: of latent shards, read and stacked.
        row_read_s: CPU time of a row of metadata that is read, those of its filters alone.
        row_kept_s: of one that passes the filters, in all steps of the choice.
        row_bytes: of a row in the parquet files.
        row_kept_bytes: of a row that passes, in the store until the choice is made.
        downloads_per_s: pictures that img2dataset fetches and reduces.
        download_bytes: of a picture on the web.
        shard_bytes_in_memory: of an entry in the list of shards.
    """

    about: str
    pictures_per_s: float
    pictures_px: float
    latent_bytes_per_s: float
    row_read_s: float
    row_kept_s: float
    row_bytes: float
    row_kept_bytes: float
    downloads_per_s: float
    download_bytes: float
    shard_bytes_in_memory: float


def shipped_rates() -> Rates:
    """Return the figures that come with fewstep."""
    return Rates(**json.loads(resources.files("fewstep.plan").joinpath("rates.json").read_text("utf-8")))


def read_rates(path: Path) -> Rates:
    """Return the figures of what `fewstep bench data --json` printed; what it does not measure is as shipped.

    Raises:
        FewstepError: it is no such file.
    """
    try:
        result: dict[str, Any] = json.loads(path.read_text("utf-8"))
        measured = {
            "about": f"one core, {result['environment']['device_name']}, by {path}",
            "pictures_per_s": median(result["pictures"]["rates"]["fewstep"]),
            "pictures_px": result["settings"]["resolution"],
            "latent_bytes_per_s": median(result["latents"]["rates"]["fewstep"]) * result["latents"]["bytes"],
        }
        chosen = dict(result["metadata"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FewstepError(
            f"--rates {path} is not what `fewstep bench data --json` prints ({error!r}): write that into a file, "
            "or leave --rates out"
        ) from error
    known = {each.name for each in fields(Rates)}
    return replace(shipped_rates(), **measured, **{name: value for name, value in chosen.items() if name in known})

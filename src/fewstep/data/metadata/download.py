"""Pictures named by the rows of a table, downloaded and reduced by img2dataset 1.47."""

from __future__ import annotations

import json
import logging
import math
import shutil
import string
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import quote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fewstep.data.metadata.downloaded import FROM_THE_PICTURE, SHARD_DIGITS, Downloaded, places_of
from fewstep.data.metadata.failures import BAD_ADDRESS, LOST, OTHER, reason_of
from fewstep.data.metadata.img2dataset import find_command, last_words, run_img2dataset
from fewstep.errors import DataError

logger = logging.getLogger(__name__)

_NEEDED = ("key", "url", "caption")
_ROWS_PER_TAR = 10_000
_FLUSHED_ROWS = 100  # it writes rows without a picture in groups of so many
_SAFE = "".join(sorted(set(string.punctuation) - set('"<>\\^`{|}')))


class DownloadSettings(BaseModel):
    """How img2dataset fetches pictures, which it refuses, and how it stores them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    command: str | None = Field(
        None,
        description="Path of the img2dataset executable; null: that in $FEWSTEP_IMG2DATASET, or else the one that make "
        "img2dataset makes below the current folder, or else img2dataset on PATH.",
    )
    image_size: int = Field(512, ge=1, description="Pixels to which a side is reduced; nothing is enlarged.")
    resize_mode: Literal["no", "keep_ratio", "center_crop", "border", "keep_ratio_largest"] = Field(
        "keep_ratio",
        description="What becomes image_size: the shorter side (keep_ratio), that and the rest cut off (center_crop), "
        "the longer side (keep_ratio_largest), that and the rest filled up with white (border), or nothing (no).",
    )
    min_image_size: int = Field(0, ge=0, description="Pixels of the shorter side below which a picture is left out.")
    max_aspect_ratio: float | None = Field(
        None, ge=1, description="Longer side by shorter side above which a picture is left out; null: no limit."
    )
    max_image_area: int = Field(
        100_000_000, ge=1, description="Pixels above which a picture is left out, before it is decoded."
    )
    max_bytes: int = Field(
        64 * 2**20, ge=1, description="Bytes of an answer, its head included, above which it is broken off."
    )
    encode_quality: int = Field(
        95, ge=1, le=100, description="JPEG quality of pictures that are not JPEGs or are reduced; others stay as sent."
    )
    processes: int = Field(1, ge=1, description="Processes, each of which downloads, decodes and reduces.")
    threads: int = Field(64, ge=1, description="Connections of each process.")
    max_per_s: float | None = Field(
        None,
        gt=0,
        description="Requests that begin in a second, of one part; at_once of prepare_metadata times as many in all. "
        "null: as fast as answers come.",
    )
    timeout_s: float = Field(
        10.0,
        gt=0,
        description="Seconds to connect, the longest pause within an answer, and the longest that is waited where a "
        "server is busy (429, 503); an address for which it asks for more (Retry-After) is not tried again.",
    )
    answer_timeout_s: float = Field(60.0, gt=0, description="Seconds for an answer as a whole.")
    retries: int = Field(
        1, ge=0, description="Further tries after a failed one, whatever the failure (but see timeout_s)."
    )
    private_addresses: bool = Field(
        False,
        description="Let it connect to addresses that are not public, such as those of the own network: a table from "
        "elsewhere may name services there. Needed for a picture server of one's own.",
    )
    user_agent_token: str | None = Field(
        "fewstep",
        pattern=r"^[A-Za-z0-9_.-]+$",
        description="Name given to servers in User-Agent, in lower case; X-Robots-Tag may address it. null: none.",
    )
    disallowed_header_directives: tuple[str, ...] = Field(
        ("noai", "noimageai", "noindex", "noimageindex"),
        description="Words in the header X-Robots-Tag by which an owner opts out; such pictures are not downloaded.",
    )
    stall_timeout_s: float = Field(
        600.0, gt=0, description="Seconds without any progress after which img2dataset is killed: an error."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        slowest = (2 * self.timeout_s + self.answer_timeout_s) * (self.retries + 1)
        quiet = math.ceil(_FLUSHED_ROWS / self.threads) * slowest
        if self.max_per_s is not None:
            quiet += _FLUSHED_ROWS * (self.retries + 1) * self.processes / self.max_per_s
        if self.stall_timeout_s < quiet:
            raise ValueError(
                f"stall_timeout_s={self.stall_timeout_s:g} is too short: where no server answers, img2dataset with "
                f"threads={self.threads}, timeout_s={self.timeout_s:g}, answer_timeout_s={self.answer_timeout_s:g} and "
                f"retries={self.retries} writes nothing for {quiet:g} s. Raise stall_timeout_s to that, or lower these"
            )
        return self


def download(rows: pa.Table, folder: Path, *, settings: DownloadSettings) -> Downloaded:
    """Download the pictures of a table's rows with one run of img2dataset.

    Args:
        rows: with the columns key (unique, as a file name), url and caption, texts; all others are kept in the .json of
            their sample too.
        folder: where img2dataset works. What an earlier run left there is removed. It needs about the room of the
            pictures, and must stay as long as `Downloaded.samples` is used.
        settings: how.

    Raises:
        DataError: a column is missing or has a reserved name, img2dataset is not there or does not start, it dies or
            stalls, or it does not write what it should.
    """
    check_columns(rows.column_names)
    program = find_command(settings.command)
    addresses = [requested_address(url) for url in rows["url"].to_pylist()]
    asked = [number for number, address in enumerate(addresses) if address is not None]
    if not asked:
        return Downloaded(rows.num_rows, 0, {BAD_ADDRESS: rows.num_rows} if rows.num_rows else {}, 0.0, 0, rows, ())
    folder = folder.absolute() / "img2dataset"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed; img2dataset would take it for its own
    output = folder / "pictures"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"url": [addresses[number] for number in asked]}), folder / "rows.parquet")
    rows_per_tar = min(_ROWS_PER_TAR, math.ceil(len(asked) / settings.processes))
    begin = time.monotonic()
    run_img2dataset(
        program, _options(settings, rows_per_tar), folder=folder, output=output,
        answer_timeout_s=settings.answer_timeout_s, max_bytes=settings.max_bytes,
        max_image_area=settings.max_image_area, private_addresses=settings.private_addresses,
        requests_per_s=None if settings.max_per_s is None else settings.max_per_s / settings.processes,
        longest_pause_s=settings.timeout_s, stall_timeout_s=settings.stall_timeout_s,
    )  # fmt: skip
    seconds = time.monotonic() - begin
    numbers = range(math.ceil(len(asked) / rows_per_tar))
    tars = [output / f"{number:0{SHARD_DIGITS}d}.tar" for number in numbers]
    missing = [tar.name for tar in tars if not tar.exists() or not _stats_of(tar).exists()]
    if missing:
        raise DataError(
            f"img2dataset ended with exit code 0 and did not finish {len(missing)} of {len(tars)} tars ({missing[0]}). "
            f"Is the disk of {folder} full? Then give it more room or lower rows_per_shard. {last_words(folder)}"
        )
    places = [
        tuple(places_of(tar, asked[number * rows_per_tar : (number + 1) * rows_per_tar]))
        for number, tar in zip(numbers, tars, strict=True)
    ]
    succeeded = sum(map(len, places))
    failures = _failures(tars)
    if len(asked) < rows.num_rows:
        failures[BAD_ADDRESS] = failures.get(BAD_ADDRESS, 0) + rows.num_rows - len(asked)
    lost = rows.num_rows - succeeded - sum(failures.values())
    assert lost >= 0
    if lost:
        failures[LOST] = lost
        logger.warning("img2dataset lost %d of %d rows without a reason. %s", lost, rows.num_rows, last_words(folder))
    num_bytes = sum(place.jpg[1] for found in places for place in found)
    return Downloaded(
        rows.num_rows, succeeded, failures, seconds, num_bytes, rows, tuple(zip(tars, places, strict=True))
    )


def check_columns(names: Sequence[str]) -> None:
    """Raise a DataError unless a table with these columns can be downloaded."""
    missing = [name for name in _NEEDED if name not in names]
    if missing:
        raise DataError(f"the rows to download lack {', '.join(missing)}: their columns are {', '.join(names)}")
    reserved = [name for name in FROM_THE_PICTURE if name in names]
    if reserved:
        raise DataError(
            f"the columns {', '.join(reserved)} have names under which a sample's .json tells what was found in its "
            f"picture: give them others, such as claimed_{reserved[0]}"
        )


def requested_address(url: str | None) -> str | None:
    """Return the address as img2dataset can ask for it, in ASCII; None: it is none of the web.

    urllib would refuse letters outside ASCII, and it would read files of this machine (``file:``).
    """
    url = (url or "").strip()
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            return None
        if url.isascii() and url.isprintable() and " " not in url:
            return url
        host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    except ValueError:
        return None
    return quote(parts._replace(netloc=host).geturl(), safe=_SAFE)


def _options(settings: DownloadSettings, rows_per_tar: int) -> dict[str, Any]:
    options: dict[str, Any] = {
        "url_list": "rows.parquet",
        "input_format": "parquet",
        "url_col": "url",
        "output_folder": "pictures",
        "output_format": "webdataset",
        "number_sample_per_shard": rows_per_tar,
        "image_size": settings.image_size,
        "resize_mode": settings.resize_mode,
        "resize_only_if_bigger": True,
        "skip_reencode": True,
        "encode_format": "jpg",
        "encode_quality": settings.encode_quality,
        "min_image_size": settings.min_image_size,
        "max_image_area": settings.max_image_area,
        "processes_count": settings.processes,
        "thread_count": settings.threads,
        "timeout": settings.timeout_s,
        "retries": settings.retries,
        "disallowed_header_directives": list(settings.disallowed_header_directives),
        "compute_hash": "sha256",
        "extract_exif": False,  # the orientation is used up, and the rest may tell of persons
        "enable_wandb": False,
    }
    if settings.max_aspect_ratio is not None:
        options["max_aspect_ratio"] = settings.max_aspect_ratio
    if settings.user_agent_token is not None:
        options["user_agent_token"] = settings.user_agent_token
    return options


def _stats_of(tar: Path) -> Path:
    return tar.with_name(f"{tar.stem}_stats.json")


def _failures(tars: Sequence[Path]) -> dict[str, int]:
    failures: dict[str, int] = {}
    unnamed: dict[str, int] = {}
    for tar in tars:
        for text, count in json.loads(_stats_of(tar).read_bytes())["status_dict"].items():
            if text == "success":  # counted before the picture is stored, so the tar is believed and not this
                continue
            reason = reason_of(text)
            failures[reason] = failures.get(reason, 0) + count
            if reason == OTHER:
                unnamed[text] = unnamed.get(text, 0) + count
    if unnamed:
        texts = sorted(unnamed, key=lambda text: -unnamed[text])[:5]
        logger.info("errors counted as %r: %s", OTHER, "; ".join(f"{unnamed[text]} × {text[:200]!r}" for text in texts))
    return failures

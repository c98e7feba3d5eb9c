"""Makes the data, runs the measurements, and holds them against their goals."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from fewstep.bench.data.checks import first_batch, memory, only, resume, shuffle_quality
from fewstep.bench.data.faults import faults
from fewstep.bench.data.measure import away_from_that_core, on_one_core, rates
from fewstep.bench.data.metadata import metadata_costs, write_metadata
from fewstep.bench.data.pictures import latent_samples, picture_samples
from fewstep.bench.data.readers import (
    DataSet,
    bare,
    boto3_alone,
    convert_for_streaming,
    fewstep,
    mosaicml_streaming,
    plain_webdataset,
)
from fewstep.bench.result import Environment
from fewstep.data.shards import ShardIndex, write_shard, write_shards
from fewstep.data.stream import StreamSettings
from fewstep.storage import Storage, StorageSettings, join, open_storage

Say = Callable[[str], None]

_NUM_STREAMS = 8
#: What the readers must reach. Each is a share that must be at least so much.
GOALS = {"of bare": 0.9, "of webdataset": 1.3, "of streaming": 1.0, "of boto3": 0.9}
FIRST_BATCH_GOAL_S = 2.0
GROWTH_GOAL = 0.02


class DataBenchSettings(BaseModel):
    """`fewstep bench data`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int = Field(1600, ge=64, description="pictures that are made")
    latents: int = Field(1600, ge=64, description="samples of latents that are made")
    resolution: int = Field(512, ge=32, description="side of the pictures in pixels")
    batch_size: int = Field(16, ge=8, multiple_of=8, description="samples of a batch")
    rounds: int = Field(5, ge=1, description="turns of the readers; figures are medians")
    seconds: float = Field(8.0, gt=0, description="of one reader in one turn")
    metadata_rows: int = Field(400_000, ge=1000, description="rows of metadata that are made, and chosen from")
    many_shards: int = Field(10_000, ge=8, description="shards of the folder whose first batch is waited for")
    stops: int = Field(50, ge=1, description="random steps at which reading is stopped and resumed")
    streaming_python: str | None = Field(
        None, description="interpreter of an environment with mosaicml-streaming; null: that is left out"
    )
    memory_minutes: float = Field(0.0, ge=0, description="of reading while memory is watched; 0: not measured")


def bench_data(settings: DataBenchSettings, *, command: str = "", say: Say = lambda line: None) -> dict[str, Any]:
    """Measure the reading of shards from an S3 server on this machine; return the figures as JSON.

    Args:
        settings: how much is measured.
        command: what was typed, for the record.
        say: takes lines about the progress.

    Raises:
        StorageError: the S3 server does not start.
    """
    result: dict[str, Any] = {
        "kind": "data",
        "settings": settings.model_dump(),
        "cores": len(os.sched_getaffinity(0)),
        "environment": Environment.here(torch.device("cpu"), command).model_dump(),
    }
    with own_store() as storage:
        say(f"makes {settings.images} pictures and {settings.latents} latents …")
        pictures = _write(
            picture_samples(settings.images, resolution=settings.resolution), "pictures", settings.images, storage
        )
        latents = _write(latent_samples(settings.latents), "latents", settings.latents, storage)
        stream = StreamSettings(num_streams=_NUM_STREAMS)
        of_pictures = DataSet(
            pictures, storage, settings.resolution, settings.batch_size, stream, settings.streaming_python
        )
        if settings.streaming_python is not None:
            say("converts the pictures for mosaicml-streaming …")
            convert_for_streaming(of_pictures)
        of_latents = DataSet(latents, storage, 0, settings.batch_size, stream)

        result["shuffle"] = shuffle_quality(StreamSettings())
        table_uri = join(storage.root, "metadata.parquet")
        table_bytes = write_metadata(settings.metadata_rows, table_uri, storage=storage)
        say(f"makes {settings.many_shards} shards …")
        _many(storage, settings, "many")
        say(f"{settings.stops} stops …")
        small = DataSet(only(pictures, 8), storage, 64, settings.batch_size, _IN_PIECES)
        result["resume"] = resume(small, stops=settings.stops)
        say("a bad network …")
        samples = picture_samples(800, resolution=64)
        damaged = write_shards(samples, join(storage.root, "damaged"), samples_per_shard=25, storage=storage)
        result["faults"] = faults(DataSet(damaged, storage, 64, settings.batch_size, _IN_SMALL_PIECES))
        say("reads, one reader after the other …")
        found = on_one_core(_on_one_core, of_pictures, of_latents, join(storage.root, "many"), settings)
        result |= found
        say("chooses rows of metadata …")
        result["metadata"] = on_one_core(_metadata, table_uri, storage, settings.rounds)
        result["metadata"]["row_bytes"] = table_bytes / settings.metadata_rows
        for name, index, count in (("pictures", pictures, settings.images), ("latents", latents, settings.latents)):
            result[name]["bytes"] = sum(shard.size_bytes for shard in index.shards) / count
    return result


#: So that the stops fall into the middle of shards, blocks and pieces.
_IN_SMALL_PIECES = StreamSettings(num_streams=_NUM_STREAMS, piece_bytes=2**14, shuffle_bytes=2**16)
_IN_PIECES = StreamSettings(num_streams=_NUM_STREAMS, piece_bytes=2**20, shuffle_bytes=3 * 2**20)


@contextmanager
def own_store() -> Iterator[Storage]:
    """Start an S3 server that keeps to the cores that `on_one_core` leaves it."""
    with tempfile.TemporaryDirectory(prefix="fewstep-bench-") as folder, ExitStack() as ended:
        settings = StorageSettings(kind="embedded", home=Path(folder), bucket="bench")
        with away_from_that_core():  # for the start alone: readers must not stay on the server's cores either
            storage = ended.enter_context(open_storage(settings))
        yield storage


def _write(samples: Iterator[Mapping[str, Any]], name: str, count: int, storage: Storage) -> ShardIndex:
    each = min(200, count // _NUM_STREAMS)
    return write_shards(samples, join(storage.root, name), samples_per_shard=each, storage=storage)


def _many(storage: Storage, settings: DataBenchSettings, name: str) -> None:
    samples = list(picture_samples(4, resolution=64))

    def write(number: int) -> None:
        write_shard(samples, join(storage.root, name, f"{number:05d}.tar"), storage=storage)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(settings.many_shards)))


def _on_one_core(pictures: DataSet, latents: DataSet, many: str, settings: DataBenchSettings) -> dict[str, Any]:
    rounds, seconds = settings.rounds, settings.seconds
    readers = [bare, fewstep, plain_webdataset, *([mosaicml_streaming] if settings.streaming_python else [])]
    found = rates(pictures, readers, rounds=rounds, seconds=seconds)
    result: dict[str, Any] = {
        "pictures": {
            "rates": found, "of bare": _ratio(found, "bare"), "of webdataset": _ratio(found, "plain_webdataset")
        }
    }  # fmt: skip
    if settings.streaming_python:
        result["pictures"]["of streaming"] = _ratio(found, "mosaicml_streaming")
    found = rates(latents, [boto3_alone, fewstep], rounds=rounds, seconds=seconds)
    result["latents"] = {"rates": found, "of boto3": _ratio(found, "boto3_alone")}
    result["first"] = first_batch(pictures, many, rounds=rounds)
    if settings.memory_minutes:
        result["memory"] = memory(pictures, minutes=settings.memory_minutes)
    return result


def _metadata(uri: str, storage: Storage, rounds: int) -> dict[str, Any]:
    return metadata_costs(uri, join(storage.root, "scratch"), storage=storage, rounds=rounds)


def _ratio(found: Mapping[str, list[float]], other: str) -> dict[str, Any]:
    by_round = [ours / theirs for ours, theirs in zip(found["fewstep"], found[other], strict=True)]
    return {"median": median(by_round), "by_round": by_round}


def table(result: Mapping[str, Any]) -> str:
    """Return the figures as a Markdown table with the goals."""
    pictures, latents, first, resumed = (result[name] for name in ("pictures", "latents", "first", "resume"))
    rows: list[tuple[str, str, str, bool | None]] = [
        _share("pictures, against the bare decoding loop", pictures, "of bare", "bare"),
        _share("pictures, against plain webdataset", pictures, "of webdataset", "plain_webdataset"),
        _share("latents, against boto3 alone", latents, "of boto3", "boto3_alone"),
        (
            f"first batch of {first['num_shards']:,} shards",
            f"{first['first_batch_s']:.2f} s after the list is known (listing: {first['listing_s']:.1f} s)",
            f"≤ {FIRST_BATCH_GOAL_S:g} s",
            first["first_batch_s"] <= FIRST_BATCH_GOAL_S,
        ),
        (
            f"resume at {resumed['stops']} random steps, then {' → '.join(map(str, resumed['processes']))} processes",
            f"{resumed['different']} batches differ; {resumed['steps']} steps over {resumed['epochs']} epochs",
            "0",
            resumed["different"] == 0,
        ),
    ]
    bad = result["faults"]
    rows.append((
        f"an epoch with {bad['resets']} reads reset, {bad['busy']} answered 503, one shard cut to half, one missing",
        f"of {bad['samples']} samples {bad['lost_of_whole_shards']} of whole shards lost, {bad['doubled']} doubled, "
        f"{bad['kept_of_the_cut_shard']} of {bad['in_the_cut_shard']} of the cut shard kept; counted until the last "
        "stream ended its epoch: "
        + ", ".join(f"{count} {reason}" for reason, count in sorted(bad["counted"].items())),
        "0 and 0", bad["lost_of_whole_shards"] == bad["doubled"] == 0,
    ))  # fmt: skip
    mixed, ours, full = result["shuffle"], result["shuffle"]["ours"], result["shuffle"]["permutation"]
    rows.append((
        f"shuffle of {mixed['samples']:,} samples in {mixed['num_shards']} shards, beside a full permutation",
        f"moved by {ours['moved']:.3f} of all (full: {full['moved']:.3f}); a batch of {mixed['batch_size']} comes from "
        f"{ours['shards_in_a_batch']:.0f} shards (full: {full['shards_in_a_batch']:.0f}); neighbours meet in "
        f"{ours['neighbours_in_a_batch']:.1%} of batches (full: {full['neighbours_in_a_batch']:.1%})",
        "none set", None,
    ))  # fmt: skip
    chosen = result["metadata"]
    rows.append((
        f"rows of metadata chosen ({chosen['rows']:,}), CPU time on one core",
        f"{1e6 * chosen['row_read_s']:.1f} µs a row that is read, {1e6 * chosen['row_kept_s']:.1f} µs one that passes "
        f"the filters; {chosen['row_kept_bytes']:.0f} bytes kept for it in between",
        "none set", None,
    ))  # fmt: skip
    if "memory" in result:
        watched = result["memory"]
        sizes = [size / 2**20 for size in watched["rss_bytes_by_minute"]]
        rows.append((
            f"memory over {watched['minutes']:g} minutes",
            f"{watched['growth']:+.1%} ({min(sizes):.0f} … {max(sizes):.0f} MiB, {watched['samples']:,} samples)",
            f"< {GROWTH_GOAL:.0%}", watched["growth"] < GROWTH_GOAL,
        ))  # fmt: skip
    if "of streaming" in pictures:
        rows.insert(2, _share("pictures, against mosaicml-streaming", pictures, "of streaming", "mosaicml_streaming"))
    environment, settings = result["environment"], result["settings"]
    head = (
        f"{environment['device_name']}, reader on one core, S3 server on the other {result['cores'] - 1}; "
        f"{settings['images']} JPEGs of {settings['resolution']} px ({pictures['bytes'] / 1e3:.0f} KB a sample), "
        f"{settings['latents']} latents ({latents['bytes'] / 1e3:.0f} KB); medians of {settings['rounds']} rounds of "
        f"{settings['seconds']:g} s, with their range; {environment['time_utc']}, fewstep "
        f"{environment['fewstep_version']}."
    )
    lines = [head, "", "| what | measured | goal | |", "|---|---|---|---|"]
    said = {True: "met", False: "not met", None: ""}
    lines += [f"| {what} | {value} | {goal} | {said[met]} |" for what, value, goal, met in rows]
    return "\n".join(lines) + "\n"


def _share(what: str, part: Mapping[str, Any], goal: str, other: str) -> tuple[str, str, str, bool | None]:
    ratio = part[goal]
    ours, theirs = (median(part["rates"][name]) for name in ("fewstep", other))
    spread = f"{min(ratio['by_round']):.2f} … {max(ratio['by_round']):.2f}"
    value = f"{ratio['median']:.2f} × ({spread}): {ours:,.0f} against {theirs:,.0f} a second"
    return what, value, f"≥ {GOALS[goal]:g} ×", ratio["median"] >= GOALS[goal]

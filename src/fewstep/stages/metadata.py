"""prepare, from metadata: rows of parquet tables are chosen, and their pictures downloaded into shards.

Everything is done in pieces, each of which leaves a record when it is whole; a run that was killed does the others.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fewstep.data.metadata.buckets import Span
from fewstep.data.metadata.img2dataset import find_command
from fewstep.data.metadata.scan import SAME_CAPTION, SAME_URL, Counts, ParquetSource, reasons
from fewstep.data.metadata.selection import (
    DealtRows,
    DistinctUrls,
    Part,
    SameCaptions,
    deal_rows,
    drop_same_captions,
    drop_same_urls,
    take_rows,
    takes_of,
)
from fewstep.data.metadata.settings import MetadataSettings
from fewstep.data.shards import Shard, write_index
from fewstep.data.splits import Split
from fewstep.errors import DataError
from fewstep.recipe import digest
from fewstep.stages.context import StageContext, shards_uri
from fewstep.stages.fingerprints import drawn_splits
from fewstep.stages.metadata_tasks import DownloadedPart, download_part, load, nothing_came, recorded
from fewstep.stages.on_ray import run_tasks
from fewstep.stages.progress import Progress
from fewstep.storage import Storage, join
from fewstep.tracking.names import figure_name
from fewstep.tracking.tracker import Run
from fewstep.train.settings import ClusterSettings

logger = logging.getLogger(__name__)

T = TypeVar("T")

_RECORDS_AT_ONCE = 32


@dataclass(frozen=True)
class Selection:
    """The rows that were chosen.

    Attributes:
        counts: what became of all rows.
        parts: tables of the rows, each for one shard.
        source_digest: digest of names and content of the parquet files.
    """

    counts: Counts
    parts: tuple[Part, ...]
    source_digest: str


@dataclass(frozen=True)
class DownloadedSplit:
    """What became of the rows of a split, and the facts of its shards."""

    attempted: int
    failures: dict[str, int]
    facts: dict[str, Any]


def prepare_metadata(context: StageContext, settings: MetadataSettings) -> dict[str, Any]:
    """Choose the rows of the splits for which the recipe names no shards, and download their pictures.

    Returns address, digest and size of each split, and the counted report.
    """
    storage, cluster = context.storage, context.recipe.cluster
    if cluster.address is None and "RAY_ADDRESS" not in os.environ:
        # Told before hours of choosing; on a cluster it lies on the machines of the workers, perhaps on those alone.
        here = settings.download.model_copy(update={"command": str(find_command(settings.download.command))})
        settings = settings.model_copy(update={"download": here})
    splits = [split for split in drawn_splits(context.recipe) if settings.num_samples(split) != 0]
    selection = select_rows(settings, splits=splits, storage=storage, cluster=cluster)
    counts = selection.counts
    report = report_of(settings, counts)
    facts: dict[str, Any] = {"source_digest": selection.source_digest, "report": report}
    for split in splits:
        parts = [part for part in selection.parts if part.split == split]
        uri = shards_uri(context.recipe, storage, split)
        done = download_split(
            parts, uri, settings=settings, storage=storage, cluster=cluster, label=f"download {split}",
            log=partial(_log_download, split, len(parts), context.run),
        )  # fmt: skip
        facts[split] = done.facts
        report["splits"][split] = {"attempted": done.attempted, "failures": done.failures}
        of_split: dict[str, float] = {
            f"{split}_attempted": done.attempted, f"{split}_samples": done.facts["num_samples"]
        }  # fmt: skip
        of_split |= {figure_name(f"{split}_failed", reason): count for reason, count in done.failures.items()}
        # MLflow shows the value of the highest step, and running figures of the same names are at lower ones.
        context.run.log_metrics(of_split, step=len(parts))
    for line in report_lines(report):
        logger.info("%s", line)
    figures: dict[str, float] = {"rows": counts.rows, "rows_not_read": counts.not_read, "rows_left": counts.left}
    figures |= {figure_name("removed", reason): count for reason, count in counts.removed.items()}
    context.run.log_metrics(figures)
    context.run.set_tags({f"fewstep.{split}_digest": facts[split]["digest"] for split in splits})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        path.write_text(json.dumps(report, indent=1))
        context.run.log_artifact(path)
    return facts


def select_rows(
    settings: MetadataSettings, *, splits: Sequence[Split], storage: Storage, cluster: ClusterSettings
) -> Selection:
    """Choose the rows of the splits, and store them as parquet tables.

    Raises:
        DataError: the table lacks a column, or the filters and the duplicates leave fewer rows than are wanted.
    """
    source = ParquetSource(settings, storage)
    paths = source.paths()
    source_digest = digest(paths)
    rules = settings.model_dump(
        mode="json", exclude={"num_train", "num_evaluate", "num_alignment", "rows_per_shard", "download", "at_once"}
    )
    folder = join(storage.root, "metadata", digest([rules, source_digest])[:16])
    units = source.units([path for path, _ in paths])
    total = sum(unit.num_rows for unit in units)
    num_buckets = max(1, -(-total // settings.rows_per_task))
    run = partial(_phase, storage=storage, cluster=cluster)

    deal = partial(deal_rows, num_buckets=num_buckets, storage=storage)
    dealt = run(
        DealtRows, "read metadata", join(folder, "rows"),
        [partial(deal, source, unit, join(folder, "rows", f"{number:05d}")) for number, unit in enumerate(units)],
    )  # fmt: skip
    counts = Counts()
    for each in dealt:
        counts.add(each.counts)
    if not counts.left:
        raise DataError(_nothing_left(settings, counts))
    rows = [[span for each in dealt if each.rows and (span := each.rows.span(b))] for b in range(num_buckets)]
    digests = [[span for each in dealt if each.digests and (span := each.digests.span(b))] for b in range(num_buckets)]

    urls = run(
        DistinctUrls, "drop duplicate urls", join(folder, "urls"),
        [
            partial(drop_same_urls, digests[b], join(folder, "urls", f"{b:05d}.arrow"), num_buckets=num_buckets,
                    storage=storage)
            for b in range(num_buckets)
        ],
    )  # fmt: skip
    counts.remove(SAME_URL, sum(each.num_same for each in urls))
    left = [each.num_urls for each in urls]
    lost: list[list[Span]] = [[] for _ in range(num_buckets)]
    if settings.duplicate_captions != "keep":
        captions = [
            [span for each in urls if each.captions and (span := each.captions.span(b))] for b in range(num_buckets)
        ]
        same = run(
            SameCaptions, "drop duplicate captions", join(folder, "captions"),
            [
                partial(drop_same_captions, captions[b], join(folder, "captions", f"{b:05d}.arrow"),
                        num_buckets=num_buckets, storage=storage)
                for b in range(num_buckets)
            ],
        )  # fmt: skip
        counts.remove(SAME_CAPTION, sum(each.num_same for each in same))
        for b in range(num_buckets):
            left[b] -= sum(each.lost.rows[b] for each in same if each.lost)
            lost[b] = [span for each in same if each.lost and (span := each.lost.span(b))]

    sizes = {"num_train": settings.num_train, "num_evaluate": settings.num_evaluate,
             "num_alignment": settings.num_alignment}  # fmt: skip
    try:
        takes = takes_of(left, splits=splits, **sizes)  # type: ignore[arg-type]
    except DataError as error:
        raise DataError(f"{error}. Of {counts.rows} rows in {settings.source}: {_what_went(counts)}") from error
    drawn = join(folder, "drawn", digest([sizes, settings.rows_per_shard, splits])[:16])
    parts = run(
        list[Part], "draw rows", drawn,
        [
            partial(take_rows, b, rows[b], lost[b], takes[b], drawn, rows_per_shard=settings.rows_per_shard,
                    storage=storage)
            for b in range(num_buckets) if takes[b]
        ],
    )  # fmt: skip
    return Selection(counts, tuple(part for each in parts for part in each), source_digest)


def download_split(
    parts: Sequence[Part],
    target: str,
    *,
    settings: MetadataSettings,
    storage: Storage,
    cluster: ClusterSettings,
    label: str,
    log: Callable[[Collection[DownloadedPart]], None] = lambda parts: None,
) -> DownloadedSplit:
    """Download the pictures of the parts of a split into shards below `target`, and write their index.

    `log` is told of all parts that are done, each time that one is, and of all when nothing was left to do.

    Raises:
        DataError: img2dataset is not installed or dies, or no picture could be had.
    """
    uris = [join(target, "records", f"{part.name}.json") for part in parts]
    there = {info.uri for info in storage.list(join(target, "records"))}
    known = [number for number, uri in enumerate(uris) if uri in there]
    found = dict(zip(known, _load_all(DownloadedPart, [uris[number] for number in known], storage), strict=True))
    # The source may have changed since a run that was stopped: a part of the same name has other rows then, or the same
    # pictures with other captions.
    found = {number: each for number, each in found.items() if each.part == parts[number].digest}
    missing = [number for number in range(len(parts)) if number not in found]
    done = sum(parts[number].num_rows for number in found)
    with Progress(label, sum(part.num_rows for part in parts), "pictures", done=done) as progress:
        tasks = [(parts[number], target, uris[number], settings.download, storage) for number in missing]
        for number, result in run_tasks(
            download_part, tasks, cluster=cluster, what=label, num_cpus=settings.download.processes,
            at_most=settings.at_once,
        ):  # fmt: skip
            found[missing[number]] = result
            progress.advance(result.attempted)
            log(found.values())
        if not missing:
            log(found.values())
    failures: dict[str, int] = {}
    for each in found.values():
        for reason, count in each.failures.items():
            failures[reason] = failures.get(reason, 0) + count
    shards = [
        Shard(
            join(target, each.shard["name"]), each.shard["num_samples"], each.shard["size_bytes"], each.shard["sha256"]
        )
        for each in (found[number] for number in range(len(parts)))
        if each.shard is not None
    ]
    attempted = sum(each.attempted for each in found.values())
    if not shards:
        raise DataError(nothing_came(attempted, failures))
    index = write_index(shards, target, storage=storage)
    facts = {
        "uri": target, "digest": index.digest, "num_samples": index.num_samples, "num_shards": len(index.shards),
    }  # fmt: skip
    return DownloadedSplit(attempted, failures, facts)


def report_of(settings: MetadataSettings, counts: Counts) -> dict[str, Any]:
    """Return the counted report of a selection, JSON; its splits are those that were downloaded, so none yet."""
    order = [*reasons(settings), SAME_URL, SAME_CAPTION]
    return {
        "rows": counts.rows,
        "not_read": counts.not_read,
        # A list, for the order of the filters: where JSON is written here, names are sorted.
        "removed": sorted(map(list, counts.removed.items()), key=lambda each: order.index(each[0])),
        "left": counts.left,
        "splits": {},
    }


def report_lines(report: dict[str, Any]) -> list[str]:
    """Return the counted report of a preparation as lines of text: what `Counts` and the splits have in the facts."""
    rows = report["rows"]
    lines = [f"{rows:>15,}  rows, {report['not_read']:,} of them excluded by the statistics of their row group"]
    lines += [f"{-count:>15,}  {reason}" for reason, count in report["removed"]]
    lines.append(f"{report['left']:>15,}  left")
    for split, each in report["splits"].items():
        lines.append(f"{each['attempted']:>15,}  drawn, {split}")
        lines += [f"{-count:>15,}    {reason}" for reason, count in sorted(each["failures"].items())]
        lines.append(f"{each['attempted'] - sum(each['failures'].values()):>15,}    pictures")
    return lines


def _phase(
    type_: type[T],
    what: str,
    folder: str,
    calls: Sequence[Callable[[], T]],
    *,
    storage: Storage,
    cluster: ClusterSettings,
) -> list[T]:
    """Return the results of the calls, each done as a task unless its record is there."""
    uris = [join(folder, "records", f"{number:05d}.json") for number in range(len(calls))]
    there = {info.uri for info in storage.list(join(folder, "records"))}
    missing = [number for number, uri in enumerate(uris) if uri not in there]
    with Progress(what, len(calls), "tasks", done=len(calls) - len(missing)) as progress:
        tasks = [(calls[number], uris[number], storage) for number in missing]
        for _ in run_tasks(recorded, tasks, cluster=cluster, what=what):
            progress.advance()
    return _load_all(type_, uris, storage)


def _load_all(type_: type[T], uris: Sequence[str], storage: Storage) -> list[T]:
    with ThreadPoolExecutor(_RECORDS_AT_ONCE) as pool:
        return list(pool.map(lambda uri: load(type_, uri, storage), uris))


def _log_download(split: Split, num_parts: int, run: Run, parts: Collection[DownloadedPart]) -> None:
    """Log what came of the parts that are done: after each of the first hundred and the last, else less often."""
    done = len(parts)
    if 100 < done < num_parts and done % (done // 100):
        return
    came = sum(part.shard["num_samples"] for part in parts if part.shard is not None)
    seconds = sum(part.seconds for part in parts)
    figures: dict[str, float] = {
        f"{split}_attempted": sum(part.attempted for part in parts),
        f"{split}_samples": came,
        f"{split}_bytes": sum(part.shard["size_bytes"] for part in parts if part.shard is not None),
        f"{split}_task_seconds": seconds,
        f"{split}_samples_per_task_second": came / max(seconds, 1e-9),
    }
    run.log_metrics(figures, step=done)


def _nothing_left(settings: MetadataSettings, counts: Counts) -> str:
    return (
        f"prepare_metadata: nothing is left of the {counts.rows} rows in {settings.source}: {_what_went(counts)}. Look "
        "at the filters and columns; a share may be meant where the column has per cent, or the other way round"
    )


def _what_went(counts: Counts) -> str:
    removed = "; ".join(f"{count} × {reason}" for reason, count in counts.removed.items() if count)
    seen = "; ".join(f"{name} from {low:g} to {high:g}" for name, (low, high) in counts.values.items())
    return (removed or "it is empty") + (f". Values before each filter: {seen}" if seen else "")

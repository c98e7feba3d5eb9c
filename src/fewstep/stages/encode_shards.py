"""Picture shards become latent shards: one by one here, or by many encoders in the cluster."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewstep.data.ahead import made_ahead
from fewstep.data.buckets import BucketSettings, bucket_sizes
from fewstep.data.counts import SampleCounts
from fewstep.data.latents import latent_sample
from fewstep.data.masks import MaskSettings, mask_of
from fewstep.data.pictures import Crop
from fewstep.data.pieces import CUT_SHORT, MISSING
from fewstep.data.sample import BadSampleError, Decode, Sample
from fewstep.data.samples import NO_RULES, SampleRules
from fewstep.data.shards import INDEX, Shard, is_file_name, read_index, write_index, write_tar
from fewstep.data.source import iterate_shard
from fewstep.models import Parts
from fewstep.stages.batches import Precision, picture_decoder
from fewstep.stages.progress import Progress
from fewstep.storage import Storage, disk_errors, join

#: Batches of decoded pictures made while the networks work.
_AHEAD = 2

_RECORDS_AT_ONCE = 32

#: The number of a sample within its shard; no member of it.
_PLACE = "__place__"

#: What its members are named by.
_FILE_NAME = "__file_name__"


@dataclass(frozen=True)
class Encoding:
    """What the latents of a picture depend on, and how they are made. Picklable.

    Attributes:
        batch_size: pictures encoded at once.
        rules: which samples are used, and what their captions are.
        crop: what is kept of a picture's longer side.
        buckets: sizes beside the square that pictures may have; None: none.
        picture_sizes: tell a model that takes time_ids each picture's own size and crop.
        condition_names: parts of the condition (text, mask …) that are stored beside the latents; None: all.
        masks: for inpainting: how the mask of each picture is drawn; None: none is.
        seed: of the masks and of random crops.
        precision: what the networks compute in; bfloat16 is autocast.
    """

    batch_size: int
    rules: SampleRules = NO_RULES
    crop: Crop = "center"
    buckets: BucketSettings | None = None
    picture_sizes: bool = False
    condition_names: tuple[str, ...] | None = None
    masks: MaskSettings | None = None
    seed: int = 0
    precision: Precision = "float32"


@dataclass(frozen=True)
class Encoders:
    """Encoders in the cluster.

    Attributes:
        load: makes the parts on a worker, on its device; picklable.
        count: how many.
        use_gpu: whether each takes a GPU.
    """

    load: Callable[[], Parts]
    count: int
    use_gpu: bool


@dataclass(frozen=True)
class EncodeTask:
    """One shard to encode; `number` is its place in the index, and `mend` whether what an earlier try has lost is
    looked for again."""

    number: int
    shard: Shard
    target: str
    mend: bool = False

    @property
    def record_uri(self) -> str:
        return join(self.target, "records", f"{self.number:05d}.json")


def encode_shards(
    source: str,
    target: str,
    *,
    parts: Parts,
    storage: Storage,
    encoding: Encoding,
    max_bad_share: float,
    label: str,
    encoders: Encoders | None = None,
) -> dict[str, Any]:
    """Write the latent shards of picture shards; return their address, digest and size, what was skipped by reason, and
    how many by shard (bad_shards).

    One latent shard for every picture shard. Each leaves a record when it is written, so that a run that was killed
    goes on with those that have none; the index comes last.

    Args:
        source, target: URIs of the picture shards and of the latent shards.
        parts: the VAE, and what makes the condition; it encodes here, unless there are encoders.
        storage: the store.
        encoding: what latents depend on.
        max_bad_share: share of broken samples above which it is an error.
        label: for the progress.
        encoders: encode in the cluster; None: this process does.

    Raises:
        DataError: more samples than allowed are broken, or a shard has no sample that can be used.
    """
    index = read_index(source, storage=storage)
    counts = SampleCounts(max_bad_share, index.num_samples, sum(shard.size_bytes for shard in index.shards))
    # Of a pass that came to its end trainings may be reading the latents: what it has lost stays lost.
    mend = not storage.exists(join(target, INDEX))
    tasks = [EncodeTask(number, shard, target, mend) for number, shard in enumerate(index.shards)]
    there = {info.uri for info in storage.list(join(target, "records"))}
    recorded = [task for task in tasks if task.record_uri in there]
    with ThreadPoolExecutor(_RECORDS_AT_ONCE) as pool:
        read = pool.map(lambda task: _read_record(task, storage), recorded)
        records = {task.number: record for task, record in zip(recorded, read, strict=True) if record is not None}
    for number, record in records.items():
        uri = index.shards[number].uri
        counts.add(record["seen"], record["skipped"], record.get("filtered", {}), shard=uri,
                   lost_bytes=record.get("lost_bytes", 0))  # fmt: skip
    missing = [task for task in tasks if task.number not in records]
    done = sum(record["seen"] for record in records.values())
    with Progress(label, index.num_samples, "images", done=done) as progress:
        if encoders is None or not missing:
            encoder = ShardEncoder(parts, encoding, storage, counts=counts, advance=progress.advance)
            for task in missing:
                records[task.number] = encoder.encode(task)
        else:
            from fewstep.stages.encoders import encode_in_cluster

            for number, record in encode_in_cluster(missing, encoding, encoders, storage):
                records[number] = record
                uri = index.shards[number].uri
                counts.add(record["seen"], record["skipped"], record["filtered"], shard=uri,
                           lost_bytes=record["lost_bytes"])  # fmt: skip
                progress.advance(record["seen"])
    counts.finish()
    written = [
        Shard(join(target, each.pop("name", f"{number:05d}.tar")), **each)
        for number in range(len(tasks))
        if (each := dict(records[number]["shard"] or {}))
    ]
    latents = write_index(written, target, storage=storage)
    kept = {shard.uri for shard in written}
    for info in list(storage.list(target)):
        if info.uri.endswith(".tar") and info.uri not in kept:
            storage.delete(info.uri)  # of pictures that have changed since, or of a task that was cut short
    return {
        "uri": target,
        "digest": latents.digest,
        "source_digest": index.digest,
        "num_samples": latents.num_samples,
        "num_shards": len(written),
        "skipped": dict(counts.skipped),
        "filtered": dict(counts.filtered),
        "bad_shards": dict(counts.shards),
    }


class ShardEncoder:
    """Encodes shards with one model, and stores each with its record.

    Args:
        parts: the VAE, and what makes the condition.
        encoding: what latents depend on.
        storage: the store.
        counts: of a pass over all shards, which it judges; None: each shard is counted by itself and not judged.
        advance: is told of every picture.
    """

    def __init__(
        self,
        parts: Parts,
        encoding: Encoding,
        storage: Storage,
        *,
        counts: SampleCounts | None = None,
        advance: Callable[[int], None] = lambda count: None,
    ) -> None:
        self._parts, self._encoding, self._storage = parts, encoding, storage
        self._counts, self._advance = counts, advance
        self._decode = picture_decoder(
            parts,
            encoding.rules,
            crop=encoding.crop,
            seed=encoding.seed,
            sizes=encoding.picture_sizes,
            buckets=None if encoding.buckets is None else bucket_sizes(parts.resolution, encoding.buckets),
        )

    def encode(self, task: EncodeTask) -> dict[str, Any]:
        """Encode one shard; return its record.

        Raises:
            DataError: more samples than allowed are broken.
            StorageError: the store does not answer.
        """
        counts = SampleCounts(1.0) if self._counts is None else self._counts
        before = counts.copy()
        encoded = 0

        def samples() -> Iterator[dict[str, Any]]:
            nonlocal encoded
            for sample in self._encoded(task.shard, counts):
                encoded += 1
                yield sample

        # A file, as ten thousand samples of a large model are several GB.
        with tempfile.TemporaryDirectory(prefix="fewstep-encode-") as folder:
            path = Path(folder, "shard.tar")
            with disk_errors(f"write {path}", path), path.open("wb") as file:
                write_tar(samples() if self._encoding.buckets is None else _in_order(samples()), file)
            return self._stored(path, encoded, task, counts, before)

    def _stored(
        self, path: Path, encoded: int, task: EncodeTask, counts: SampleCounts, before: SampleCounts
    ) -> dict[str, Any]:
        # A shard without one sample that can be used is counted like the samples; how many may be is judged over all.
        record: dict[str, Any] = {
            "shard": None,
            "seen": counts.seen - before.seen,
            "skipped": _more(counts.skipped, before.skipped),
            "filtered": _more(counts.filtered, before.filtered),
            "lost_bytes": counts.bytes_lost_of(task.shard.uri),
            "source": _source(task.shard),
        }
        self._advance(record["seen"] - encoded)
        if encoded:
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            # Two machines may round differently. With its digest in its name a shard that a late task writes again is
            # another one, and the record, which is written once, says which of the two counts.
            name = f"{task.number:05d}-{sha256[:8]}.tar"
            self._storage.upload_file(path, join(task.target, name))
            record["shard"] = {
                "name": name, "num_samples": encoded, "size_bytes": path.stat().st_size, "fingerprint": sha256
            }  # fmt: skip
        return self._record(task, record)

    def _record(self, task: EncodeTask, record: dict[str, Any]) -> dict[str, Any]:
        data = json.dumps(record, indent=1, sort_keys=True).encode()
        while not self._storage.write_bytes(task.record_uri, data, if_absent=True):
            first = _read_record(task, self._storage)
            if first is not None:
                shard, other = record["shard"], first["shard"]
                if shard is not None and (other is None or other.get("name") != shard["name"]):
                    self._storage.delete(join(task.target, shard["name"]))
                return first
            self._storage.delete(task.record_uri)  # of pictures that have changed since
        return record

    def _encoded(self, shard: Shard, counts: SampleCounts) -> Iterator[dict[str, Any]]:
        parts, encoding = self._parts, self._encoding
        samples: Iterable[dict[str, Any]] = iterate_shard(
            shard, storage=self._storage, decode=_WithOwnKey(self._decode), counts=counts
        )
        if encoding.buckets is not None:
            samples = ({**sample, _PLACE: number} for number, sample in enumerate(samples))
        if encoding.masks is not None:
            samples = _masked(samples, encoding.masks, parts.resolution, encoding.seed)
        autocast = torch.autocast(parts.device.type, dtype=torch.bfloat16, enabled=encoding.precision == "bfloat16")
        with closing(made_ahead(_batched(samples, encoding.batch_size), count=_AHEAD)) as batches:
            for batch in batches:
                with autocast:
                    mean, std = parts.encode_pictures(torch.stack([sample["pixels"] for sample in batch]))
                    condition = {} if encoding.condition_names == () else parts.conditions(batch)
                stored = {
                    name: value.cpu()
                    for name, value in condition.items()
                    if encoding.condition_names is None or name in encoding.condition_names
                }
                mean, std = mean.cpu(), std.cpu()
                for row, sample in enumerate(batch):
                    of_row = {name: value[row] for name, value in stored.items()}
                    latents = latent_sample(sample[_FILE_NAME], sample.get("caption", ""), mean[row], std[row], of_row)
                    yield latents if encoding.buckets is None else {**latents, _PLACE: sample[_PLACE]}
                self._advance(len(batch))


class _WithOwnKey:
    """Decodes the samples of one shard, and refuses those whose latents could not be stored beside the others'."""

    def __init__(self, decode: Decode) -> None:
        self._decode, self._names = decode, set[str]()

    def __call__(self, sample: Sample) -> dict[str, Any]:
        decoded = self._decode(sample)
        name = re.sub("^(\\./)+", "", sample["__key__"])  # as `tar cf x.tar .` writes names
        if not is_file_name(name):
            raise BadSampleError("key cannot be a file name", repr(sample["__key__"]))
        if name in self._names:
            raise BadSampleError("key comes twice in its shard", repr(sample["__key__"]))
        self._names.add(name)
        return {**decoded, _FILE_NAME: name}


def _more(counted: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {reason: more for reason, count in counted.items() if (more := count - before.get(reason, 0))}


def _source(shard: Shard) -> dict[str, Any]:
    return {"uri": shard.uri, "size_bytes": shard.size_bytes, "fingerprint": shard.fingerprint}


def _read_record(task: EncodeTask, storage: Storage) -> dict[str, Any] | None:
    """Return what was noted about this shard; None where the pictures have changed since, or the task shall mend it and
    some were missing: it may be whole now, which its entry in an index does not tell."""
    record: dict[str, Any] = storage.read_json(task.record_uri)
    lost = task.mend and any(record["skipped"].get(reason) for reason in (CUT_SHORT, MISSING))
    return None if lost or record["source"] != _source(task.shard) else record


def _masked(
    samples: Iterable[dict[str, Any]], masks: MaskSettings, resolution: int, seed: int
) -> Iterator[dict[str, Any]]:
    for sample in samples:
        yield {**sample, "mask": mask_of(sample["key"], resolution, settings=masks, seed=seed)}


def _batched(samples: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    """Yield the samples in batches of one size of pictures each; at most a batch of every size waits to be full."""
    begun: dict[torch.Size, list[dict[str, Any]]] = {}
    for sample in samples:
        shape = sample["pixels"].shape
        batch = begun.setdefault(shape, [])
        batch.append(sample)
        if len(batch) == size:
            yield begun.pop(shape)
    yield from begun.values()


def _in_order(samples: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return latent samples in the order of their pictures, whatever sizes were encoded together."""
    return sorted(samples, key=lambda sample: int(sample[_PLACE]))

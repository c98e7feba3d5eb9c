"""Webdataset shards in the layout of img2dataset: ``00000.tar`` … with one sample as ``KEY.png, KEY.txt, KEY.json``.

What fewstep writes also has an ``index.json`` (shards with their sample counts and SHA-256, and a digest of the whole);
folders that img2dataset wrote are read without it.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from fewstep.errors import DataError
from fewstep.storage import Storage, join

INDEX = "index.json"
_WRITING = ".writing"
_STATS = "_stats.json"
_STATS_AT_ONCE, _SHARDS_AT_ONCE = 32, 1000
_SAMPLED_PLACES, _SAMPLED_BYTES = 16, 1 << 12


@dataclass(frozen=True)
class Shard:
    """One tar: where it is, how many samples it holds (None when nobody counted) and a fingerprint of its content."""

    uri: str
    num_samples: int | None
    size_bytes: int
    fingerprint: str = ""  # SHA-256 from the index, or else the store's ETag
    etag: str = ""  # the store's, where the shard was listed and not read from an index

    @property
    def name(self) -> str:
        return self.uri.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class ShardIndex:
    """The shards of one data set, in the order of their names."""

    shards: tuple[Shard, ...]

    @property
    def digest(self) -> str:
        """SHA-256 over names, sizes and fingerprints: equal data, equal digest, wherever the folder lies."""
        lines = (f"{shard.name} {shard.size_bytes} {shard.fingerprint}\n" for shard in self.shards)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def num_samples(self) -> int | None:
        """Samples in all shards, or None when that of some shard is not known."""
        counts = [shard.num_samples for shard in self.shards if shard.num_samples is not None]
        return sum(counts) if len(counts) == len(self.shards) else None


def write_shards(
    samples: Iterable[Mapping[str, Any]], uri: str, *, samples_per_shard: int, storage: Storage
) -> ShardIndex:
    """Writes the samples as tar shards below `uri`, then ``index.json``; the same samples give the same bytes.

    A sample is a mapping with ``__key__`` (a file name without a dot, with folders before it or not, unique within its
    shard) and the bytes of each member by its extension (``png``, ``txt``, ``json``, ``npy``, …). Tars that an earlier
    run left there and this one did not write are removed. Errors: DataError for a bad key or member, or when there are
    no samples.
    """
    if samples_per_shard < 1:
        raise DataError(f"samples_per_shard is {samples_per_shard}: it must be at least 1.")
    marker = join(uri, _WRITING)
    storage.write_bytes(marker, b"")
    storage.delete(join(uri, INDEX))
    shards: list[Shard] = []
    iterator = iter(samples)
    while chunk := list(itertools.islice(iterator, samples_per_shard)):
        shards.append(write_shard(chunk, join(uri, f"{len(shards):05d}.tar"), storage=storage))
    if not shards:
        raise DataError(f"No samples were given for the shards in {uri}. Look at the filter and the source.")
    written = {shard.uri for shard in shards}
    for info in list(storage.list(uri)):
        if info.uri.endswith(".tar") and info.uri not in written:
            storage.delete(info.uri)
    index = write_index(shards, uri, storage=storage)
    storage.delete(marker)
    return index


def write_shard(samples: Iterable[Mapping[str, Any]], uri: str, *, storage: Storage) -> Shard:
    """Writes the samples, as `write_shards` takes them, as the one tar `uri`. DataError when there are none."""
    chunk = list(samples)
    if not chunk:
        raise DataError(f"No samples were given for the shard {uri}. Look at the filter and the source.")
    data = tar_of(chunk)
    storage.write_bytes(uri, data)
    return Shard(uri, len(chunk), len(data), hashlib.sha256(data).hexdigest())


def write_index(shards: Sequence[Shard], uri: str, *, storage: Storage) -> ShardIndex:
    """Writes the ``index.json`` of shards that lie directly below `uri`; without it they do not count as written."""
    index = ShardIndex(tuple(shards))
    rows = [
        {"name": s.name, "num_samples": s.num_samples, "size_bytes": s.size_bytes, "sha256": s.fingerprint}
        for s in shards
    ]
    storage.write_json(join(uri, INDEX), {"shards": rows, "digest": index.digest})
    return index


def write_metadata(rows: Iterable[Mapping[str, Any]], uri: str, *, storage: Storage) -> None:
    """Writes the rows as one parquet object. DataError when there are none or their types do not agree."""
    try:
        table = pa.Table.from_pylist([dict(row) for row in rows])
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"The metadata for {uri} do not make a table: {error}") from error
    if table.num_rows == 0:
        raise DataError(f"There are no metadata rows for {uri}.")
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    storage.write_bytes(uri, buffer.getvalue())


def write_list(index: ShardIndex, uri: str, *, storage: Storage) -> None:
    """Writes a list of shards, wherever they lie, that `read_index` takes in their stead: a request instead of one for
    each page of a listing and each shard, and what one machine has listed for all others."""
    rows = [[s.uri, s.num_samples, s.size_bytes, s.fingerprint, s.etag] for s in index.shards]
    storage.write_json(uri, {"listed": rows})


def read_index(uri: str, *, storage: Storage, counted: bool = True) -> ShardIndex:
    """The shards below `uri`: from ``index.json``, or of every ``*.tar`` there with the counts of ``*_stats.json``; or
    those of a list, ``*.json``, as `write_list` leaves it. Without `counted` no counts are looked for beside tars.

    Errors: DataError when there are no shards, when the index is damaged, or when their writing was cut short.
    """
    if uri.endswith(".json"):
        try:
            return ShardIndex(tuple(Shard(*row) for row in storage.read_json(uri)["listed"]))
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{uri} is no list of shards ({error!r}). Name a folder of tars, or run encode again."
            ) from error
    if storage.exists(join(uri, INDEX)):
        value = storage.read_json(join(uri, INDEX))
        try:
            shards = tuple(
                Shard(join(uri, row["name"]), int(row["num_samples"]), int(row["size_bytes"]), row["sha256"])
                for row in value["shards"]
            )
            index = ShardIndex(shards)
            if index.digest != value["digest"]:
                raise ValueError("its digest does not fit its shards")
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{join(uri, INDEX)} is damaged ({error!r}). Write the shards again.") from error
        return index
    # There may be a million: each is held once, and few wait for their statistics at a time.
    found: list[Shard] = []
    with_stats: set[str] = set()
    for info in storage.list(uri):
        if info.uri == join(uri, _WRITING):
            raise DataError(f"The writing of the shards in {uri} was cut short. Run the stage that writes them again.")
        if info.uri.endswith(".tar"):
            found.append(Shard(info.uri, None, info.size_bytes, info.etag, info.etag))
        elif counted and info.uri.endswith(_STATS):
            with_stats.add(info.uri)

    def completed(shard: Shard) -> Shard:
        stats = shard.uri.removesuffix(".tar") + _STATS
        count = storage.read_json(stats).get("successes") if stats in with_stats else None
        return replace(shard, num_samples=count, fingerprint=shard.etag or _sampled_digest(shard, storage))

    with ThreadPoolExecutor(_STATS_AT_ONCE) as pool:
        for first in range(0, len(found), _SHARDS_AT_ONCE):
            some = slice(first, first + _SHARDS_AT_ONCE)
            found[some] = pool.map(completed, found[some])
    if not found:
        raise DataError(f"There are no shards (*.tar) in {uri}. Check the address, or run the prepare stage first.")
    return ShardIndex(tuple(found))


def _sampled_digest(shard: Shard, storage: Storage) -> str:
    """Return a digest of the size of a local tar and of some of its bytes: what stands for it where nobody made an
    index. All of them may be more than a machine can read before each run."""
    total = hashlib.sha256(str(shard.size_bytes).encode())
    for number in range(_SAMPLED_PLACES):
        start = shard.size_bytes * number // _SAMPLED_PLACES
        if start < shard.size_bytes:
            total.update(storage.read_range(shard.uri, start, start + _SAMPLED_BYTES).data)
    return total.hexdigest()


def tar_of(samples: Iterable[Mapping[str, Any]]) -> bytes:
    """The samples, as `write_shards` takes them, as one tar; the same samples give the same bytes. DataError for a bad
    key or member."""
    buffer = io.BytesIO()
    write_tar(samples, buffer)
    return buffer.getvalue()


def write_tar(samples: Iterable[Mapping[str, Any]], file: IO[bytes]) -> None:
    """Writes what `tar_of` returns into a file, sample by sample."""
    keys: set[str] = set()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for sample in samples:
            key = sample.get("__key__")
            if not isinstance(key, str) or not is_file_name(key):
                raise DataError(
                    f"The sample key {key!r} cannot be a file name: it must be a text without '.', which may have "
                    "folders before it ('a/b')."
                )
            if key in keys:
                raise DataError(f"The sample key {key!r} comes twice. Keys must be unique within a shard.")
            keys.add(key)
            for extension, data in _members(key, sample):
                header = tarfile.TarInfo(f"{key}.{extension}")  # time, owner and group stay 0: equal data, equal bytes
                header.size, header.mode = len(data), 0o444
                try:
                    tar.addfile(header, io.BytesIO(data))
                except ValueError as error:  # it is no text at all
                    raise DataError(f"The sample key {key!r} cannot be a file name in a tar: {error}.") from error


def is_file_name(key: str) -> bool:
    """Whether samples with this key can be written: a name without a dot, with folders before it or not."""
    *folders, name = key.split("/")
    return bool(name) and "." not in name and "\0" not in key and not {"", ".", ".."} & set(folders)


def _members(key: str, sample: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    names = sorted(name for name in sample if not name.startswith("__"))
    if not names:
        raise DataError(f"The sample {key!r} has no members. Give at least one, such as png or txt, as bytes.")
    for name in names:
        data = sample[name]
        if not isinstance(data, bytes):
            raise DataError(f"Member {name!r} of sample {key!r} is {type(data).__name__}: it must be bytes.")
        if name != name.lower():
            raise DataError(f"Member {name!r} of sample {key!r}: readers expect extensions in lower case.")
        yield name, data

"""What is measured beside rates: the wait for the first batch, memory over time, and whether resume is exact."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch

from fewstep.bench.data.readers import DataSet, fewstep
from fewstep.data.canonical import ShardOrder
from fewstep.data.order import shuffle_block
from fewstep.data.shards import Shard, ShardIndex, read_index
from fewstep.data.stream import Batch, ShardStream, StreamSettings

_SAMPLE_EVERY_S = 2.0


def first_batch(data: DataSet, uri: str, *, rounds: int) -> dict[str, Any]:
    """Return the seconds from the known list of shards to the first batch, and those that listing took.

    Args:
        data: how shards are read; its own are not.
        uri: folder of many shards without an index, so that they have to be listed.
        rounds: of which the median counts.
    """
    listing, first = [], []
    for _ in range(rounds):
        begin = time.perf_counter()
        shards = read_index(uri, storage=data.storage)
        listing.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        next(fewstep(replace(data, shards=shards)))
        first.append(time.perf_counter() - begin)
    return {"num_shards": len(shards.shards), "listing_s": median(listing), "first_batch_s": median(first),
            "first_batch_s_by_round": first}  # fmt: skip


def memory(data: DataSet, *, minutes: float) -> dict[str, Any]:
    """Return the resident memory of this process while it reads at full rate, and its growth after the first minute.

    Growth compares the means of the second and of the last minute (or of the second and the last twentieth of a shorter
    run).

    Args:
        data: what is read, again and again.
        minutes: of reading.
    """
    process = psutil.Process()
    begin = last = time.perf_counter()
    taken: list[tuple[float, int]] = []
    samples = 0
    for count in fewstep(data):
        samples += count
        now = time.perf_counter()
        if now - last >= min(_SAMPLE_EVERY_S, 60 * minutes / 100):
            taken.append(((now - begin) / 60, process.memory_info().rss))
            last = now
        if now - begin > 60 * minutes:
            break
    part = min(1.0, minutes / 20)
    early = [size for at, size in taken if part <= at < 2 * part]
    late = [size for at, size in taken if at >= minutes - part]
    growth = (sum(late) / len(late)) / (sum(early) / len(early)) - 1
    return {"minutes": minutes, "samples": samples, "rss_bytes_by_minute": _by_minute(taken), "growth": growth}


def _by_minute(taken: Sequence[tuple[float, int]]) -> list[int]:
    minutes = itertools.groupby(taken, key=lambda entry: int(entry[0]))
    return [round(sum(sizes) / len(sizes)) for _, entries in minutes for sizes in [[size for _, size in entries]]]


def resume(data: DataSet, *, stops: int, processes: Sequence[int] = (1, 2, 4, 3)) -> dict[str, Any]:
    """Stop at random steps and go on, also with other numbers of loading processes; count the batches that differ.

    Every stop is followed by two batches. The steps reach over the end of an epoch. A batch is its keys' order, its
    tensors' bits and its state.

    Args:
        data: what is read.
        stops: random steps.
        processes: numbers of loading processes that take turns after each other, with the state of the one before.
    """
    known = data.shards.num_samples or 0
    steps = 2 * known // data.batch_size + 4  # over the ends of two epochs
    wanted = [_fingerprint(batch) for batch in _take(data, None, steps)]
    states = [batch.state for batch in _take(data, None, steps)]
    drawn = random.Random(0)
    different = 0
    for _ in range(stops):
        step = drawn.randrange(steps - 2)
        got = [_fingerprint(batch) for batch in _take(data, states[step], 2)]
        different += sum(a != b for a, b in zip(got, wanted[step + 1 : step + 3], strict=True))
    state, at = None, 0
    for number in processes:
        changed = replace(data, stream=data.stream.model_copy(update={"loader_processes": number}))
        for batch in _take(changed, state, steps // len(processes)):
            different += _fingerprint(batch) != wanted[at]
            state, at = batch.state, at + 1
    epochs = max(place[0] for place in states[-1]["streams"].values())
    return {"stops": stops, "processes": list(processes), "steps": steps, "epochs": epochs, "different": different}


def _take(data: DataSet, state: dict[str, Any] | None, count: int) -> list[Batch]:
    with ShardStream(
        data.shards, storage=data.storage, decode=data.decoder(), settings=data.stream,
        global_batch_size=data.batch_size, seed=0,
    ) as stream:  # fmt: skip
        if state is not None:
            stream.load_state(json.loads(json.dumps(state)))
        return list(itertools.islice(stream, count))


def _fingerprint(batch: Batch) -> str:
    digest = hashlib.sha256(json.dumps([batch.rows, batch.state]).encode())
    for name, value in sorted(batch.data.items()):
        digest.update(name.encode())
        digest.update(value.numpy().tobytes() if isinstance(value, torch.Tensor) else json.dumps(value).encode())
    return digest.hexdigest()


def shuffle_quality(
    stream: StreamSettings,
    *,
    num_shards: int = 256,
    samples_per_shard: int = 1000,
    sample_bytes: int = 92_000,
    batch_size: int = 512,
) -> dict[str, Any]:
    """Return how well an epoch is mixed, by the order alone, beside a full permutation of the same samples.

    moved: mean distance between a sample's place in the shards and in the epoch, as a share of all samples; a full
    permutation's is 1/3. shards_in_a_batch: from how many shards a batch's samples come. neighbours_in_a_batch: share
    of pairs that lie side by side in a shard and come into the same batch.

    Args:
        stream: settings of the stream.
        num_shards, samples_per_shard, sample_bytes: of the data set; its samples are of one size.
        batch_size: samples of a batch.
    """  # fmt: skip
    size = samples_per_shard * sample_bytes
    order = ShardOrder(
        [Shard(str(number), samples_per_shard, size) for number in range(num_shards)],
        num_streams=stream.num_streams, seed=0, piece_bytes=stream.piece_bytes, shuffle_bytes=stream.shuffle_bytes,
    )  # fmt: skip
    streams = []
    for number in range(stream.num_streams):
        taken: list[np.ndarray] = []
        for block_number, block in enumerate(order.blocks(0, number)):
            ranges = [
                (piece.shard * samples_per_shard, -(-piece.start // sample_bytes), -(-piece.end // sample_bytes))
                for piece in block
            ]
            samples = np.concatenate([first + np.arange(start, end) for first, start, end in ranges])
            mixed = shuffle_block(len(samples), seed=0, epoch=0, stream=number, block=block_number)
            taken.append(samples[mixed])
        streams.append(np.concatenate(taken))
    shortest = min(map(len, streams))
    epoch = np.stack([samples[:shortest] for samples in streams], axis=1).reshape(-1)  # a batch takes from each in turn
    random_order = np.random.default_rng(0).permutation(num_shards * samples_per_shard)
    return {
        "num_shards": num_shards, "samples": num_shards * samples_per_shard, "batch_size": batch_size,
        "ours": _mixing(epoch, samples_per_shard, batch_size),
        "permutation": _mixing(random_order, samples_per_shard, batch_size),
    }  # fmt: skip


def _mixing(order: np.ndarray, samples_per_shard: int, batch_size: int) -> dict[str, float]:
    batches = [order[start : start + batch_size] for start in range(0, len(order) - batch_size + 1, batch_size)]
    batch_of = np.full(int(order.max()) + 2, -1)
    batch_of[order] = np.arange(len(order)) // batch_size
    first = np.arange(int(order.max()) + 1)
    first = first[(first + 1) % samples_per_shard != 0]
    together = (batch_of[first] == batch_of[first + 1]) & (batch_of[first] >= 0)
    return {
        "moved": float(np.abs(order - np.arange(len(order))).mean() / len(order)),
        "shards_in_a_batch": float(np.mean([len(np.unique(batch // samples_per_shard)) for batch in batches])),
        "neighbours_in_a_batch": float(together.mean()),
    }


def only(shards: ShardIndex, count: int) -> ShardIndex:
    """Return the first shards of a list."""
    first: tuple[Shard, ...] = shards.shards[:count]
    return ShardIndex(first)

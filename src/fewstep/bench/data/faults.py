"""A store behind a bad network, and what is lost of a data set that is read through it."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

from aiohttp import web

from fewstep.bench.data.proxy import Proxy
from fewstep.bench.data.readers import DataSet
from fewstep.data.pieces import PieceReader
from fewstep.data.sample import Sample
from fewstep.data.stream import ShardStream

_BUSY = "<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


class BadNetwork(Proxy):
    """A proxy that resets some answers in their middle and answers other reads with 503 SlowDown.

    Args:
        endpoint_url: of the store.
        reset_share: of the reads whose connection is reset after a random part of the answer.
        busy_share: of the reads that are answered with 503.
        seed: of the choice.
    """

    def __init__(self, endpoint_url: str, *, reset_share: float, busy_share: float, seed: int = 0) -> None:
        super().__init__(endpoint_url)
        self._draw = random.Random(seed)
        self._reset_share, self._busy_share = reset_share, busy_share
        self.faults: Counter[str] = Counter()

    def refusal(self, request: web.Request) -> web.Response | None:
        if not _is_read(request) or self._draw.random() >= self._busy_share:
            return None
        self.faults["busy"] += 1
        return web.Response(status=503, text=_BUSY, content_type="application/xml")

    async def give(self, request: web.Request, answer: web.Response) -> web.StreamResponse:
        body = answer.body
        if not _is_read(request) or self._draw.random() >= self._reset_share or not isinstance(body, bytes) or not body:
            return answer
        self.faults["reset"] += 1
        response = web.StreamResponse(status=answer.status, headers=answer.headers)
        response.content_length = len(body)
        await response.prepare(request)
        await response.write(body[: self._draw.randrange(len(body))])
        if request.transport is not None:
            request.transport.abort()
        return response


def _is_read(request: web.Request) -> bool:
    return request.method == "GET" and "Range" in request.headers


def faults(data: DataSet, *, reset_share: float = 0.05, busy_share: float = 0.02) -> dict[str, Any]:
    """Read an epoch through a bad network, with one shard cut to half and one missing; say what is lost and doubled.

    The two shards stay as they are then.

    Args:
        data: what is read.
        reset_share, busy_share: as for `BadNetwork`.
    """
    storage, (cut, missing) = data.storage, data.shards.shards[1:3]
    reader = PieceReader(storage)
    by_shard = {
        shard.uri: [sample.key for sample in reader.load(shard, 0, shard.size_bytes).samples]
        for shard in data.shards.shards
    }
    storage.write_bytes(cut.uri, storage.read_bytes(cut.uri)[: cut.size_bytes // 2])
    storage.delete(missing.uri)
    with BadNetwork(storage.endpoint_url or "", reset_share=reset_share, busy_share=busy_share) as network:
        got, counts = _epoch(replace(data, storage=storage.through(network.url, retry_base_s=0.01)))
    unreadable = {*by_shard[missing.uri], *by_shard[cut.uri]}
    readable = {key for keys in by_shard.values() for key in keys} - unreadable
    return {
        "resets": network.faults["reset"],
        "busy": network.faults["busy"],
        "samples": sum(map(len, by_shard.values())),
        "lost_of_whole_shards": len(readable - set(got)),
        "doubled": sum(count - 1 for count in Counter(got).values()),
        "kept_of_the_cut_shard": len(set(got) & set(by_shard[cut.uri])),
        "in_the_cut_shard": len(by_shard[cut.uri]),
        "counted": counts,
    }


def _epoch(data: DataSet) -> tuple[list[str], dict[str, int]]:
    """Return the keys of the first epoch, and what was counted in it."""
    settings = data.stream.model_copy(update={"max_bad_share": 1.0, "cache_bytes": 0})
    keys: list[str] = []
    counts: dict[str, int] = {}
    with ShardStream(
        data.shards, storage=data.storage, decode=_key_alone, settings=settings,
        global_batch_size=settings.num_streams, seed=1,
    ) as stream:  # fmt: skip
        for batch in stream:  # one sample of each stream, whose epoch the state tells
            epochs = [batch.state["streams"][str(row)][0] for row in batch.rows]
            if min(epochs) > 0:
                break
            keys += [key for key, epoch in zip(batch.data["key"], epochs, strict=True) if epoch == 0]
            counts = batch.counts
    return keys, counts


def _key_alone(sample: Sample) -> dict[str, Any]:
    return {"key": sample["__key__"]}

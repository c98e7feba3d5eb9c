"""The readers that are measured beside each other. All run in one process, which `measure` keeps on one core.

Each is a function of the data set that yields batches; a batch counts as many samples as it holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import boto3
import numpy as np
import torch
import webdataset
from PIL import Image, ImageOps

from fewstep.data.latents import decode_latents
from fewstep.data.part import stack_samples
from fewstep.data.pictures import decode_picture
from fewstep.data.pieces import PieceReader
from fewstep.data.shards import ShardIndex
from fewstep.data.source import Decode, as_sample
from fewstep.data.stream import ShardStream, StreamSettings
from fewstep.storage import Storage


@dataclass(frozen=True)
class DataSet:
    """Shards and how they are read.

    Attributes:
        shards: the list of them.
        storage: where they lie.
        resolution: side of the pictures in pixels; 0: they hold latents.
        batch_size: samples of a batch.
        stream: settings of our stream.
    """

    shards: ShardIndex
    storage: Storage
    resolution: int
    batch_size: int
    stream: StreamSettings

    def decoder(self) -> Decode:
        """Return the function from a sample to tensors that training uses."""
        return partial(decode_picture, resolution=self.resolution) if self.resolution else decode_latents


def bare(data: DataSet) -> Iterator[int]:
    """Decode and stack samples that lie in memory: what a core can do when nothing has to be read."""
    reader, kept = PieceReader(data.storage), []
    for shard in data.shards.shards[:4]:
        kept += [as_sample(sample) for sample in reader.load(shard, 0, shard.size_bytes).samples]
    decode, at = data.decoder(), 0
    while True:
        batch = [decode(kept[(at + number) % len(kept)]) for number in range(data.batch_size)]
        stack_samples(batch)
        at += data.batch_size
        yield data.batch_size


def fewstep(data: DataSet) -> Iterator[int]:
    """Read with the stream that training uses; nothing is kept between epochs."""
    settings = data.stream.model_copy(update={"cache_bytes": 0})
    with ShardStream(
        data.shards,
        storage=data.storage,
        decode=data.decoder(),
        settings=settings,
        global_batch_size=data.batch_size,
        seed=0,
    ) as stream:
        for batch in stream:
            yield len(batch.rows)


def plain_webdataset(data: DataSet) -> Iterator[int]:
    """Read with webdataset as its documentation shows it: a pipe from each URL, a shuffle buffer, Pillow."""
    client = _client(data.storage)
    urls = []
    for shard in data.shards.shards:
        bucket, key = shard.uri.removeprefix("s3://").split("/", 1)
        urls.append(client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=86400))
    side = (data.resolution, data.resolution)

    def pixels(picture: Image.Image) -> torch.Tensor:
        fitted = ImageOps.fit(picture.convert("RGB"), side, Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).contiguous()

    samples = webdataset.WebDataset(
        [f"pipe:curl -s -L '{url}'" for url in urls], shardshuffle=len(urls), empty_check=False
    ).repeat()
    samples = samples.shuffle(1000).decode("pil").to_tuple("jpg", "txt").map_tuple(pixels, lambda text: text)
    for batch in samples.batched(data.batch_size):
        yield len(batch[0])


def boto3_alone(data: DataSet) -> Iterator[int]:
    """Read whole shards with boto3, one after another, and do nothing with them."""
    client = _client(data.storage)
    while True:
        for shard in data.shards.shards:
            bucket, key = shard.uri.removeprefix("s3://").split("/", 1)
            client.get_object(Bucket=bucket, Key=key)["Body"].read()
            yield shard.num_samples or 0


def _client(storage: Storage) -> Any:
    values = storage.environment()
    return boto3.client(
        "s3",
        endpoint_url=values.get("AWS_ENDPOINT_URL_S3"),
        region_name=values["AWS_REGION"],
        aws_access_key_id=values.get("AWS_ACCESS_KEY_ID"),
        aws_secret_access_key=values.get("AWS_SECRET_ACCESS_KEY"),
    )

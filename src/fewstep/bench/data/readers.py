"""The readers that are measured beside each other. All run in one process, which `measure` keeps on one core.

Each is a function of the data set that yields batches; a batch counts as many samples as it holds.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
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
from fewstep.data.sample import Decode
from fewstep.data.shards import ShardIndex
from fewstep.data.source import as_sample
from fewstep.data.stream import ShardStream, StreamSettings
from fewstep.errors import DataError
from fewstep.storage import Storage

_MDS = "mds"


@dataclass(frozen=True)
class DataSet:
    """Shards and how they are read.

    Attributes:
        shards: the list of them.
        storage: where they lie.
        resolution: side of the pictures in pixels; 0: they hold latents.
        batch_size: samples of a batch.
        stream: settings of our stream.
        streaming_python: interpreter of an environment with mosaicml-streaming; None: that is left out.
    """

    shards: ShardIndex
    storage: Storage
    resolution: int
    batch_size: int
    stream: StreamSettings
    streaming_python: str | None = None

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


def mosaicml_streaming(data: DataSet) -> Iterator[int]:
    """Read with mosaicml-streaming, from MDS shards of the same pictures, in a process of its own environment."""
    bucket, _ = _first_place(data)
    with tempfile.TemporaryDirectory(prefix="fewstep-mds-") as local:
        options = [bucket, _MDS, local, str(data.resolution), str(data.batch_size)]
        with _mosaic(data, "read", options, stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    yield int(line)
                raise DataError("mosaicml-streaming ended; its own words stand above")
            finally:
                process.kill()


def convert_for_streaming(data: DataSet) -> None:
    """Write the pictures as MDS shards beside the tars.

    Raises:
        DataError: the environment has no mosaicml-streaming, or it failed.
    """
    bucket, folder = _first_place(data)
    with _mosaic(data, "convert", [data.storage.endpoint_url or "", bucket, folder, _MDS]) as process:
        if process.wait() != 0:
            raise DataError(
                f"{data.streaming_python} could not convert the pictures for mosaicml-streaming; its own words stand "
                "above. It needs an environment with mosaicml-streaming, boto3, Pillow and torch"
            )


def _mosaic(data: DataSet, mode: str, options: list[str], **pipes: Any) -> subprocess.Popen[str]:
    values = data.storage.environment()
    environment = {**os.environ, **values, "S3_ENDPOINT_URL": values.get("AWS_ENDPOINT_URL_S3", "")}
    environment.pop("PYTHONPATH", None)
    command = [str(data.streaming_python), "-I", str(Path(__file__).with_name("mosaic.py")), mode, *options]
    try:
        return subprocess.Popen(command, env=environment, text=True, **pipes)
    except OSError as error:
        raise DataError(
            f"--streaming-python {data.streaming_python}: {error.strerror}. Name the Python of an environment with "
            "mosaicml-streaming, boto3, Pillow and torch"
        ) from error


def _first_place(data: DataSet) -> tuple[str, str]:
    bucket, key = data.shards.shards[0].uri.removeprefix("s3://").split("/", 1)
    return bucket, key.rsplit("/", 1)[0]


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

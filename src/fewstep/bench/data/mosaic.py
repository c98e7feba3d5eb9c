"""mosaicml-streaming on the same pictures. A script for its own environment: it imports nothing of fewstep's.

    python mosaic.py convert ENDPOINT BUCKET TARS MDS        # webdataset tars below TARS become MDS shards below MDS
    python mosaic.py read BUCKET MDS LOCAL SIDE BATCH_SIZE   # prints the size of each batch that was read

Credentials come from the environment, as boto3 takes them.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import io
import os
import sys
import tarfile
import types
from typing import Any


def _without_torchvision() -> None:
    """Let streaming be imported where torchvision is missing: of that it only needs the name of a base class here."""
    if importlib.util.find_spec("torchvision") is not None:
        return
    import transformers.feature_extraction_utils  # noqa: F401  # which would look for it too

    names = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
    for name in names:
        module: Any = types.ModuleType(name)
        module.__path__, module.__spec__ = [], importlib.machinery.ModuleSpec(name, None)
        module.VisionDataset, module.to_tensor = object, None
        sys.modules[name] = module


def convert(endpoint: str, bucket: str, tars: str, mds: str) -> None:
    """Write the pictures and captions of the tars as MDS shards of streaming's usual size."""
    import boto3
    from streaming import MDSWriter

    client = boto3.client("s3", endpoint_url=endpoint)
    listed = client.list_objects_v2(Bucket=bucket, Prefix=f"{tars}/")["Contents"]
    with MDSWriter(out=f"s3://{bucket}/{mds}", columns={"jpg": "bytes", "txt": "str"}, progress_bar=False) as writer:
        for key in sorted(item["Key"] for item in listed if item["Key"].endswith(".tar")):
            data = client.get_object(Bucket=bucket, Key=key)["Body"].read()
            sample: dict[str, bytes] = {}
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                for member in tar:
                    file = tar.extractfile(member)
                    assert file is not None
                    sample[member.name.rsplit(".", 1)[1]] = file.read()
                    if "jpg" in sample and "txt" in sample:
                        writer.write({"jpg": sample["jpg"], "txt": sample["txt"].decode()})
                        sample = {}


def read(bucket: str, mds: str, local: str, side: str, batch_size: str) -> None:
    """Read without end, in shuffled order."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps
    from streaming import StreamingDataset

    torch.set_num_threads(1)
    size = (int(side), int(side))

    class Pictures(StreamingDataset):
        def __getitem__(self, at: int) -> Any:
            sample = super().__getitem__(at)
            picture = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
            fitted = ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
            return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).contiguous(), sample["txt"]

    pictures = Pictures(
        remote=f"s3://{bucket}/{mds}", local=local, shuffle=True, batch_size=int(batch_size), predownload=512
    )
    loader: Any = torch.utils.data.DataLoader(pictures, batch_size=int(batch_size), drop_last=True)
    while True:
        for pixels, _ in loader:
            print(len(pixels), flush=True)


if __name__ == "__main__":
    _without_torchvision()
    mode, *options = sys.argv[1:]
    if mode == "convert":
        convert(*options)
    else:
        read(*options)
    os._exit(0)  # streaming leaves threads behind

"""encode: pictures and captions become cached latents and text embeddings, once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch

from fewstep.data.latents import latent_sample
from fewstep.data.pictures import decode_picture
from fewstep.data.shards import read_index, write_shards
from fewstep.data.source import SampleCounts, iterate_samples
from fewstep.models import TextToImageParts, load_parts
from fewstep.stages.context import StageContext
from fewstep.stages.progress import Progress
from fewstep.storage import Storage, join

_SAMPLES_PER_SHARD = 500


def encode(context: StageContext) -> dict[str, Any]:
    """Encode the training and the held-out shards with the teacher's VAE and text encoder."""
    recipe = context.recipe
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts = load_parts(context.teacher_folder()).to(device)
    facts: dict[str, Any] = {}
    for split in ("train", "evaluate"):
        facts[split] = encode_shards(
            context.shards(split),
            join(context.uri("encode"), split),
            parts=parts,
            storage=context.storage,
            batch_size=recipe.encode.batch_size,
            max_samples=recipe.encode.max_samples,
            max_bad_share=recipe.stream.max_bad_share,
            min_shards=recipe.stream.num_streams,
            with_text=True,
            label=f"encode {split}",
        )
        context.run.log_metrics(
            {f"{split}_samples": facts[split]["num_samples"], f"{split}_skipped": sum(facts[split]["skipped"].values())}
        )
    return facts


def encode_shards(
    source: str,
    target: str,
    *,
    parts: TextToImageParts,
    storage: Storage,
    batch_size: int,
    max_samples: int | None,
    max_bad_share: float,
    min_shards: int,
    with_text: bool,
    label: str,
) -> dict[str, Any]:
    """Write the latent shards of picture shards and return digest, number of samples and what was skipped.

    Args:
        source, target: URIs of the picture shards and of the latent shards.
        parts: VAE, and text encoder when `with_text`.
        min_shards: shards to make at least, so that every stream of the training has one.
    """
    index = read_index(source, storage=storage)
    counts = SampleCounts(max_bad_share)
    samples = iterate_samples(
        index.shards,
        storage=storage,
        decode=partial(decode_picture, resolution=parts.resolution),
        counts=counts,
    )
    total = index.num_samples if max_samples is None else min(max_samples, index.num_samples or max_samples)
    per_shard = min(_SAMPLES_PER_SHARD, max(1, (total or _SAMPLES_PER_SHARD * min_shards) // min_shards))
    with Progress(label, total, "images") as progress:
        written = write_shards(
            _encoded(islice(samples, max_samples), parts, batch_size, with_text, progress),
            target,
            samples_per_shard=per_shard,
            storage=storage,
        )
    return {
        "digest": written.digest,
        "source_digest": index.digest,
        "num_samples": written.num_samples,
        "num_shards": len(written.shards),
        "skipped": dict(counts.skipped),
    }


def _encoded(
    samples: Iterable[dict[str, Any]], parts: TextToImageParts, batch_size: int, with_text: bool, progress: Progress
) -> Iterator[dict[str, Any]]:
    for batch in _batched(samples, batch_size):
        mean, std = parts.encode_pictures(torch.stack([sample["pixels"] for sample in batch]))
        captions = [sample["caption"] for sample in batch]
        text = parts.encode_prompts(captions) if with_text else None
        for row, sample in enumerate(batch):
            yield latent_sample(
                sample["key"], captions[row], mean[row], std[row], text[row] if text is not None else None
            )
        progress.advance(len(batch))


def _batched(samples: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    iterator = iter(samples)
    while batch := list(islice(iterator, size)):
        yield batch

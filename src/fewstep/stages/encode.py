"""encode: pictures and captions become cached latents and text embeddings, once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch

from fewstep.data.latents import latent_sample
from fewstep.data.pictures import decode_picture
from fewstep.data.shards import Shard, read_index, write_index, write_shard
from fewstep.data.source import Decode, SampleCounts, iterate_shard
from fewstep.models import TextToImageParts, load_parts
from fewstep.stages.context import StageContext, folder_digest, latents_fingerprint, pin_teacher
from fewstep.stages.device import driver_device
from fewstep.stages.progress import Progress
from fewstep.storage import Storage, join


def encode(context: StageContext) -> dict[str, Any]:
    """Encode the training and the held-out shards with the teacher's VAE and text encoder."""
    recipe = context.recipe
    teacher = pin_teacher(context)
    folder = context.fetch(teacher)
    parts = load_parts(folder).to(driver_device(recipe.cluster))
    facts: dict[str, Any] = {"teacher": teacher, "teacher_digest": folder_digest(folder)}
    splits: tuple[Literal["train", "evaluate"], ...] = ("train", "evaluate")
    for split in splits:
        shards = context.shards(split)
        name = latents_fingerprint(
            recipe,
            shards_digest=read_index(shards, storage=context.storage).digest,
            teacher_digest=facts["teacher_digest"],
        )[:16]
        facts[split] = encode_shards(
            shards,
            join(context.storage.root, "latents", split, name),
            parts=parts,
            storage=context.storage,
            batch_size=recipe.encode.batch_size,
            max_bad_share=recipe.stream.max_bad_share,
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
    max_bad_share: float,
    with_text: bool,
    label: str,
) -> dict[str, Any]:
    """Write the latent shards of picture shards; return their address, digest and size, and what was skipped.

    One latent shard for every picture shard. Each leaves a record when it is written, so that a run that was killed
    goes on at the next one; the index comes last.

    Args:
        source, target: URIs of the picture shards and of the latent shards.
        parts: VAE, and text encoder when `with_text`.
        batch_size: pictures encoded at once.
        max_bad_share: share of broken samples above which it is an error.
        with_text: whether text embeddings are stored beside the latents.
        label: for the progress.

    Raises:
        DataError: more samples than allowed are broken, or a shard has no sample that can be used.
    """
    index = read_index(source, storage=storage)
    counts = SampleCounts(max_bad_share, index.num_samples)
    decode = partial(decode_picture, resolution=parts.resolution)
    written: list[Shard] = []
    record_uris = [join(target, "records", f"{number:05d}.json") for number in range(len(index.shards))]
    records = [_read_record(uri, shard, storage) for uri, shard in zip(record_uris, index.shards, strict=True)]
    done = sum(record["seen"] for record in records if record is not None)
    with Progress(label, index.num_samples, "images", done=done) as progress:
        for number, (shard, record) in enumerate(zip(index.shards, records, strict=True)):
            uri = join(target, f"{number:05d}.tar")
            if record is None:
                record = _encode_shard(
                    shard, uri, parts=parts, storage=storage, batch_size=batch_size, with_text=with_text, counts=counts,
                    decode=decode, progress=progress,
                )  # fmt: skip
                storage.write_json(record_uris[number], {**record, "source": _source(shard)})
            else:
                counts.seen += record["seen"]
                for reason, count in record["skipped"].items():
                    counts.skipped[reason] = counts.skipped.get(reason, 0) + count
            if record["shard"] is not None:
                written.append(Shard(uri, **record["shard"]))
        counts.finish()
    latents = write_index(written, target, storage=storage)
    return {
        "uri": target,
        "digest": latents.digest,
        "source_digest": index.digest,
        "num_samples": latents.num_samples,
        "num_shards": len(written),
        "skipped": dict(counts.skipped),
    }


def _source(shard: Shard) -> dict[str, Any]:
    return {"uri": shard.uri, "size_bytes": shard.size_bytes, "fingerprint": shard.fingerprint}


def _read_record(uri: str, shard: Shard, storage: Storage) -> dict[str, Any] | None:
    """Return what an earlier run noted about this shard; None where it has not come to it, or the shard has changed."""
    record: dict[str, Any] | None = storage.read_json(uri) if storage.exists(uri) else None
    return record if record is not None and record["source"] == _source(shard) else None


def _encode_shard(
    shard: Shard,
    uri: str,
    *,
    parts: TextToImageParts,
    storage: Storage,
    batch_size: int,
    with_text: bool,
    counts: SampleCounts,
    decode: Decode,
    progress: Progress,
) -> dict[str, Any]:
    before = counts.copy()
    samples = iterate_shard(shard, storage=storage, decode=decode, counts=counts)
    encoded = list(_encoded(samples, parts, batch_size, with_text, progress))
    skipped = {reason: count - before.skipped.get(reason, 0) for reason, count in counts.skipped.items()}
    record: dict[str, Any] = {"shard": None, "seen": counts.seen - before.seen, "skipped": skipped}
    progress.advance(record["seen"] - len(encoded))
    # A shard without one sample that can be used is counted like the samples; how many may be is judged over all.
    if encoded:
        facts = asdict(write_shard(encoded, uri, storage=storage))
        record["shard"] = {key: value for key, value in facts.items() if key != "uri"}
    return record


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

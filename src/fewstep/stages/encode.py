"""encode: pictures and captions become cached latents and text embeddings, once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.data.latents import latent_sample
from fewstep.data.masks import MaskSettings, random_mask
from fewstep.data.pictures import Crop
from fewstep.data.samples import NO_RULES, SampleRules
from fewstep.data.shards import Shard, read_index, write_index, write_shard
from fewstep.data.source import Decode, SampleCounts, iterate_shard
from fewstep.errors import RecipeError
from fewstep.models import Parts, load_model
from fewstep.stages.batches import format_of, picture_decoder
from fewstep.stages.context import StageContext, pin_teacher
from fewstep.stages.device import driver_device
from fewstep.stages.fingerprints import folder_digest, latents_fingerprint
from fewstep.stages.progress import Progress
from fewstep.storage import Storage, join


def encode(context: StageContext) -> dict[str, Any]:
    """Encode the training and the held-out shards with the teacher's VAE and text encoder."""
    recipe = context.recipe
    teacher = pin_teacher(context)
    folder = context.fetch(teacher)
    parts = load_model(folder).to(driver_device(recipe.cluster))
    is_inpainting = "mask" in parts.denoiser().condition_names
    if recipe.encode.picture_sizes:
        check_takes_sizes(parts, teacher)
    facts: dict[str, Any] = {
        "teacher": teacher,
        "teacher_digest": folder_digest(folder),
        "format": format_of(parts).to_json(),
    }
    splits: tuple[Literal["train", "evaluate"], ...] = ("train", "evaluate")
    for split in splits:
        shards = context.shards(split)
        if not parts.stores_latents:
            facts[split] = _pictures(shards, context.storage)
            continue
        name = latents_fingerprint(
            recipe,
            shards_digest=read_index(shards, storage=context.storage).digest,
            teacher_digest=facts["teacher_digest"],
            masks=is_inpainting,
        )[:16]
        facts[split] = encode_shards(
            shards,
            join(context.storage.root, "latents", split, name),
            parts=parts,
            storage=context.storage,
            batch_size=recipe.encode.batch_size,
            max_bad_share=recipe.stream.max_bad_share,
            rules=recipe.sample_rules,
            crop=recipe.encode.crop,
            picture_sizes=recipe.encode.picture_sizes,
            masks=recipe.encode.masks if is_inpainting else None,
            seed=recipe.seed,
            label=f"encode {split}",
        )
        context.run.log_metrics(
            {
                f"{split}_samples": facts[split]["num_samples"],
                f"{split}_skipped": sum(facts[split]["skipped"].values()),
                f"{split}_filtered": sum(facts[split]["filtered"].values()),
            }
        )
    return facts


def check_takes_sizes(parts: Parts, name: str) -> None:
    """Raise a RecipeError unless the model is told a picture's sizes."""
    if "time_ids" not in parts.denoiser().condition_names:
        raise RecipeError(
            f"encode.picture_sizes=true is for models of Stable Diffusion XL's shape, and {name} takes no sizes: leave "
            "it out"
        )


def _pictures(shards: str, storage: Storage) -> dict[str, Any]:
    """Return the facts of a split that is trained on as it is, in pixels."""
    index = read_index(shards, storage=storage)
    return {
        "uri": shards,
        "digest": index.digest,
        "source_digest": index.digest,
        "num_samples": index.num_samples,
        "num_shards": len(index.shards),
        "skipped": {},
        "filtered": {},
    }


def encode_shards(
    source: str,
    target: str,
    *,
    parts: Parts,
    storage: Storage,
    batch_size: int,
    max_bad_share: float,
    rules: SampleRules = NO_RULES,
    crop: Crop = "center",
    picture_sizes: bool = False,
    condition_names: Sequence[str] | None = None,
    masks: MaskSettings | None = None,
    seed: int = 0,
    label: str,
) -> dict[str, Any]:
    """Write the latent shards of picture shards; return their address, digest and size, and what was skipped.

    One latent shard for every picture shard. Each leaves a record when it is written, so that a run that was killed
    goes on at the next one; the index comes last.

    Args:
        source, target: URIs of the picture shards and of the latent shards.
        parts: the VAE, and what makes the condition.
        batch_size: pictures encoded at once.
        max_bad_share: share of broken samples above which it is an error.
        rules: which samples are used, and what their captions are.
        crop: what is kept of a picture's longer side.
        picture_sizes: tell a model that takes time_ids each picture's own size and crop.
        condition_names: parts of the condition (text, mask …) that are stored beside the latents; None: all.
        masks: for inpainting: how the mask of each picture is drawn; None: none is.
        seed: of the masks and of random crops.
        label: for the progress.

    Raises:
        DataError: more samples than allowed are broken, or a shard has no sample that can be used.
    """
    index = read_index(source, storage=storage)
    counts = SampleCounts(max_bad_share, index.num_samples)
    decode = picture_decoder(parts, rules, crop=crop, seed=seed, sizes=picture_sizes)
    written: list[Shard] = []
    record_uris = [join(target, "records", f"{number:05d}.json") for number in range(len(index.shards))]
    records = [_read_record(uri, shard, storage) for uri, shard in zip(record_uris, index.shards, strict=True)]
    done = sum(record["seen"] for record in records if record is not None)
    with Progress(label, index.num_samples, "images", done=done) as progress:
        for number, (shard, record) in enumerate(zip(index.shards, records, strict=True)):
            uri = join(target, f"{number:05d}.tar")
            if record is None:
                record = _encode_shard(
                    shard, uri, parts=parts, storage=storage, batch_size=batch_size, counts=counts,
                    condition_names=condition_names, masks=masks, seed=seed, decode=decode, progress=progress,
                )  # fmt: skip
                storage.write_json(record_uris[number], {**record, "source": _source(shard)})
            else:
                counts.seen += record["seen"]
                for noted, counted in (
                    (record["skipped"], counts.skipped),
                    (record.get("filtered", {}), counts.filtered),
                ):
                    for reason, count in noted.items():
                        counted[reason] = counted.get(reason, 0) + count
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
        "filtered": dict(counts.filtered),
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
    parts: Parts,
    storage: Storage,
    batch_size: int,
    condition_names: Sequence[str] | None,
    masks: MaskSettings | None,
    seed: int,
    counts: SampleCounts,
    decode: Decode,
    progress: Progress,
) -> dict[str, Any]:
    before = counts.copy()
    samples = iterate_shard(shard, storage=storage, decode=decode, counts=counts)
    if masks is not None:
        samples = _masked(samples, masks, parts.resolution, seed)
    encoded = list(_encoded(samples, parts, batch_size, condition_names, progress))
    skipped = {reason: count - before.skipped.get(reason, 0) for reason, count in counts.skipped.items()}
    filtered = {reason: count - before.filtered.get(reason, 0) for reason, count in counts.filtered.items()}
    record: dict[str, Any] = {
        "shard": None, "seen": counts.seen - before.seen, "skipped": skipped, "filtered": filtered
    }  # fmt: skip
    progress.advance(record["seen"] - len(encoded))
    # A shard without one sample that can be used is counted like the samples; how many may be is judged over all.
    if encoded:
        facts = asdict(write_shard(encoded, uri, storage=storage))
        record["shard"] = {key: value for key, value in facts.items() if key != "uri"}
    return record


def _encoded(
    samples: Iterable[dict[str, Any]],
    parts: Parts,
    batch_size: int,
    condition_names: Sequence[str] | None,
    progress: Progress,
) -> Iterator[dict[str, Any]]:
    for batch in _batched(samples, batch_size):
        mean, std = parts.encode_pictures(torch.stack([sample["pixels"] for sample in batch]))
        condition = {} if condition_names == () else parts.conditions(batch)
        for row, sample in enumerate(batch):
            of_row = {
                name: value[row]
                for name, value in condition.items()
                if condition_names is None or name in condition_names
            }
            yield latent_sample(sample["key"], sample.get("caption", ""), mean[row], std[row], of_row)
        progress.advance(len(batch))


def _masked(
    samples: Iterable[dict[str, Any]], masks: MaskSettings, resolution: int, seed: int
) -> Iterator[dict[str, Any]]:
    for sample in samples:
        yield {**sample, "mask": mask_of(sample["key"], resolution, settings=masks, seed=seed)}


def mask_of(key: str, resolution: int, *, settings: MaskSettings, seed: int) -> Tensor:
    """Return the mask of a sample, (1, resolution, resolution) of bool, True where the hole is.

    It belongs to its sample: encoding the shard again, or another one before it, draws the same.

    Args:
        key: of the sample.
        resolution: side of the pictures in pixels.
        settings: how holes are drawn.
        seed: of all masks.
    """
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return random_mask(resolution, resolution, settings=settings, generator=generator)


def _batched(samples: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    iterator = iter(samples)
    while batch := list(islice(iterator, size)):
        yield batch

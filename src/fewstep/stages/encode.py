"""encode: pictures and captions become cached latents and text embeddings, once."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import ray
import torch
from torch import nn

from fewstep.data.buckets import BucketSettings, bucket_sizes
from fewstep.data.mixture import Mixture, Shards, Source, sources_of
from fewstep.data.shards import INDEX, read_index, write_list
from fewstep.distill.tokens import OF_THE_CAPTION, TextEncoders, conditions_without_text
from fewstep.errors import ModelError, RecipeError
from fewstep.models import Parts, SDXLParts, TextToImageParts, load_model
from fewstep.recipe import Recipe, digest
from fewstep.stages.batches import SampleFormat, format_of, format_of_pictures, format_without_text
from fewstep.stages.context import DATA_DIGEST_TAG, StageContext, pin_teacher
from fewstep.stages.device import driver_device
from fewstep.stages.encode_shards import Encoders, Encoding, encode_shards
from fewstep.stages.fingerprints import data_digest, folder_digest, latents_fingerprint
from fewstep.stages.teacher_source import TeacherSource
from fewstep.storage import Storage, join
from fewstep.tracking.names import figure_name
from fewstep.train.settings import ClusterSettings, ElasticWorkers


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
    encoding = encoding_of(recipe, masks=is_inpainting)
    of_training, training_format = encoding, format_of(parts)
    if not recipe.encode.store_text:
        TextEncoders(parts)  # it has some
        of_training = replace(of_training, condition_names=conditions_without_text(parts))
        training_format = format_without_text(parts, teacher)
    if recipe.encode.buckets is not None:
        check_takes_buckets(parts, teacher, recipe.encode.buckets)
        of_training = replace(of_training, buckets=recipe.encode.buckets)
        training_format = replace(training_format, group_by="latent_mean")
    in_training = not recipe.encode.store_latents
    if in_training and not parts.stores_latents:
        raise RecipeError(
            f"encode.store_latents=false is for models that diffuse latents, and {teacher} diffuses pixels, of which "
            "none are stored in any case: leave it out"
        )
    if in_training:
        training_format = _format_of_pictures(parts, teacher, of_training)
    if training_format != format_of(parts):
        facts["training_format"] = training_format.to_json()
    source_of_teacher = TeacherSource(teacher, context.storage, context.tracker.settings)
    encoders = encoders_of(recipe, partial(_load, source_of_teacher, recipe.cluster))
    splits: tuple[Literal["train", "evaluate"], ...] = ("train", "evaluate")
    for split in splits:
        shards = context.shards(split)
        found: list[dict[str, Any]] = []
        as_pictures = not parts.stores_latents or (in_training and split == "train")
        with_text = split == "evaluate" or recipe.encode.store_text
        made_by = "" if as_pictures else encoders_digest(parts, text=with_text)
        for source in sources_of(shards):
            if as_pictures:
                read_as = training_format.to_json() if in_training else None
                found.append(_pictures(source.uri, context.storage, read_as=read_as, listed=split == "train"))
                continue
            # Named by its content, so that it stays when other sources come beside it.
            name = latents_fingerprint(
                recipe,
                shards_digest=read_index(source.uri, storage=context.storage).digest,
                encoders_digest=made_by,
                masks=is_inpainting,
                held_out=split == "evaluate",
            )[:16]
            found.append(
                encode_shards(
                    source.uri,
                    join(context.storage.root, "latents", split, name),
                    parts=parts,
                    storage=context.storage,
                    encoding=encoding if split == "evaluate" else of_training,
                    max_bad_share=recipe.stream.max_bad_share,
                    label=_label(f"encode {split}", source),
                    encoders=encoders if split == "train" else None,
                )
            )
        bad_shards = {uri: count for each in found for uri, count in each.pop("bad_shards", {}).items()}
        if bad_shards:
            _log_bad_shards(split, bad_shards, context)
        facts[split] = found[0] if isinstance(shards, str) else _mixed(shards, found)
        if split == "train":
            digests = [each["source_digest"] for each in found]
            facts["data_digest"] = data_digest(recipe, shards_digests=digests, resolution=parts.resolution)
            context.run.set_tags({DATA_DIGEST_TAG: facts["data_digest"]})
        if parts.stores_latents and facts[split]["num_samples"] is not None:
            context.run.log_metrics(_figures(split, facts[split]))
    return facts


def encoding_of(recipe: Recipe, *, masks: bool = False) -> Encoding:
    """Return how a recipe's pictures are encoded.

    Args:
        recipe: the recipe.
        masks: draw a hole for each picture.
    """
    return Encoding(
        batch_size=recipe.encode.batch_size,
        rules=recipe.sample_rules,
        crop=recipe.encode.crop,
        picture_sizes=recipe.encode.picture_sizes,
        masks=recipe.encode.masks if masks else None,
        seed=recipe.seed,
        precision=recipe.encode.precision,
    )


def encoders_of(recipe: Recipe, load: Callable[[], Parts]) -> Encoders | None:
    """Return the encoders in the cluster that a recipe asks for; None: this process encodes.

    Args:
        recipe: the recipe.
        load: makes the parts on an encoder's device; picklable.
    """
    cluster, asked = recipe.cluster, recipe.encode.encoders
    gpus = int(ray.cluster_resources().get("GPU", 0)) if ray.is_initialized() else torch.cuda.device_count()
    use_gpu = gpus > 0 if cluster.use_gpu == "auto" else cluster.use_gpu
    alone = cluster.address is None and "RAY_ADDRESS" not in os.environ
    if use_gpu and not gpus and alone and not torch.cuda.is_available():
        raise RecipeError(
            "cluster.use_gpu=true, and this machine has no GPU: set it to auto or false, or name a cluster with GPUs"
        )
    if asked != "auto":
        return Encoders(load, asked, use_gpu)
    wanted = cluster.num_workers
    if isinstance(wanted, ElasticWorkers):
        count = max(wanted.min, min(gpus, wanted.max))  # those that a training would have now
    else:
        count = gpus if wanted == "auto" else wanted
    # One GPU that this process has too is faster without another process.
    if not use_gpu or (count < 2 and torch.cuda.is_available()):
        return None
    return Encoders(load, max(1, count), use_gpu)


def _load(source: TeacherSource, cluster: ClusterSettings) -> Parts:
    return source.load().to(driver_device(cluster))


def _label(label: str, source: Source) -> str:
    return label if source.name is None else f"{label}, {source.name}"


def _mixed(mixture: Mixture, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the facts of a mixture: those of each source, and what they are together."""
    named = list(zip(mixture.names, found, strict=True))
    counts = [facts["num_samples"] for facts in found]
    together: dict[str, Any] = {name: digest([facts[name] for facts in found]) for name in ("digest", "source_digest")}
    together["num_samples"] = None if None in counts else sum(counts)
    together["num_shards"] = sum(facts["num_shards"] for facts in found)
    for what in ("skipped", "filtered"):
        together[what] = {f"{name}: {reason}": n for name, facts in named for reason, n in facts[what].items()}
    return {"sources": [{"name": name, **facts} for name, facts in named], **together}


def _figures(split: str, facts: Mapping[str, Any]) -> dict[str, float]:
    figures = {
        f"{split}_samples": facts["num_samples"],
        f"{split}_skipped": sum(facts["skipped"].values()),
        f"{split}_filtered": sum(facts["filtered"].values()),
    }
    for what in ("skipped", "filtered"):
        figures |= {figure_name(f"{split}_{what}", reason): count for reason, count in facts[what].items()}
    return figures | {f"{split}_samples/{each['name']}": each["num_samples"] for each in facts.get("sources", ())}


def _log_bad_shards(split: str, bad_shards: Mapping[str, int], context: StageContext) -> None:
    """Leave the shards that lost samples in MLflow, the worst first: facts would grow with their number."""
    worst = sorted(bad_shards.items(), key=lambda each: (-each[1], each[0]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{split}_bad_shards.json"
        path.write_text(json.dumps([{"shard": uri, "samples": count} for uri, count in worst], indent=1))
        context.run.log_artifact(path)


def check_takes_sizes(parts: Parts, name: str) -> None:
    """Raise a RecipeError unless the model is told a picture's sizes."""
    if "time_ids" not in parts.denoiser().condition_names:
        raise RecipeError(
            f"encode.picture_sizes=true is for models of Stable Diffusion XL's shape, and {name} takes no sizes: leave "
            "it out"
        )


def check_takes_buckets(parts: Parts, name: str, settings: BucketSettings) -> None:
    """Refuse aspect-ratio buckets that a model cannot be trained on.

    Raises:
        ModelError: it diffuses pixels, is told a class or paints into holes; or its networks halve the sides of the
            buckets until they are no whole numbers.
        DataError: there is no bucket beside the square.
    """
    if not isinstance(parts, (TextToImageParts, SDXLParts)):
        raise ModelError(
            "encode.buckets are for models that diffuse latents and are told nothing but a caption (Stable Diffusion "
            f"1.x and 2.x, Stable Diffusion XL), and {name} is of the family {parts.family}: leave them out"
        )
    least = parts.vae_scale_factor * 2 ** (len(parts.unet.config["block_out_channels"]) - 1)
    if settings.multiple_of % least:
        raise ModelError(
            f"encode.buckets.multiple_of={settings.multiple_of} is no multiple of {least}, by which the VAE and the "
            f"U-Net of {name} divide the sides of a picture: take {least * max(1, round(settings.multiple_of / least))}"
        )
    bucket_sizes(parts.resolution, settings)


def encoders_digest(parts: Parts, *, text: bool) -> str:
    """Return a digest of all of a model that its latents depend on: its VAE, what a picture is for it, and with text
    its text encoders and tokenizers. Fine-tuning the U-Net alone changes nothing of it, and saving it again neither.

    Args:
        parts: the model.
        text: text embeddings are stored too.
    """
    told = [name for name in parts.denoiser().condition_names if text or name not in OF_THE_CAPTION]
    names = ["vae", *(("text_encoder", "text_encoder_2") if text else ())]
    networks = {name: _network_digest(found) for name in names if (found := getattr(parts, name, None)) is not None}
    tokenizers = [
        _tokenizer_digest(found)
        for name in ("tokenizer", "tokenizer_2")
        if text and (found := getattr(parts, name, None)) is not None
    ]
    return digest(
        [parts.family, parts.resolution, parts.picture_channels, parts.num_classes, told, networks, tokenizers]
    )


def _network_digest(network: nn.Module) -> str:
    """Return a digest of a network's weights and settings, without what only says who has written them."""
    config: Any = network.config
    settings = {
        name: value
        for name, value in (config if isinstance(config, Mapping) else config.to_dict()).items()
        if not name.startswith("_") and name not in _OF_THE_WRITER
    }
    total = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, value in sorted(network.state_dict().items()):
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def _tokenizer_digest(tokenizer: Any) -> str:
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    of_a_call = ("version", "truncation", "padding")
    rules = {name: value for name, value in whole.items() if name not in of_a_call}
    return digest([rules, tokenizer.model_max_length, tokenizer.pad_token_id])


_OF_THE_WRITER = ("transformers_version", "dtype", "torch_dtype", "architectures")


def _format_of_pictures(parts: Parts, teacher: str, encoding: Encoding) -> SampleFormat:
    return format_of_pictures(
        parts,
        teacher,
        rules=encoding.rules,
        crop=encoding.crop,
        seed=encoding.seed,
        sizes=encoding.picture_sizes,
        buckets=None if encoding.buckets is None else bucket_sizes(parts.resolution, encoding.buckets),
        masks=encoding.masks,
        precision=encoding.precision,
    )


def _pictures(shards: str, storage: Storage, *, read_as: Any, listed: bool) -> dict[str, Any]:
    """Return the facts of a split that is trained on as it is: in pixels, or read as a format says that makes latents
    of them. With `listed` workers get a list of what lies there, unless it has an index."""
    index = read_index(shards, storage=storage)
    facts: dict[str, Any] = {
        "uri": shards,
        "digest": digest([index.digest, read_as]) if read_as else index.digest,
        "source_digest": index.digest,
        "num_samples": index.num_samples,
        "num_shards": len(index.shards),
        "skipped": {},
        "filtered": {},
    }
    if listed and not storage.exists(join(shards, INDEX)):
        facts["list"] = join(storage.root, "lists", f"{digest([shards, index.digest])[:16]}.json")
        write_list(index, facts["list"], storage=storage)
    return facts


def encode_sources(shards: Shards, target: str, *, label: str, **options: Any) -> Shards:
    """Write the latent shards of picture shards, those of a mixture each in a folder of its own; return where they are.

    Arguments as of `encode_shards`, which raises what there is to raise.
    """
    if isinstance(shards, str):
        encode_shards(shards, target, label=label, **options)
        return target
    targets = [join(target, f"{number:02d}") for number in range(len(shards.sources))]
    for source, own in zip(shards.sources, targets, strict=True):
        encode_shards(source.uri, own, label=_label(label, source), **options)
    return shards.at(targets)

"""Training batches, made inside each Ray worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from fewstep.data.buckets import Size
from fewstep.data.latents import decode_latents
from fewstep.data.masks import MaskSettings, mask_of
from fewstep.data.mixture import Shards, list_shards
from fewstep.data.pictures import Crop, decode_class_picture, decode_picture
from fewstep.data.sample import Decode, Sample
from fewstep.data.samples import NO_RULES, SampleRules, with_rules
from fewstep.data.stream import ShardStream, StreamSettings
from fewstep.distill import joint_tokenizers
from fewstep.distill.tokens import conditions_without_text
from fewstep.models import Parts
from fewstep.storage import Storage
from fewstep.tracking.fetch import fetch_model
from fewstep.tracking.settings import TrackingSettings

#: What VAE and text encoders compute in.
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class SampleFormat:
    """How the samples that a network trains on are read; goes through JSON, so that later stages know it.

    Attributes:
        kind: "latents" (latent shards), "pictures" (with a caption) or "class_pictures" (picture shards with .cls).
        options: keyword arguments of the decoder; those of "pictures" are written by `format_of_pictures`. Where no
            text is stored, also "tokenizers": part of the condition -> (MODEL, sub-folder of its tokenizer).
        group_by: the tensor whose shape rows of a micro-batch must share, where samples are of several shapes; see
            `ShardStream`.
        encoded: by whom pictures are made latents: nobody (None: they are latents, or are diffused as they are), or the
            training, in the named precision.
    """

    kind: str
    options: dict[str, Any]
    group_by: str | None = None
    encoded: Precision | None = None

    @property
    def has_token_ids(self) -> bool:
        """Whether samples have token ids of their captions, and no text embeddings."""
        return _TOKENIZERS in self.options

    def decoder(self, *, fetch: Callable[[str], Path] = fetch_model) -> Decode:
        """Return the function from a webdataset sample to a training sample.

        Args:
            fetch: from a MODEL to its folder, for the tokenizers of samples with token ids.
        """
        options = dict(self.options)
        if self.has_token_ids:
            options["token_ids"] = {
                name: _Tokenize(str(fetch(uri) / folder)) for name, (uri, folder) in options.pop(_TOKENIZERS).items()
            }
        if self.kind == "pictures":
            return _picture_decode(**options)
        decode: dict[str, Callable[..., dict[str, Any]]] = {
            "latents": decode_latents,
            "class_pictures": decode_class_picture,
        }
        return partial(decode[self.kind], **options)

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        more = {name: getattr(self, name) for name in ("group_by", "encoded") if getattr(self, name) is not None}
        return {"kind": self.kind, "options": self.options, **more}


_TOKENIZERS = "tokenizers"


def _picture_decode(
    *,
    resolution: int,
    seed: int,
    rules: Mapping[str, Any],
    buckets: Sequence[Sequence[int]] | None,
    masks: Mapping[str, Any] | None,
    token_ids: Mapping[str, Callable[[list[str]], Tensor]],
    **options: Any,
) -> Decode:
    sizes: list[Size] | None = None if buckets is None else [(width, height) for width, height in buckets]
    decode = partial(decode_picture, resolution=resolution, seed=seed, buckets=sizes, **options)
    drawn = None if masks is None else partial(mask_of, settings=MaskSettings(**masks), seed=seed)
    return _Encodable(with_rules(decode, SampleRules.from_json(rules)), token_ids, drawn)


@dataclass(frozen=True)
class _Encodable:
    """Decodes to what a training makes latents of: pixels, token ids and perhaps a mask. Picklable."""

    decode: Decode
    token_ids: Mapping[str, Callable[[list[str]], Tensor]]
    mask: Callable[[str, int], Tensor] | None

    def __call__(self, sample: Sample) -> dict[str, Any]:
        decoded = self.decode(sample)
        if self.mask is not None:
            decoded["mask"] = self.mask(decoded["key"], decoded["pixels"].shape[-1])
        return decoded | {name: tokenize([decoded["caption"]])[0] for name, tokenize in self.token_ids.items()}


def format_of_pictures(
    parts: Parts,
    teacher: str,
    *,
    rules: SampleRules,
    crop: Crop,
    seed: int,
    sizes: bool,
    buckets: Sequence[Size] | None,
    masks: MaskSettings | None,
    precision: Precision,
) -> SampleFormat:
    """Return how training samples are read where the training itself makes latents of pictures.

    Args:
        parts: the model.
        teacher: its MODEL, whose tokenizers are used.
        rules: which samples are used, and their captions.
        crop, seed, sizes, buckets: as for `decode_picture`.
        masks: how holes are drawn; None: there are none.
        precision: of the encoders.
    """
    if parts.num_classes is not None:
        return SampleFormat("class_pictures", picture_options(parts), encoded=precision)
    grouped = buckets is not None
    if buckets is None and "time_ids" in parts.denoiser().condition_names:
        # Of a bucket's pictures the network is told their size; the square alone is one of the model's own.
        buckets = [(parts.resolution, parts.resolution)]
    options: dict[str, Any] = {
        "resolution": parts.resolution,
        "crop": crop,
        "seed": seed,
        "sizes": sizes,
        "buckets": buckets and [list(size) for size in buckets],
        "rules": rules.to_json(),
        "masks": masks and masks.model_dump(mode="json"),
        _TOKENIZERS: {name: [teacher, folder] for name, folder in joint_tokenizers(parts).items()},
    }
    return SampleFormat("pictures", options, group_by="pixels" if grouped else None, encoded=precision)


def format_without_text(parts: Parts, teacher: str) -> SampleFormat:
    """Return how training samples are read whose shards hold no text embeddings.

    Args:
        parts: the model.
        teacher: its MODEL, whose tokenizers are used.
    """
    tokenizers = {name: [teacher, folder] for name, folder in joint_tokenizers(parts).items()}
    return SampleFormat("latents", {"condition_names": list(conditions_without_text(parts)), _TOKENIZERS: tokenizers})


def format_of(parts: Parts) -> SampleFormat:
    """Return how the training samples of a model are read."""
    if parts.stores_latents:
        return SampleFormat("latents", {"condition_names": list(parts.denoiser().condition_names)})
    return SampleFormat("class_pictures", picture_options(parts))


def picture_decoder(parts: Parts, rules: SampleRules = NO_RULES, **options: Any) -> Decode:
    """Return the function from a picture sample to pixels with caption, or with class for class-conditional models.

    Args:
        parts: the model.
        rules: which samples are used, and their captions; for pictures with a caption.
        options: of `decode_picture`, such as crop.
    """
    if parts.num_classes is not None:
        return partial(decode_class_picture, **picture_options(parts))
    return with_rules(partial(decode_picture, resolution=parts.resolution, **options), rules)


def picture_options(parts: Parts) -> dict[str, Any]:
    """Return what `decode_class_picture` must know of a model."""
    return {
        "resolution": parts.resolution,
        "channels": parts.picture_channels,
        "num_classes": parts.num_classes,
    }


def format_batches(
    shards: Shards, *, samples: SampleFormat, storage: Storage, tracking: TrackingSettings, **more: Any
) -> ShardStream:
    """Return batches of the samples of shards, or of a mixture, read as their format says; see `sample_batches`."""
    decode = samples.decoder(fetch=partial(fetch_model, storage=storage, tracking=tracking))
    return sample_batches(shards, decode=decode, group_by=samples.group_by, storage=storage, **more)


def sample_batches(
    shards: Shards,
    *,
    decode: Decode,
    storage: Storage,
    stream: StreamSettings,
    global_batch_size: int,
    seed: int,
    rank: int,
    world_size: int,
    group_by: str | None = None,
) -> ShardStream:
    """Return batches of what `decode` makes of the samples of shards, or of a mixture."""
    return ShardStream(
        list_shards(shards, storage=storage),
        storage=storage,
        decode=decode,
        global_batch_size=global_batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        settings=stream,
        group_by=group_by,
    )


def picture_batches(shards: Shards, *, resolution: int, rules: SampleRules, **more: Any) -> ShardStream:
    """Return batches of pixels (uint8) and captions from picture shards."""
    decode = with_rules(partial(decode_picture, resolution=resolution), rules)
    return sample_batches(shards, decode=decode, **more)


def latent_batches(
    shards: Shards,
    *,
    storage: Storage,
    tokenizers: Mapping[str, tuple[str, str]] | None = None,
    condition_names: Sequence[str] = (),
    **more: Any,
) -> ShardStream:
    """Return batches from latent shards: text embeddings, or token ids when tokenizers are given.

    Args:
        shards: URI of latent shards, or a mixture.
        storage: the store.
        tokenizers: part of the condition -> (URI of a model folder, sub-folder of its tokenizer).
        condition_names: with tokenizers: parts of the condition that are read from the shards beside the token ids.
        more: as for `sample_batches`.
    """
    if tokenizers is None:
        return sample_batches(shards, decode=decode_latents, storage=storage, **more)
    loaded = {
        name: _Tokenize(str(fetch_model(uri, storage=storage) / folder)) for name, (uri, folder) in tokenizers.items()
    }
    decode = partial(decode_latents, condition_names=tuple(condition_names), token_ids=loaded)
    return sample_batches(shards, decode=decode, storage=storage, **more)


class _Tokenize:
    """Prompts to token ids (B, L), with the tokenizer of a model's folder; picklable, to decode in other processes."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._tokenizer: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder, "_tokenizer": None}

    def __call__(self, prompts: list[str]) -> Tensor:
        if self._tokenizer is None:
            from transformers import CLIPTokenizer

            self._tokenizer = CLIPTokenizer.from_pretrained(self._folder)
        ids: Tensor = self._tokenizer(
            prompts,
            padding="max_length",
            max_length=self._tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return ids

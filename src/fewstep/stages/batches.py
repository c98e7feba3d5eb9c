"""Training batches, made inside each Ray worker."""

from __future__ import annotations

from functools import partial

from fewstep.data.latents import decode_latents
from fewstep.data.pictures import decode_picture
from fewstep.data.shards import read_index
from fewstep.data.stream import ShardStream, StreamSettings
from fewstep.storage import Storage
from fewstep.tracking.fetch import fetch_model


def picture_batches(
    shards: str,
    *,
    resolution: int,
    storage: Storage,
    stream: StreamSettings,
    global_batch_size: int,
    seed: int,
    rank: int,
    world_size: int,
) -> ShardStream:
    """Return batches of pixels (uint8) and captions from picture shards."""
    return ShardStream(
        read_index(shards, storage=storage),
        storage=storage,
        decode=partial(decode_picture, resolution=resolution),
        global_batch_size=global_batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        **stream.model_dump(),
    )


def latent_batches(
    shards: str,
    *,
    storage: Storage,
    stream: StreamSettings,
    global_batch_size: int,
    seed: int,
    tokenizer: str | None = None,
    rank: int,
    world_size: int,
) -> ShardStream:
    """Return batches from latent shards: text embeddings, or token ids when the URI of a tokenizer folder is given."""
    token_ids = None
    if tokenizer is not None:
        from transformers import CLIPTokenizer

        loaded = CLIPTokenizer.from_pretrained(str(fetch_model(tokenizer, storage=storage) / "tokenizer"))

        def token_ids(prompts):  # type: ignore[no-untyped-def]
            return loaded(
                prompts,
                padding="max_length",
                max_length=loaded.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids

    return ShardStream(
        read_index(shards, storage=storage),
        storage=storage,
        decode=partial(decode_latents, token_ids=token_ids),
        global_batch_size=global_batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        **stream.model_dump(),
    )

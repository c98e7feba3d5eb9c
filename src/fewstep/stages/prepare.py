"""prepare: text-image pairs become webdataset shards with parquet metadata."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from fewstep.data.classes import ClassPicturesSettings, class_samples
from fewstep.data.emoji import EmojiSettings, emoji_samples
from fewstep.data.emoji.dataset import Split
from fewstep.data.shards import ShardIndex, read_index, write_metadata, write_shards
from fewstep.stages.context import StageContext, shards_uri
from fewstep.stages.fingerprints import drawn_splits
from fewstep.stages.metadata import prepare_metadata
from fewstep.stages.progress import Progress
from fewstep.storage import join


def prepare(context: StageContext) -> dict[str, Any]:
    """Store the splits of the emoji set, or of pictures with classes; returns address, digest and size of each.

    A split lies under its own address, so that more held-out scenes leave the training scenes as they are. One for
    which the recipe names shards of the user's own is not drawn: those are only read.
    """
    if context.recipe.prepare_metadata is not None:
        return prepare_metadata(context, context.recipe.prepare_metadata)
    settings = context.recipe.prepare or context.recipe.prepare_classes
    assert settings is not None
    facts: dict[str, Any] = {}
    drawn = [split for split in drawn_splits(context.recipe) if settings.num_samples(split)]
    uris = {split: shards_uri(context.recipe, context.storage, split) for split in drawn}
    # The metadata come last: with them the split counts as written.
    metadata = {split: join(uri, "metadata.parquet") for split, uri in uris.items()}
    written = {split for split in drawn if context.storage.exists(metadata[split])}
    total, done = (sum(map(settings.num_samples, splits)) for splits in (drawn, written))
    with Progress("prepare", total, "images", done=done) as progress:
        for split, uri in uris.items():
            if split in written:
                index = read_index(uri, storage=context.storage)
            else:
                index = _draw(context, settings, split, uri, metadata[split], progress)
            facts[split] = {
                "uri": uri,
                "digest": index.digest,
                "num_samples": index.num_samples,
                "num_shards": len(index.shards),
            }
    context.run.log_metrics({f"{split}_samples": facts[split]["num_samples"] for split in drawn})
    context.run.set_tags({f"fewstep.{split}_digest": facts[split]["digest"] for split in drawn})
    return facts


def _draw(
    context: StageContext,
    settings: EmojiSettings | ClassPicturesSettings,
    split: Split,
    uri: str,
    metadata: str,
    progress: Progress,
) -> ShardIndex:
    rows: list[dict[str, Any]] = []

    def samples() -> Iterator[dict[str, Any]]:
        made = emoji_samples(settings, split) if isinstance(settings, EmojiSettings) else class_samples(settings, split)
        for sample in made:
            record = json.loads(sample["json"])
            url = record["url"] if "url" in record else f"emoji:{record['codes'][0]}"
            rows.append({**record, "url": url})
            progress.advance()
            yield sample

    index = write_shards(samples(), uri, samples_per_shard=settings.samples_per_shard, storage=context.storage)
    write_metadata(rows, metadata, storage=context.storage)
    return index

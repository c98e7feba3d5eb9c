"""prepare: text-image pairs become webdataset shards with parquet metadata."""

from __future__ import annotations

import json
from typing import Any

from fewstep.data.emoji import emoji_samples
from fewstep.data.emoji.dataset import SPLITS
from fewstep.data.shards import write_metadata, write_shards
from fewstep.stages.context import StageContext
from fewstep.stages.progress import Progress
from fewstep.storage import join


def prepare(context: StageContext) -> dict[str, Any]:
    """Draw the emoji set and store its splits; returns the digest and size of each."""
    settings = context.recipe.prepare
    assert settings is not None
    uri = context.uri("prepare")
    facts: dict[str, Any] = {}
    total = sum(settings.num_samples(split) for split in SPLITS)
    with Progress("prepare", total, "images") as progress:
        for split in SPLITS:
            rows: list[dict[str, Any]] = []

            def kept(rows: list[dict[str, Any]] = rows, split: Any = split) -> Any:
                for sample in emoji_samples(settings, split):
                    record = json.loads(sample["json"])
                    rows.append({"url": f"emoji:{record['codes'][0]}", **record})
                    progress.advance()
                    yield sample

            index = write_shards(
                kept(), join(uri, split), samples_per_shard=settings.samples_per_shard, storage=context.storage
            )
            write_metadata(rows, join(uri, "metadata", f"{split}.parquet"), storage=context.storage)
            facts[split] = {"digest": index.digest, "num_samples": index.num_samples, "num_shards": len(index.shards)}
    context.run.log_metrics({f"{split}_samples": facts[split]["num_samples"] for split in SPLITS})
    context.run.set_tags({f"fewstep.{split}_digest": facts[split]["digest"] for split in SPLITS})
    return facts

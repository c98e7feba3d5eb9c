"""Whether data that lie elsewhere are still those that a finished stage has read.

A stage is named by where they lie: to look at their content would take a request for each shard before anything else.
So it is looked at where a stage that has read them would be skipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fewstep.data.emoji.dataset import SPLITS
from fewstep.data.metadata.scan import ParquetSource
from fewstep.data.shards import read_index
from fewstep.errors import DataError, StorageError
from fewstep.recipe import Recipe, StageName, digest
from fewstep.storage import Storage


def check_same_data(stage: StageName, recipe: Recipe, facts: Mapping[str, Any], *, storage: Storage) -> None:
    """Refuse to skip a stage whose data were written again, or added to, since it ran.

    Data that are no longer there are no matter: pictures may be deleted when their latents are made.

    Args:
        stage: one that is done.
        recipe: its recipe.
        facts: what it left.
        storage: the store.

    Raises:
        DataError: they have changed.
    """
    for where, before in _read_by(stage, recipe, facts):
        try:
            if stage == "prepare":
                assert recipe.prepare_metadata is not None
                now = digest(ParquetSource(recipe.prepare_metadata, storage).paths())
            else:
                now = read_index(where, storage=storage, counted=False).digest
        except (DataError, StorageError):
            continue
        if now != before:
            raise DataError(
                f"{where} is not what it was when {stage} ran (digest {before[:12]}, now {now[:12]}), so all that was "
                "made of it is of other data. To make it anew, give data.version another word than "
                f"{recipe.data.version or 'none'}; or bring the old content back"
            )


def _read_by(stage: StageName, recipe: Recipe, facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield address and digest of what lies elsewhere and a stage has read."""
    if stage == "prepare" and recipe.prepare_metadata is not None and "source_digest" in facts:
        yield recipe.prepare_metadata.source, facts["source_digest"]
    if stage == "teacher" and recipe.data.train is not None:
        yield from facts.get("source_digests", {}).items()
    if stage != "encode":
        return
    for split in SPLITS:
        named, of_split = getattr(recipe.data, split), facts.get(split)
        if named is None or of_split is None:
            continue
        uris = [source.uri for source in named] if isinstance(named, tuple) else [named]
        yield from (
            (uri, each["source_digest"]) for uri, each in zip(uris, of_split.get("sources", [of_split]), strict=True)
        )

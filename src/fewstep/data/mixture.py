"""Several sources of training samples with weights: how a recipe names them, and the shards of each."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from fewstep.data.counts import SampleCounts
from fewstep.data.order import next_source
from fewstep.data.sample import Decode
from fewstep.data.shards import Shard, ShardIndex, read_index
from fewstep.data.source import iterate_samples
from fewstep.storage import Storage

#: Names stand in the names of MLflow's metrics, which are paths without dots alone.
_NAME = r"^[A-Za-z0-9_-][A-Za-z0-9_. -]*(/[A-Za-z0-9_-][A-Za-z0-9_. -]*)*$"


class Source(BaseModel):
    """One source of a mixture."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    uri: str = Field(min_length=1, description="in a list of sources: URI of webdataset shards")
    weight: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="share of this source in every batch, relative to the others'"
    )
    name: str | None = Field(
        None,
        pattern=_NAME,
        max_length=200,
        description="what counts and metrics call it; null: as many last parts of its URI as tell it from the others",
    )


@dataclass(frozen=True)
class Mixture:
    """Sources with different names, in the order of the recipe. Picklable."""

    sources: tuple[Source, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """What each source is called."""
        return tuple(source.name or "" for source in self.sources)

    @property
    def shares(self) -> tuple[int, ...]:
        """The weights as the smallest whole numbers in their proportion, so that 3 : 1 and 0.75 : 0.25 are the same."""
        weights = [Fraction(repr(source.weight)) for source in self.sources]
        parts = math.lcm(*(weight.denominator for weight in weights))
        whole = [int(weight * parts) for weight in weights]
        return tuple(each // math.gcd(*whole) for each in whole)

    def at(self, uris: Sequence[str]) -> Mixture:
        """Return the same mixture with the shards of each source elsewhere."""
        moved = zip(self.sources, uris, strict=True)
        return Mixture(tuple(source.model_copy(update={"uri": uri}) for source, uri in moved))


#: Where samples come from: the URI of shards, or a mixture.
Shards = str | Mixture


def sources_of(shards: Shards) -> tuple[Source, ...]:
    """Return the sources; of a URI, one without a name."""
    return (Source(uri=shards),) if isinstance(shards, str) else shards.sources


def named_sources(sources: Sequence[Source]) -> tuple[Source, ...]:
    """Return the sources with a name each: those without one get the last parts of their URI.

    Raises:
        ValueError: two have the same name.
    """
    parts = [_name_parts(source.uri) for source in sources]
    taken = [1] * len(parts)
    while True:
        names = [
            source.name or "/".join(part[-count:]) for source, part, count in zip(sources, parts, taken, strict=True)
        ]
        doubled = {name for name in names if names.count(name) > 1}
        if not doubled:
            return tuple(s.model_copy(update={"name": name}) for s, name in zip(sources, names, strict=True))
        longer = [
            number
            for number, source in enumerate(sources)
            if names[number] in doubled and source.name is None and taken[number] < len(parts[number])
        ]
        if not longer:
            raise ValueError(
                f"{len(sources)} sources, of which more than one is named {min(doubled)!r}: give each a name of its own"
            )
        for number in longer:
            taken[number] += 1


def _name_parts(uri: str) -> list[str]:
    parts = [part for part in uri.split("://")[-1].split("/") if part]
    return [re.sub(r"^[. ]|[^A-Za-z0-9_. -]", "_", part) for part in parts] or ["_"]


@dataclass(frozen=True)
class MixedShards:
    """The shards of every source of a mixture, by source; of a single source, which has no name, with share 1."""

    names: tuple[str, ...]
    shares: tuple[int, ...]
    shards: tuple[tuple[Shard, ...], ...]

    @classmethod
    def of(cls, shards: ShardIndex | Sequence[Shard]) -> MixedShards:
        """Return the shards of one source."""
        return cls(("",), (1,), (tuple(shards.shards if isinstance(shards, ShardIndex) else shards),))

    @property
    def digests(self) -> list[str]:
        """Digest of the list of shards of each source, which the order of samples depends on."""
        return [ShardIndex(own).digest for own in self.shards]

    def sources_to_json(self) -> list[list[Any]] | None:
        """Return name and share of each source; None of a single one."""
        return None if len(self.names) == 1 else named_shares(self.names, self.shares)

    @property
    def num_samples(self) -> int | None:
        """Samples of all sources, or None when those of some shard are not known."""
        return ShardIndex(tuple(shard for own in self.shards for shard in own)).num_samples


def named_shares(names: Sequence[str], shares: Sequence[int]) -> list[list[Any]]:
    """Return what the order of a mixture's samples depends on beside the shards, as JSON."""
    return [[name, share] for name, share in zip(names, shares, strict=True)]


def list_shards(shards: Shards, *, storage: Storage) -> MixedShards:
    """Return the shards of every source; raises what `read_index` raises."""
    indices = [read_index(source.uri, storage=storage) for source in sources_of(shards)]
    if isinstance(shards, str) or len(indices) == 1:
        return MixedShards.of(indices[0])
    return MixedShards(shards.names, shards.shares, tuple(index.shards for index in indices))


def source_seed(seed: int, name: str) -> int:
    """Return the seed of the order of one source: its own, as sources of as many shards would be in step otherwise, and
    whatever other sources there are. Of the single source, which has no name, it is the seed itself."""
    if not name:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")


def iterate_mixture(
    listed: MixedShards, *, storage: Storage, decode: Decode, max_bad_share: float
) -> Iterator[dict[str, Any]]:
    """One pass over all samples of all sources, each source in the order of its shards.

    They come in the proportion of the weights, so that the first thousands stand for the mixture; when a source has
    come to its end, the others go on. Errors: as of `iterate_samples`, of each source by itself.
    """
    passes = [
        iterate_samples(own, storage=storage, decode=decode, counts=SampleCounts(max_bad_share, source=name))
        for name, own in zip(listed.names, listed.shards, strict=True)
    ]
    left = list(range(len(passes)))
    while left:
        shares, drawn = [listed.shares[number] for number in left], [0] * len(left)
        while True:
            place = next_source(shares, drawn)
            sample = next(passes[left[place]], None)
            if sample is None:
                del left[place]
                break
            drawn[place] += 1
            yield sample

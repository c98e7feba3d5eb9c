"""Which samples are used, and what their caption is: rules on what stands beside a picture."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fewstep.data.sample import BadSampleError, Decode, FilteredError, Sample

_MEMBER = "txt"
_PLACE = re.compile(r"\{(\w*)\}")


class FieldFilter(BaseModel):
    """One condition on a field of a sample's .json; samples that fail it are left out and counted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    field: str = Field(min_length=1, description="key in the sample's .json, such as width, punsafe, AESTHETIC_SCORE")
    min: float | None = Field(None, description="least value, itself included")
    max: float | None = Field(None, description="greatest value, itself included")
    one_of: tuple[str | int | float | bool, ...] | None = Field(None, description="values that are kept")
    matches: str | None = Field(None, description="regular expression that the text must hold somewhere")
    missing: Literal["drop", "keep"] = Field("drop", description="what becomes of samples without the field")

    @field_validator("matches")
    @classmethod
    def _check_matches(cls, matches: str | None) -> str | None:
        if matches is not None:
            try:
                re.compile(matches)
            except re.error as error:
                raise ValueError(f"{matches!r} is no regular expression: {error}") from error
        return matches

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min is self.max is self.one_of is self.matches is None:
            raise ValueError(f"the filter on {self.field} says nothing: give min, max, one_of or matches")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"the filter on {self.field} keeps nothing: min={self.min:g} is above max={self.max:g}")
        return self

    def reasons(self) -> dict[Literal["missing", "number", "min", "max", "one_of", "matches"], str]:
        """Return the short constant text by which samples are counted, for each way to fail."""
        words: dict[Literal["missing", "number", "min", "max", "one_of", "matches"], str] = {}
        if self.missing == "drop":
            words["missing"] = f"no {self.field}"
        if self.min is not None or self.max is not None:
            words["number"] = f"{self.field} is no number"
        if self.min is not None:
            words["min"] = f"{self.field} below {self.min:g}"
        if self.max is not None:
            words["max"] = f"{self.field} above {self.max:g}"
        if self.one_of is not None:
            words["one_of"] = f"{self.field} is none of {', '.join(map(str, self.one_of))}"
        if self.matches is not None:
            words["matches"] = f"{self.field} does not match {self.matches}"
        return words

    def failure(self, record: Mapping[str, Any]) -> str | None:
        """Return why a sample with this .json is left out, one of `reasons`; None: it is kept."""
        value = record.get(self.field)
        if value is None:
            return self.reasons().get("missing")
        failed: Literal["number", "min", "max", "one_of", "matches"] | None = None
        if self.min is not None or self.max is not None:
            try:
                number = float(value)
            except (TypeError, ValueError, OverflowError):
                return self.reasons()["number"]
            if self.min is not None and not number >= self.min:  # NaN fails too
                failed = "min"
            elif self.max is not None and not number <= self.max:
                failed = "max"
        if failed is None and self.one_of is not None and value not in self.one_of:
            failed = "one_of"
        if failed is None and self.matches is not None and re.search(self.matches, str(value)) is None:
            failed = "matches"
        return None if failed is None else self.reasons()[failed]


class CaptionSource(BaseModel):
    """One way to get a sample's caption."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    template: str = Field(
        "{txt}", description="text with fields in braces: {txt} is the member .txt, others are keys of the .json"
    )
    weight: float = Field(1.0, gt=0, description="how often it is taken, among those whose fields the sample has")

    @field_validator("template")
    @classmethod
    def _check_template(cls, template: str) -> str:
        rest = _PLACE.sub("", template)
        if "{" in rest or "}" in rest or "" in _PLACE.findall(template):
            raise ValueError(f"{template!r}: a field is a name in braces, such as {{txt}}, and there are no others")
        return template

    def text(self, fields: Mapping[str, str]) -> str | None:
        """Return the caption, or None when the sample lacks a field of it."""
        names = _PLACE.findall(self.template)
        if not all(fields.get(name) for name in names):
            return None
        return " ".join(_PLACE.sub(lambda found: fields[found[1]], self.template).split()) or None


@dataclass(frozen=True)
class SampleRules:
    """Filters and captions together.

    Attributes:
        filters: all must hold.
        captions: one is drawn for each sample; none: the member .txt.
        seed: of that choice. It depends on the sample's key beside it, so a sample always has the same caption.
    """

    filters: Sequence[FieldFilter] = ()
    captions: Sequence[CaptionSource] = ()
    seed: int = 0

    def __bool__(self) -> bool:
        return bool(self.filters or self.captions)

    def to_json(self) -> dict[str, Any]:
        """Return them as a JSON object, for fingerprints."""
        return {
            "filters": [rule.model_dump(mode="json") for rule in self.filters],
            "captions": [source.model_dump(mode="json") for source in self.captions],
            "seed": self.seed if len(self.captions) > 1 else 0,
        }

    @classmethod
    def from_json(cls, rules: Mapping[str, Any]) -> Self:
        """Return what `to_json` wrote."""
        return cls(
            filters=tuple(FieldFilter(**each) for each in rules["filters"]),
            captions=tuple(CaptionSource(**each) for each in rules["captions"]),
            seed=rules["seed"],
        )

    def apply(self, sample: Sample) -> Sample:
        """Return the sample with its caption as .txt.

        Raises:
            FilteredError: a filter leaves it out.
            BadSampleError: its .json is missing or broken, or it has no field that a caption could be made of.
        """
        if not self:
            return sample
        record = _record(sample)
        for rule in self.filters:
            failure = rule.failure(record)
            if failure is not None:
                raise FilteredError(failure)
        if not self.captions:
            return sample
        fields = {name: value for name, value in record.items() if isinstance(value, str)}
        fields |= {name: str(value) for name, value in record.items() if isinstance(value, (int, float))}
        if _MEMBER in sample:
            fields[_MEMBER] = sample[_MEMBER].decode("utf-8", errors="replace").strip()
        texts = [(text, source.weight) for source in self.captions if (text := source.text(fields)) is not None]
        if not texts:
            raise BadSampleError("no caption", "it lacks the fields of every caption template")
        return {**sample, _MEMBER: _drawn(texts, f"{self.seed}/{sample['__key__']}").encode("utf-8", "replace")}


NO_RULES = SampleRules()


@dataclass(frozen=True)
class RuledDecode:
    """A decoder of samples as the rules make them; picklable, as loading processes need it."""

    rules: SampleRules
    decode: Decode

    def __call__(self, sample: Sample) -> dict[str, Any]:
        return self.decode(self.rules.apply(sample))


def with_rules(decode: Decode, rules: SampleRules) -> Decode:
    """Return the decoder with the rules before it; itself, if there are none."""
    return RuledDecode(rules, decode) if rules else decode


def _record(sample: Sample) -> dict[str, Any]:
    if "json" not in sample:
        raise BadSampleError("no .json", "filters and captions read it")
    try:
        record = json.loads(sample["json"])
    except (ValueError, RecursionError) as error:
        raise BadSampleError("broken .json", str(error)) from error
    if not isinstance(record, dict):
        raise BadSampleError("broken .json", f"it is a {type(record).__name__} and no object")
    return record


def _drawn(texts: Sequence[tuple[str, float]], what: str) -> str:
    """Return one of the texts by their weights, as the digest of a name says."""
    digest = hashlib.blake2b(what.encode("utf-8", errors="surrogateescape"), digest_size=8).digest()
    left = int.from_bytes(digest, "little") / 2**64 * sum(weight for _, weight in texts)
    for text, weight in texts:
        left -= weight
        if left < 0:
            return text
    return texts[-1][0]

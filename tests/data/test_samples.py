"""Filters and captions of samples: what they keep, what they count, and what cannot work."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fewstep.data.counts import SampleCounts
from fewstep.data.sample import BadSampleError, FilteredError
from fewstep.data.samples import NO_RULES, CaptionSource, FieldFilter, SampleRules, with_rules
from fewstep.data.shards import write_shards
from fewstep.data.source import iterate_samples
from fewstep.errors import DataError
from fewstep.storage import Storage, StorageSettings

LOCAL = Storage(StorageSettings())


def sample(number: int = 0, *, txt: str = "an old caption", **record: Any) -> dict[str, Any]:
    return {"__key__": f"{number:05d}", "txt": txt.encode(), "json": json.dumps(record).encode()}


def caption(made: dict[str, Any]) -> dict[str, Any]:
    return {"text": made["txt"].decode()}


@pytest.mark.parametrize(
    ("rule", "record", "reason"),
    [
        ({"field": "width", "min": 512}, {"width": 512}, None),
        ({"field": "width", "min": 512}, {"width": 511}, "width below 512"),
        ({"field": "punsafe", "max": 0.1}, {"punsafe": 0.2}, "punsafe above 0.1"),
        ({"field": "punsafe", "max": 0.1}, {"punsafe": float("nan")}, "punsafe above 0.1"),
        ({"field": "score", "min": 5, "max": 7}, {"score": "6.5"}, None),
        ({"field": "score", "min": 5}, {"score": "high"}, "score is no number"),
        ({"field": "score", "min": 5}, {"score": 10**400}, "score is no number"),
        ({"field": "score", "min": 5}, {}, "no score"),
        ({"field": "score", "min": 5}, {"score": None}, "no score"),
        ({"field": "score", "min": 5, "missing": "keep"}, {}, None),
        ({"field": "LANGUAGE", "one_of": ["en", "de"]}, {"LANGUAGE": "en"}, None),
        ({"field": "LANGUAGE", "one_of": ["en", "de"]}, {"LANGUAGE": "fr"}, "LANGUAGE is none of en, de"),
        ({"field": "url", "matches": r"^https://"}, {"url": "https://a"}, None),
        ({"field": "url", "matches": r"^https://"}, {"url": "ftp://a"}, "url does not match ^https://"),
    ],
)
def test_a_filter_keeps_or_names_why_not(rule: dict[str, Any], record: dict[str, Any], reason: str | None) -> None:
    rules = SampleRules([FieldFilter(**rule)])
    if reason is None:
        assert rules.apply(sample(**record)) == sample(**record)
    else:
        with pytest.raises(FilteredError) as caught:
            rules.apply(sample(**record))
        assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"field": "width"}, "says nothing: give min, max, one_of or matches"),
        ({"field": "width", "min": 5, "max": 4}, "keeps nothing: min=5 is above max=4"),
        ({"field": "url", "matches": "("}, "is no regular expression"),
        ({"field": ""}, "at least 1 character"),
    ],
)
def test_filters_that_cannot_work_are_refused(rule: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        FieldFilter(**rule)


@pytest.mark.parametrize("template", ["{txt", "{a b}", "{}", "a } b"])
def test_templates_that_cannot_work_are_refused(template: str) -> None:
    with pytest.raises(ValidationError, match="a field is a name in braces"):
        CaptionSource(template=template)


def test_captions_are_made_of_fields() -> None:
    source = CaptionSource(template="{blip}, by {artist} in {year}")
    rules = SampleRules(captions=[source])
    assert caption(rules.apply(sample(blip="a  red\napple", artist="me", year=1999)))["text"] == (
        "a red apple, by me in 1999"
    )
    with pytest.raises(BadSampleError, match="no caption"):
        rules.apply(sample(blip="a red apple", artist="", year=1999))
    both = SampleRules(captions=[source, CaptionSource()])
    assert both.apply(sample(blip="x"))["txt"] == b"an old caption", "only what the sample has fields for is drawn"


def test_captions_are_drawn_by_their_weights_and_always_the_same() -> None:
    captions = [CaptionSource(template="{blip}", weight=3), CaptionSource(template="{txt}")]
    rules = SampleRules(captions=captions, seed=1)
    drawn = [rules.apply(sample(number, blip="new"))["txt"] for number in range(2000)]
    assert drawn == [rules.apply(sample(number, blip="new"))["txt"] for number in range(2000)]
    assert 0.71 < Counter(drawn)[b"new"] / 2000 < 0.79
    other = SampleRules(captions=captions, seed=2)
    assert drawn != [other.apply(sample(number, blip="new"))["txt"] for number in range(2000)]
    assert rules.to_json() != other.to_json()


@pytest.mark.parametrize(("data", "reason"), [(None, "no .json"), (b"{", "broken .json"), (b"[1]", "broken .json")])
def test_samples_whose_json_cannot_be_read_are_bad(data: bytes | None, reason: str) -> None:
    made = sample()
    if data is None:
        del made["json"]
    else:
        made["json"] = data
    with pytest.raises(BadSampleError) as caught:
        SampleRules([FieldFilter(field="width", min=1)]).apply(made)
    assert caught.value.reason == reason


def test_no_rules_are_no_step() -> None:
    assert with_rules(caption, NO_RULES) is caption
    ruled = with_rules(caption, SampleRules([FieldFilter(field="width", min=1)]))
    assert pickle.loads(pickle.dumps(ruled)) == ruled


def test_what_is_filtered_is_counted_apart_and_not_judged(tmp_path: Path) -> None:
    index = write_shards(
        (sample(number, width=number) for number in range(200)), str(tmp_path), samples_per_shard=50, storage=LOCAL
    )
    decode = with_rules(caption, SampleRules([FieldFilter(field="width", min=150)]))
    counts = SampleCounts(max_bad_share=0.01)
    assert len(list(iterate_samples(index.shards, storage=LOCAL, decode=decode, counts=counts))) == 50
    assert (counts.seen, counts.skipped, counts.filtered) == (200, {}, {"width below 150": 150})
    assert counts.by_reason() == {"filtered, width below 150": 150}


def test_filters_that_leave_nothing_are_an_error(tmp_path: Path) -> None:
    index = write_shards((sample(number, width=9) for number in range(8)), str(tmp_path), samples_per_shard=4,
                         storage=LOCAL)  # fmt: skip
    decode = with_rules(caption, SampleRules([FieldFilter(field="WIDTH", min=1)]))
    with pytest.raises(DataError, match=r"leave nothing of 8 samples: 8 × filtered, no WIDTH\. Look at data\.filters"):
        list(iterate_samples(index.shards, storage=LOCAL, decode=decode))


def test_half_of_a_surrogate_pair_in_a_caption_is_replaced() -> None:
    made = {"__key__": "a", "txt": b"", "json": b'{"cap": "an apple \\ud83d"}'}
    assert SampleRules(captions=[CaptionSource(template="{cap}")]).apply(made)["txt"] == b"an apple ?"

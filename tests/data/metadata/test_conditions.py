"""Filters over columns give the very counts that the same filters give of samples, one by one."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pyarrow as pa
import pytest

from fewstep.data.metadata.conditions import check_type, failures, row_group_condition
from fewstep.data.samples import FieldFilter
from fewstep.errors import DataError

_NUMBERS = [None, -3.0, 0.0, 0.1, 0.5, 1.0, 511.0, 512.0, 513.0, math.nan, math.inf]
_TEXTS = [None, "", "en", "de", "EN", "https://a.com/x.jpg"]


@pytest.mark.parametrize(
    ("rule", "values", "type_"),
    [
        ({"min": 0.1}, _NUMBERS, pa.float64()),
        ({"min": 0.1, "max": 512}, _NUMBERS, pa.float64()),
        ({"max": 0.5, "missing": "keep"}, _NUMBERS, pa.float64()),
        ({"min": 511.5}, [None, 1, 511, 512, 513], pa.int32()),
        ({"max": 511.5}, [None, 1, 511, 512, 513], pa.int64()),
        ({"min": -5, "max": 3e9}, [None, 0, 255], pa.uint8()),
        ({"min": 1, "max": 1e30}, [None, 0, 2**52], pa.int64()),
        ({"one_of": ["en", "de"]}, _TEXTS, pa.string()),
        ({"one_of": ["en"], "matches": "^e"}, _TEXTS, pa.large_string()),
        ({"matches": r"^https://.*\.jpg$"}, _TEXTS, pa.string()),
        ({"one_of": [1, 3]}, [None, 1, 2, 3], pa.int16()),
        ({"one_of": [True]}, [None, True, False], pa.bool_()),
    ],
)
def test_counts_are_those_of_samples(rule: dict[str, Any], values: list[Any], type_: pa.DataType) -> None:
    condition = FieldFilter(field="f", **rule)
    check_type(condition, "F", type_)
    expected = Counter(reason for value in values if (reason := condition.failure({"f": value})) is not None)
    column = pa.chunked_array([pa.array(values, type_)])
    found = {reason: sum(fails.to_pylist()) for reason, fails in failures(condition, column)}
    assert {reason: count for reason, count in found.items() if count} == expected
    assert set(found) <= set(condition.reasons().values())


def test_a_bound_of_a_narrow_column_includes_its_own_value() -> None:
    column = pa.chunked_array([pa.array([0.1, 0.2], pa.float32())])
    rule = FieldFilter(field="punsafe", max=0.1)
    assert [fails.to_pylist() for reason, fails in failures(rule, column) if "above" in reason] == [[False, True]]


@pytest.mark.parametrize(
    ("rule", "type_", "words"),
    [
        ({"min": 1}, pa.string(), "only numbers have an order"),
        ({"one_of": ["en"]}, pa.int64(), "does not fit a column of type int64"),
        ({"matches": "(?=x)"}, pa.string(), "RE2"),
        ({"one_of": [0.5]}, pa.int64(), "a number with a fraction is never in it"),
    ],
)
def test_what_cannot_be_asked_of_a_column_is_said(rule: dict[str, Any], type_: pa.DataType, words: str) -> None:
    with pytest.raises(DataError, match=words):
        check_type(FieldFilter(field="f", **rule), "F", type_)


def test_what_statistics_cannot_tell() -> None:
    assert row_group_condition(FieldFilter(field="f", matches="x"), "F", pa.string()) is None
    kept = row_group_condition(FieldFilter(field="f", min=1, missing="keep"), "F", pa.int64())
    assert "is_null" in str(kept)

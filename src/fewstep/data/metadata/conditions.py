"""The recipe's filters over whole columns, in the words that `FieldFilter.failure` has for one sample."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from fewstep.data.samples import FieldFilter
from fewstep.errors import DataError


def failures(rule: FieldFilter, column: pa.ChunkedArray) -> Iterator[tuple[str, pa.ChunkedArray]]:
    """Yield each reason for which rows fail the rule, with the mask (N,) of those that fail for it; no row has two.

    Raises:
        DataError: the rule cannot be asked of a column of this type.
    """
    missing, words = pc.is_null(column), rule.reasons()
    if rule.missing == "drop":
        yield words["missing"], missing
    left = pc.invert(missing)
    for test, holds in _tests(rule, column):
        fails = pc.and_(left, pc.invert(pc.fill_null(holds, False)))
        yield words[test], fails
        left = pc.and_(left, pc.invert(fails))


def row_group_condition(rule: FieldFilter, column: str, type_: pa.DataType) -> ds.Expression | None:
    """Return what the statistics of a row group must allow for one of its rows to pass; None: they say nothing."""
    if rule.matches is not None and rule.min is rule.max is rule.one_of is None:
        return None
    field, condition = ds.field(column), None
    if rule.min is not None:
        condition = field >= _bound(rule.min, type_, math.ceil)
    if rule.max is not None:
        below = field <= _bound(rule.max, type_, math.floor)
        condition = below if condition is None else condition & below
    if rule.one_of is not None:
        among = field.isin(_values(rule, type_))
        condition = among if condition is None else condition & among
    return condition if rule.missing == "drop" or condition is None else condition | field.is_null()


def check_type(rule: FieldFilter, column: str, type_: pa.DataType) -> None:
    """Raise a DataError unless the rule can be asked of a column of this type."""
    if (rule.min is not None or rule.max is not None) and not _is_number(type_):
        raise DataError(
            f"the filter on {rule.field} has min or max, and the column {column} is of type {type_}: only numbers have "
            "an order; use one_of or matches"
        )
    if rule.one_of is not None:
        _values(rule, type_)
    if rule.matches is not None:
        try:
            pc.match_substring_regex(pa.array([""]), rule.matches)
        except pa.ArrowInvalid as error:
            raise DataError(
                f"the filter on {rule.field}: {rule.matches!r} is not in the syntax of RE2, which searches columns "
                f"({error}); it has no look-around and no back-references"
            ) from error


def _tests(
    rule: FieldFilter, column: pa.ChunkedArray
) -> Iterator[tuple[Literal["min", "max", "one_of", "matches"], pa.ChunkedArray]]:
    if rule.min is not None:
        yield "min", pc.greater_equal(column, _bound(rule.min, column.type, math.ceil))
    if rule.max is not None:
        yield "max", pc.less_equal(column, _bound(rule.max, column.type, math.floor))
    if rule.one_of is not None:
        yield "one_of", pc.is_in(column, value_set=_values(rule, column.type))
    if rule.matches is not None:
        yield "matches", pc.match_substring_regex(pc.cast(column, pa.large_string()), rule.matches)


def _is_number(type_: pa.DataType) -> bool:
    return bool(pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_decimal(type_))


def _bound(value: float, type_: pa.DataType, rounded: Any) -> pa.Scalar:
    """Return the bound as a scalar of the column's type where it has one, as only those are held to statistics; so 0.1
    includes the 0.1 of a column of float32."""
    if pa.types.is_floating(type_):
        return pa.scalar(float(value), type_)
    if pa.types.is_integer(type_) and abs(value) < 2**53:
        try:
            return pa.scalar(rounded(value), type_)
        except (pa.ArrowInvalid, OverflowError):  # outside the type, so it excludes all or nothing
            pass
    return pa.scalar(float(value), pa.float64())


def _values(rule: FieldFilter, type_: pa.DataType) -> pa.Array:
    assert rule.one_of is not None
    inner = type_.value_type if pa.types.is_dictionary(type_) else type_
    try:
        if pa.types.is_integer(inner) and any(isinstance(each, float) and each % 1 for each in rule.one_of):
            raise pa.ArrowInvalid("a number with a fraction is never in it")
        return pa.array(list(rule.one_of), inner)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError) as error:
        raise DataError(
            f"the filter on {rule.field}: one_of {list(rule.one_of)} does not fit a column of type {type_} ({error})"
        ) from error

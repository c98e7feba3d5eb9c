"""Normal forms of addresses and captions, and their digests."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from fewstep.data.metadata.normal import digests, normal_captions, normal_urls


@pytest.mark.parametrize(
    ("url", "same"),
    [
        ("https://a.com/x.jpg", "http://www.A.com/x.jpg"),
        ("https://a.com/x.jpg", "https://a.com/x.jpg#top"),
        ("https://a.com/x.jpg", "https://a.com/x.jpg?w=300&h=200"),
        ("https://a.com/x.jpg", " https://a.com/x.jpg?utm_source=feed&utm_medium=rss "),
        ("https://a.com/x.jpg?id=5", "https://a.com/x.jpg?width=640&id=5&quality=80"),
        ("https://a.com/x.jpg?id=5", "https://a.com/x.jpg?id=5&fit=crop&auto=format"),
        ("https://a.com/pic.jpg", "https://a.com/pic-300x200.jpg"),
        ("https://a.com/x.jpg", "https://a.com/x.jpg?w=300px&dpr=1.5&q=80"),
        ("https://a.com/pic.jpeg", "https://a.com/pic-1024x768.jpeg?ssl=1"),
        ("https://a.com/x", "https://a.com/x/"),
    ],
)
def test_addresses_of_one_picture(url: str, same: str) -> None:
    first, second = normal_urls(pa.array([url, same])).to_pylist()
    assert first == second


@pytest.mark.parametrize(
    ("url", "other"),
    [
        ("https://a.com/x.jpg", "https://a.com/y.jpg"),
        ("https://a.com/x.jpg", "https://b.com/x.jpg"),
        ("https://a.com/X.jpg", "https://a.com/x.jpg"),  # paths tell capitals apart
        ("https://a.com/i?id=5", "https://a.com/i?id=6"),
        ("https://a.com/i?id=5", "https://a.com/i?wid=5"),
        ("https://a.com/images?q=tbn:AAA&usqp=CAU", "https://a.com/images?q=tbn:BBB&usqp=CAU"),
        ("https://a.com/i?h=deadbeef", "https://a.com/i?h=cafe"),
        ("https://a.com/i?size=large", "https://a.com/i"),
        ("https://a.com/i?show=5", "https://a.com/i?show=6"),  # ends with w=
        ("https://a.com/a-1x1.jpg", "https://a.com/a.jpg"),
        ("https://a.com/model-300x", "https://a.com/model"),
    ],
)
def test_addresses_of_two_pictures(url: str, other: str) -> None:
    first, second = normal_urls(pa.array([url, other])).to_pylist()
    assert first != second


def test_captions() -> None:
    given = ["A Red-Apple!", "a red apple", "Ａ  red “apple”", "a red apples", "1,000 apples", "яблоко", "নীল", "নল"]
    forms = normal_captions(pa.array(given)).to_pylist()
    assert forms[0] == forms[1] == forms[2] == "a red apple"
    assert len(set(forms)) == len(given) - 2  # vowel signs count: the last two differ in one


def test_digests_are_those_of_every_machine_and_version() -> None:
    given = pa.array(["a", "b", "a", ""])
    found = digests(given, seed=0, purpose="url")
    assert found.dtype == np.uint64
    assert found[0] == found[2] != found[1]
    assert [f"{digest:016x}" for digest in found.tolist()[:2]] == ["2213fb700f7f320a", "05596e77b62d1f8c"]
    assert set(digests(given, seed=1, purpose="url").tolist()).isdisjoint(found.tolist())
    assert set(digests(given, seed=0, purpose="caption").tolist()).isdisjoint(found.tolist())

"""What choosing rows of metadata costs: CPU time of a row that is read, and of one that passes the filters."""

from __future__ import annotations

import io
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fewstep.data.metadata.scan import ParquetSource
from fewstep.data.metadata.selection import deal_rows, drop_same_captions, drop_same_urls, take_rows, takes_of
from fewstep.data.metadata.settings import MetadataSettings
from fewstep.storage import Storage, join

_WORDS = (
    "photo of a red dress Vintage lamp with blue HD wallpaper for kids - 2019 new house design ideas, best Women's "
    "Running Shoes, Size 8 | eBay stock vector illustration hand drawn map Print on Canvas how to make bread at home"
)
_FILTERS = ({"field": "WIDTH", "min": 512}, {"field": "HEIGHT", "min": 512}, {"field": "punsafe", "max": 0.8})


def write_metadata(num_rows: int, uri: str, *, storage: Storage) -> int:
    """Store rows with LAION's columns, drawn at random, as one parquet file; return its bytes."""
    rng = np.random.default_rng(0)
    words = rng.choice(_WORDS.split(), (num_rows, 10))
    numbers = rng.integers(0, 2**60, (num_rows, 2)).tolist()
    urls = [
        f"https://cdn{first % 9973}.example.com/files/{second % 10**9:x}/image-{first}-300x200.jpg?v={second}&w=300"
        for first, second in numbers
    ]
    shares = {name: rng.random(num_rows).astype(np.float32) for name in ("punsafe", "pwatermark", "similarity")}
    sides = {name: rng.integers(100, 2000, num_rows).astype(np.int32) for name in ("WIDTH", "HEIGHT")}
    table = pa.table({"URL": urls, "TEXT": [" ".join(row) for row in words], **sides, **shares})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=100_000)
    storage.write_bytes(uri, buffer.getvalue())
    return buffer.tell()


def metadata_costs(uri: str, scratch: str, *, storage: Storage, rounds: int) -> dict[str, Any]:
    """Choose rows of one parquet file with filters and without, all steps of `fewstep prepare`, one after the other.

    Returns the medians over the rounds of CPU seconds for a row that is read and for one that passes, the two unknowns
    of two measurements; and the bytes kept in between for a row that passes.
    """
    reads, passes = [], []
    spent = [[_choose(uri, scratch, rules, storage) for rules in (_FILTERS, ())] for _ in range(rounds)]
    for (some_s, rows, some), (all_s, _, every) in ((each[0][:3], each[1][:3]) for each in spent):
        passing = (all_s - some_s) / (every - some)
        passes.append(passing)
        reads.append((all_s - every * passing) / rows)
    _, rows, left, stored = spent[0][1]
    return {
        "rows": rows, "row_read_s": float(np.median(reads)), "row_kept_s": float(np.median(passes)),
        "row_kept_bytes": stored / left,
    }  # fmt: skip


def _choose(
    uri: str, scratch: str, filters: tuple[dict[str, Any], ...], storage: Storage
) -> tuple[float, int, int, int]:
    """Return CPU seconds, rows, rows that passed, and bytes that were stored for them."""
    settings = MetadataSettings.model_validate({"source": uri, "filters": filters})
    source = ParquetSource(settings, storage)
    (unit,) = source.units([uri])
    begin = time.process_time()
    dealt = deal_rows(source, unit, join(scratch, "rows"), num_buckets=1, storage=storage)
    assert dealt.rows is not None
    assert dealt.digests is not None
    spans = [span for span in (dealt.digests.span(0),) if span]
    urls = drop_same_urls(spans, join(scratch, "urls"), num_buckets=1, storage=storage)
    captions = [span for span in (urls.captions.span(0) if urls.captions else None,) if span]
    same = drop_same_captions(captions, join(scratch, "captions"), num_buckets=1, storage=storage)
    lost = [span for span in (same.lost.span(0) if same.lost else None,) if span]
    left = urls.num_urls - same.num_same
    (takes,) = takes_of([left], num_train=left, num_evaluate=0, num_alignment=0, splits=("train",))
    rows = [span for span in (dealt.rows.span(0),) if span]
    take_rows(0, rows, lost, takes, join(scratch, "drawn"), rows_per_shard=10_000, storage=storage)
    seconds = time.process_time() - begin
    stored = dealt.rows.ends[-1] + dealt.digests.ends[-1] + (urls.captions.ends[-1] if urls.captions else 0)
    return seconds, dealt.counts.rows, dealt.counts.left, stored

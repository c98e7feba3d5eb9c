"""Which rows of a parquet table of pictures' addresses are taken, and how their pictures are fetched."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fewstep.data.metadata.download import DownloadSettings, check_columns
from fewstep.data.samples import FieldFilter
from fewstep.data.splits import Split
from fewstep.errors import DataError

#: Settings that say how pictures are fetched and not which: with others, what was downloaded stays what it is.
ONLY_DOWNLOADING = {
    "at_once", "command", "processes", "threads", "max_per_s", "timeout_s", "answer_timeout_s", "retries",
    "stall_timeout_s",
}  # fmt: skip

#: What the selection adds to each row.
KEY = "key"
URL, CAPTION = "url", "caption"


class MetadataSettings(BaseModel):
    """Pictures named by parquet metadata, such as LAION's: which rows, and how they are downloaded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field(min_length=1, description="folder of parquet files, or one file: s3://… or a path")
    columns: dict[str, str] = Field(
        {URL: "URL", CAPTION: "TEXT"},
        description="name in a sample's .json -> column of the table; url and caption are needed. Filters may use "
        "these names, and all of them are kept",
    )
    filters: tuple[FieldFilter, ...] = Field(
        (), description="conditions on the columns, by the names above or by a column's own; all must hold"
    )
    duplicate_urls: Literal["near", "exact"] = Field(
        "near",
        description="which addresses count as the same, of which one row is kept: equal ones (exact), or also those "
        "that differ in scheme, www., fragment, size or tracking parameters (near)",
    )
    duplicate_captions: Literal["near", "exact", "keep"] = Field(
        "near",
        description="the same for captions: equal ones, or also those that differ in case, punctuation, spaces or form "
        "of Unicode; keep: none is dropped",
    )
    num_train: int | None = Field(None, ge=1, description="rows drawn for training; null: all that are left")
    num_evaluate: int = Field(0, ge=0, description="rows held out for evaluation")
    num_alignment: int = Field(0, ge=0, description="rows held out to fit the scorer of text alignment with")
    seed: int = Field(0, description="of the draw")
    rows_per_shard: int = Field(
        10_000, ge=1, description="rows downloaded together; those whose picture can be had become one shard"
    )
    rows_per_task: int = Field(
        4_000_000,
        ge=1,
        description="rows that one task holds in memory (about 0.6 GB for a million that pass the filters)",
    )
    at_once: int | None = Field(
        None, ge=1, description="shards downloaded at the same time, on all machines; null: as the cluster's CPUs allow"
    )
    download: DownloadSettings = Field(
        default_factory=DownloadSettings, description="how img2dataset fetches the pictures"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in (URL, CAPTION):
            if name not in self.columns:
                raise ValueError(f"columns lacks {name}: say which column holds it, such as {name}: {name.upper()}")
        if KEY in self.columns:
            raise ValueError(f"columns has {KEY}, which the selection makes itself: give that column another name")
        try:
            check_columns([KEY, URL, CAPTION, *self.kept()])
        except DataError as error:
            raise ValueError(str(error)) from error
        return self

    def num_samples(self, split: Split) -> int | None:
        """Return how many rows a split is drawn from; None: all that the others leave."""
        return {"train": self.num_train, "evaluate": self.num_evaluate, "alignment": self.num_alignment}[split]

    def column_of(self, name: str) -> str:
        """Return the column of the table that a filter's field means."""
        return self.columns.get(name, name)

    def kept(self) -> dict[str, str]:
        """Return name in the .json -> column, for all that is kept beside url and caption."""
        named = {rule.field: self.column_of(rule.field) for rule in self.filters}
        return {name: column for name, column in (self.columns | named).items() if name not in (URL, CAPTION)}

"""Where shards, latents, checkpoints and models are kept, and how patiently they are read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fewstep.storage.environment import names_a_bucket, with_environment


class StorageSettings(BaseModel):
    """Where shards, latents, checkpoints and models are kept.

    What is not said comes from the environment at the moment when the settings are made, and travels with them to
    workers, whose environment may be another. StorageError when a variable cannot be used.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["embedded", "s3"] = Field(
        "embedded",
        description="embedded: an S3 server that fewstep starts and ends; s3: one that is there already, the default "
        "where $FEWSTEP_S3_BUCKET is set.",
    )
    endpoint_url: str | None = Field(
        None,
        description="Address of the S3 server (kind s3), for instance http://host:9000; none means "
        "$AWS_ENDPOINT_URL_S3, $AWS_ENDPOINT_URL, or else AWS.",
    )
    bucket: str = Field(
        "fewstep",
        min_length=3,
        description="Bucket (kind s3: $FEWSTEP_S3_BUCKET); made by fewstep only when kind is embedded.",
    )
    prefix: str = Field(
        "", description="Folder in the bucket under which everything is kept (kind s3: $FEWSTEP_S3_PREFIX)."
    )
    region: str = Field(
        "us-east-1", description="Region for signing requests (kind s3: $AWS_REGION or $AWS_DEFAULT_REGION)."
    )
    addressing_style: Literal["path", "virtual"] = Field(
        "path",
        description="path: http://host/bucket/key; virtual: http://bucket.host/key (kind s3: "
        "$FEWSTEP_S3_ADDRESSING_STYLE).",
    )
    home: Path = Field(
        default_factory=lambda: Path(os.environ.get("FEWSTEP_HOME") or ".fewstep") / "s3",
        description="Folder of the embedded server's data (default $FEWSTEP_HOME/s3, FEWSTEP_HOME is ./.fewstep).",
    )
    min_free_mb: int = Field(200, ge=0, description="Free MB without which the embedded server does not start.")
    start_timeout_s: float = Field(60.0, gt=0, description="Longest wait in seconds for the embedded server to answer.")
    connect_timeout_s: float = Field(5.0, gt=0, description="Longest wait in seconds for a connection.")
    read_timeout_s: float = Field(60.0, gt=0, description="Longest silence in seconds in the middle of an answer.")
    read_min_bytes_per_s: float = Field(
        10_000,
        ge=0,
        description="Least bytes a second: a read of a MiB that takes longer, and longer than read_timeout_s, is "
        "broken off and tried again from the byte reached; 0: none.",
    )
    retry_attempts: int = Field(8, ge=1, description="Most tries of one request.")
    retry_base_s: float = Field(0.5, ge=0, description="Pause in seconds after the first try; it doubles each time.")
    retry_max_wait_s: float = Field(20.0, gt=0, description="Longest single pause in seconds between two tries.")
    retry_total_s: float = Field(120.0, gt=0, description="Seconds after which no further try is made.")

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, said: Any) -> Any:
        return with_environment(said) if isinstance(said, dict) else said

    @model_validator(mode="after")
    def _check(self) -> StorageSettings:
        if self.kind == "embedded" and self.endpoint_url is not None:
            raise ValueError(
                f"storage.endpoint_url is {self.endpoint_url!r} but storage.kind is embedded: set storage.kind to s3, "
                "or leave the endpoint out"
            )
        if self.endpoint_url is not None and urlsplit(self.endpoint_url).scheme not in ("http", "https"):
            raise ValueError(f"storage.endpoint_url is {self.endpoint_url!r}: it must begin with http:// or https://")
        return self


def store_of_environment() -> StorageSettings | None:
    """Return the store that the environment names; None when it names no bucket.

    Raises:
        StorageError: a variable has a value that cannot be used.
    """
    return StorageSettings() if names_a_bucket() else None

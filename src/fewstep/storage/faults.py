"""Turns what an S3 client or a disk raises into words, and decides what is worth another try."""

from __future__ import annotations

import errno
import logging
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from botocore import exceptions as boto
from urllib3 import exceptions as http

from fewstep.errors import StorageError

logger = logging.getLogger(__name__)
T = TypeVar("T")

_BROKEN_CONNECTION = (
    boto.ConnectionError,  # EndpointConnectionError, ConnectTimeoutError
    boto.HTTPClientError,  # ReadTimeoutError, ConnectionClosedError, …
    boto.IncompleteReadError,
    boto.ResponseStreamingError,
    http.HTTPError,
    ConnectionError,
    TimeoutError,
)
_TRY_AGAIN = {"SlowDown", "RequestTimeout", "ServiceUnavailable", "Throttling", "TooManyRequests", "OperationAborted"}
_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "AuthFailure", "401"}
_DENIED = {"AccessDenied", "AllAccessDisabled", "403"}
_FULL = {"507", "InsufficientStorage", "XMinioStorageFull", "QuotaExceeded", "EntityTooLargeForQuota"}
_FULL_TEXT = (
    "no space left", "no writable volumes", "no free volumes", "not enough disk", "disk is full", "quota exceeded",
)  # fmt: skip
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
_LITTLE_ROOM_BYTES = 2**26


class ObjectNotFoundError(StorageError):
    """An object or a file that is not there."""


class ObjectChangedError(StorageError):
    """An object that was written again while it was being read, or since it was listed."""


@dataclass(frozen=True)
class Place:
    """Where an operation goes: endpoint in words, bucket, and the embedded server's folder if it is that one."""

    endpoint: str
    bucket: str
    home: Path | None = None


class RetryLimits(Protocol):
    """What `retrying` needs of the storage settings."""

    @property
    def retry_attempts(self) -> int: ...
    @property
    def retry_base_s(self) -> float: ...
    @property
    def retry_max_wait_s(self) -> float: ...
    @property
    def retry_total_s(self) -> float: ...
    @property
    def read_timeout_s(self) -> float: ...
    @property
    def read_min_bytes_per_s(self) -> float: ...


def error_code(error: BaseException) -> str:
    """S3's error code (``NoSuchKey``), the HTTP status as text when the answer had no body, or an empty string."""
    response = getattr(error, "response", None)
    if not isinstance(response, dict):
        return ""
    code = str(response.get("Error", {}).get("Code", ""))
    return code or str(_status(error))


def _status(error: BaseException) -> int:
    response = getattr(error, "response", None)
    if not isinstance(response, dict):
        return 0
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def is_full(error: BaseException) -> bool:
    """Whether the error says that the store or the disk has no room left."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return error_code(error) in _FULL or _status(error) == 507 or any(text in str(error).lower() for text in _FULL_TEXT)


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed a little later: a broken connection, a time-out, a busy server."""
    if is_full(error):
        return False
    if isinstance(error, _BROKEN_CONNECTION):
        return not isinstance(error, http.LocationValueError)
    if isinstance(error, boto.ClientError):
        return error_code(error) in _TRY_AGAIN or _status(error) in (429, 500, 502, 503, 504)
    return False


class Backoff:
    """Counts the tries of one operation and sleeps between them: exponential, with full jitter."""

    def __init__(self, limits: RetryLimits) -> None:
        self._limits = limits
        self.attempts = 1
        self._start = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._start

    def wait(self, error: BaseException, *, what: str) -> bool:
        """False when attempts or time are used up; otherwise sleeps and returns True."""
        if self.attempts >= self._limits.retry_attempts or self.elapsed_s >= self._limits.retry_total_s:
            return False
        longest = min(self._limits.retry_base_s * 2 ** (self.attempts - 1), self._limits.retry_max_wait_s)
        pause_s = min(random.uniform(longest / 2, longest), max(0.0, self._limits.retry_total_s - self.elapsed_s))
        logger.warning("%s: %s; attempt %d of %d failed, next in %.1f s", what, _short(error), self.attempts,
                       self._limits.retry_attempts, pause_s)  # fmt: skip
        time.sleep(pause_s)
        self.attempts += 1
        return True


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def unreachable(error: BaseException, *, what: str, place: Place, backoff: Backoff) -> StorageError:
    """The error for a store that did not answer properly in all tries."""
    if _looks_full(error, place):
        return full_error(what=what, place=f"object store {place.endpoint}", folder=place.home)
    return StorageError(
        f"{what}: the object store at {place.endpoint} did not answer properly in {backoff.attempts} attempts over "
        f"{backoff.elapsed_s:.1f} s ({_short(error)}). Check that the server runs and that storage.endpoint_url is "
        "right; storage.retry_attempts and storage.retry_total_s set how long fewstep goes on trying."
    )


def _looks_full(error: BaseException, place: Place) -> bool:
    # On a full disk SeaweedFS answers with a plain 500.
    return is_full(error) or (
        place.home is not None and _status(error) >= 500 and _free_bytes(place.home) < _LITTLE_ROOM_BYTES
    )


def translate(error: Exception, *, what: str, place: Place) -> StorageError | None:
    """The StorageError that says what the user can do, or None when the error is not one of the object store's."""
    endpoint, bucket = place.endpoint, place.bucket
    if isinstance(error, StorageError):
        return error
    if _looks_full(error, place):
        return full_error(what=what, place=f"object store {endpoint}", folder=place.home)
    if isinstance(error, (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError)):
        return StorageError(
            f"{what}: no credentials for {endpoint} ({_short(error)}). Set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or a profile, or give the pod or machine a role."
        )
    if isinstance(error, (boto.InvalidRegionError, boto.ParamValidationError)):
        return StorageError(f"{what}: {_short(error)}. Check storage.endpoint_url, storage.region and the URI.")
    if not isinstance(error, boto.ClientError):
        return StorageError(f"{what}: {_short(error)}") if isinstance(error, boto.BotoCoreError) else None
    code = error_code(error)
    if code == "NoSuchBucket":
        return StorageError(
            f"{what}: the bucket {bucket!r} does not exist at {endpoint}. Create it "
            f"(aws s3 mb s3://{bucket}), or set storage.bucket to one that is there."
        )
    if code in ("NoSuchKey", "404"):
        return ObjectNotFoundError(f"{what}: no such object at {endpoint}.")
    if code in ("PreconditionFailed", "412"):
        return ObjectChangedError(f"{what}: the object was written again meanwhile. Read it again from the start.")
    if code in _CREDENTIALS:
        return StorageError(
            f"{what}: {endpoint} refuses the credentials ({code}). Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and "
            "AWS_SESSION_TOKEN, or the profile they come from."
        )
    if code in _DENIED:
        return StorageError(
            f"{what}: access to bucket {bucket!r} at {endpoint} is denied ({code}). The credentials need "
            "s3:ListBucket on the bucket and s3:GetObject, s3:PutObject, s3:DeleteObject on its objects."
        )
    if code == "RequestTimeTooSkewed":
        return StorageError(f"{what}: this machine's clock is too far from that of {endpoint}. Set the clock.")
    return StorageError(f"{what}: {endpoint} answers {_short(error)}.")


def full_error(*, what: str, place: str, folder: Path | None) -> StorageError:
    """The error for a full disk, with what is free in `folder` when that is on this machine."""
    where = "" if folder is None else f" {folder} has {_free_bytes(folder) / 1e6:.0f} MB free."
    return StorageError(f"{what}: the {place} is full: nothing more can be written.{where} Free some and run again.")


def disk_error(error: BaseException, *, what: str, folders: Sequence[Path]) -> StorageError | None:
    """The StorageError for a disk that is full or a path that may not be used, or None for any other error.

    An error of a full disk seldom says where; then those of `folders`, where `what` writes, that are full are named.
    """
    # Of a copy the second name is the one that is written.
    named = getattr(error, "filename2", None) or getattr(error, "filename", None)
    path = Path(named) if isinstance(named, (str, os.PathLike)) else None
    if is_full(error):
        if path is not None:
            return full_error(what=f"{what}: write {path}", place="disk", folder=path)
        full = [folder for folder in folders if _free_bytes(folder) < _LITTLE_ROOM_BYTES] or folders
        room = ", ".join(f"{folder} has {_free_bytes(folder) / 1e6:.0f} MB free" for folder in full)
        return StorageError(f"{what}: the disk is full ({_short(error)}): {room}. Free some and run again.")
    if not isinstance(error, OSError) or path is None:
        return None
    if error.errno in _REFUSED:
        return StorageError(
            f"{what}: {path} cannot be used: {error.strerror}. Give this user the right to it, or name another place."
        )
    # Something that is there already can be a fault of ours, except where a file was named for a folder.
    if error.errno == errno.ENOTDIR or (error.errno == errno.EEXIST and path in folders and not path.is_dir()):
        return StorageError(f"{what}: {path} cannot be made: a file is where a folder is needed. Name another place.")
    return None


def _free_bytes(folder: Path) -> int:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def retrying(operation: Callable[[int], T], *, limits: RetryLimits, what: str, place: Place) -> T:
    """The value of ``operation(attempt)``; tried again while the failure may pass, then a StorageError."""
    backoff = Backoff(limits)
    while True:
        try:
            return operation(backoff.attempts)
        except Exception as error:
            if is_passing(error) and not _looks_full(error, place) and backoff.wait(error, what=what):
                continue
            said = final_error(error, what=what, place=place, backoff=backoff)
            if said is None:
                raise
            raise said from error


def final_error(error: Exception, *, what: str, place: Place, backoff: Backoff) -> StorageError | None:
    """What to raise when no further try is made; None when the error is not one of the object store's."""
    if is_passing(error):
        return unreachable(error, what=what, place=place, backoff=backoff)
    return translate(error, what=what, place=place)

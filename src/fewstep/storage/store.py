"""The storage interface itself: objects by URI, in S3 through boto3 or on the local disk."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast
from urllib.parse import unquote, urlsplit

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from fewstep.errors import StorageError
from fewstep.storage import local_files
from fewstep.storage.embedded import Credentials, running_server
from fewstep.storage.faults import ObjectNotFoundError, Place, error_code, retrying
from fewstep.storage.object_range import ObjectRange, read_range
from fewstep.storage.object_stream import ObjectStream
from fewstep.storage.settings import StorageSettings

if TYPE_CHECKING:
    import pyarrow.fs

T = TypeVar("T")
_UPLOADING = ".uploading"  # there while upload_folder is at work; a folder that still has it is not whole
_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class ObjectInfo:
    """One stored object: its URI, its size and the store's fingerprint of its content (empty for local files)."""

    uri: str
    size_bytes: int
    etag: str = ""


def join(uri: str, *parts: str) -> str:
    """``uri`` with ``parts`` below it, one slash between two parts."""
    pieces = [piece for piece in (part.strip("/") for part in parts) if piece]
    return "/".join([uri.rstrip("/") if uri != "/" else "", *pieces]) if pieces else uri


def _bucket_and_key(uri: str) -> tuple[str, str] | None:
    """Bucket and key of an ``s3://`` URI; None for a local path. StorageError for another scheme."""
    if uri.startswith("s3://"):
        bucket, _, key = uri[len("s3://") :].partition("/")
        if not bucket:
            raise StorageError(f"{uri!r} names no bucket. Write s3://BUCKET/KEY.")
        return bucket, key
    scheme, mark, _ = uri.partition("://")
    if mark and scheme != "file":
        raise StorageError(f"{uri!r}: storage knows s3://BUCKET/KEY, file:///PATH and plain paths, not {scheme}://.")
    return None


def _path(uri: str) -> Path:
    return Path(unquote(urlsplit(uri).path)) if uri.startswith("file://") else Path(uri)


class Storage:
    """Reads and writes objects by URI, in S3 or on the local disk.

    Picklable: what travels is the settings, the endpoint and, for the embedded server, its key; for other servers each
    process finds its credentials by the usual AWS chain. Clients are made once a process; all methods are thread-safe.
    All failures that a user can mend are StorageErrors; a missing object is an ObjectNotFoundError.
    """

    def __init__(
        self, settings: StorageSettings, *, endpoint_url: str | None = None, credentials: Credentials | None = None
    ) -> None:
        self.settings = settings
        self.endpoint_url = endpoint_url if endpoint_url is not None else settings.endpoint_url
        self._credentials = credentials
        self.root = join(f"s3://{settings.bucket}", settings.prefix)
        self._lock = threading.Lock()
        self._clients: dict[bool, Any] = {}
        self._pid = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"settings": self.settings, "endpoint_url": self.endpoint_url, "credentials": self._credentials}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def through(self, endpoint_url: str, **settings: Any) -> Storage:
        """The same store by another address, such as a proxy's; `settings` replace those of this one."""
        changed = self.settings.model_copy(update=settings)
        return Storage(changed, endpoint_url=endpoint_url, credentials=self._credentials)

    def read_bytes(self, uri: str) -> bytes:
        """The whole object."""
        with self.open(uri) as stream:
            return stream.read()

    def read_range(self, uri: str, start: int, end: int, *, etag: str | None = None) -> ObjectRange:
        """The bytes `start` to `end` (not included) of the object; fewer where it ends before.

        Read as `open` reads, over as many connections as it takes. With `etag` (of `list`) only if the object has it:
        ObjectChangedError otherwise. Local files have none.
        """
        if not 0 <= start < end:
            raise StorageError(f"read {uri}: the range {start} to {end} is empty: end must be greater than start.")
        place = _bucket_and_key(uri)
        if place is None:
            return local_files.read_range(_path(uri), start, end)
        bucket, key = place

        def get(extra: dict[str, str]) -> dict[str, Any]:
            return self._client().get_object(Bucket=bucket, Key=key, **extra)

        return read_range(
            get, start, end, etag=etag, what=f"read {uri}", limits=self.settings, place=self._place(bucket)
        )

    def write_bytes(self, uri: str, data: bytes, *, if_absent: bool = False) -> bool:
        """Writes the object in one step. False when `if_absent` and it was there already (nothing is written)."""
        place = _bucket_and_key(uri)
        if place is None:
            return local_files.write(_path(uri), data, if_absent=if_absent)
        bucket, key = place
        extra = {"IfNoneMatch": "*"} if if_absent else {}

        def put(attempt: int) -> bool:
            try:
                self._client().put_object(Bucket=bucket, Key=key, Body=data, **extra)
            except ClientError as error:
                if not if_absent or error_code(error) not in ("PreconditionFailed", "412"):
                    raise
                # An earlier try of ours may have been carried out although its answer was lost.
                return attempt > 1 and self.read_bytes(uri) == data
            return True

        return self._try(put, f"write {uri}", bucket)

    def read_json(self, uri: str) -> Any:
        """The value of a JSON object. StorageError when it is not JSON."""
        try:
            return json.loads(self.read_bytes(uri))
        except ValueError as error:
            raise StorageError(f"read {uri}: not JSON ({error}). Delete it and write it again.") from error

    def write_json(self, uri: str, value: Any) -> None:
        """Writes `value` as JSON with sorted keys, so that equal values are equal bytes."""
        self.write_bytes(uri, json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n")

    def exists(self, uri: str) -> bool:
        """Whether the object (not: a folder) is there."""
        place = _bucket_and_key(uri)
        if place is None:
            return _path(uri).is_file()
        bucket, key = place

        def head(attempt: int) -> bool:
            try:
                self._client().head_object(Bucket=bucket, Key=key)
            except ClientError as error:
                if error_code(error) not in ("404", "NoSuchKey", "NotFound"):
                    raise
                # An answer to HEAD has no body, so a missing bucket looks the same as a missing object.
                self._client().list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)
                return False
            return True

        return self._try(head, f"look for {uri}", bucket)

    def list(self, uri: str) -> Iterator[ObjectInfo]:
        """All objects below the folder `uri`, sorted by name. Nothing when there is no such folder."""
        place = _bucket_and_key(uri)
        if place is None:
            for path in local_files.below(_path(uri)):
                yield ObjectInfo(join(uri, path.relative_to(_path(uri)).as_posix()), path.stat().st_size)
            return
        bucket, key = place
        prefix = key.rstrip("/") + "/" if key.strip("/") else ""
        token: dict[str, str] = {}
        while True:
            page = self._try(
                lambda _, token=token: self._client().list_objects_v2(Bucket=bucket, Prefix=prefix, **token),  # type: ignore[misc]
                f"list {uri}", bucket,
            )  # fmt: skip
            for item in page.get("Contents", ()):
                if not item["Key"].endswith("/"):  # the empty objects by which some programs mark folders
                    yield ObjectInfo(f"s3://{bucket}/{item['Key']}", item["Size"], item["ETag"].strip('"'))
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, uri: str, recursive: bool = False) -> None:
        """Deletes the object, or with `recursive` everything below the folder too. What is not there is no error."""
        place = _bucket_and_key(uri)
        if place is None:
            local_files.delete(_path(uri), recursive=recursive)
            return
        bucket, key = place
        if key:
            self._try(lambda _: self._client().delete_object(Bucket=bucket, Key=key), f"delete {uri}", bucket)
        if recursive:
            keys = [{"Key": info.uri.removeprefix(f"s3://{bucket}/")} for info in self.list(uri)]
            for start in range(0, len(keys), 1000):
                batch = {"Objects": keys[start : start + 1000], "Quiet": True}
                answer = self._try(
                    lambda _, batch=batch: self._client().delete_objects(Bucket=bucket, Delete=batch),  # type: ignore[misc]
                    f"delete {uri}", bucket,
                )  # fmt: skip
                if answer.get("Errors"):
                    first = answer["Errors"][0]
                    raise StorageError(f"delete {uri}: {first.get('Key')} was refused: {first.get('Code')}.")

    def open(self, uri: str) -> BinaryIO:
        """A stream that reads the object from its start (not seekable in S3).

        After a broken connection or a time-out it goes on from the byte reached (Range, If-Match on the ETag), with
        backoff; StorageError when that does not help, ObjectChangedError when the object was written again meanwhile.
        """
        place = _bucket_and_key(uri)
        if place is None:
            return local_files.open_read(_path(uri))
        bucket, key = place

        def get(extra: dict[str, str]) -> dict[str, Any]:
            return self._client().get_object(Bucket=bucket, Key=key, **extra)

        stream = ObjectStream(get, what=f"read {uri}", limits=self.settings, place=self._place(bucket))
        return cast(BinaryIO, io.BufferedReader(stream, _BUFFER_BYTES))

    def upload_file(self, path: Path, uri: str) -> None:
        """Writes the object from a local file, in one step; large ones in parts, several at once."""
        if _bucket_and_key(uri) is None:
            local_files.copy(path, _path(uri))
        else:
            self._upload(path, uri)

    def upload_folder(self, local: str | Path, uri: str) -> None:
        """Makes the folder `uri` equal to the local one (hidden, temporary and cache files left out).

        A marker lies in it meanwhile, so that `download_folder` refuses a folder whose upload was cut short.
        """
        found = {path.relative_to(local).as_posix(): path for path in local_files.below(Path(local))}
        files = {name: path for name, path in found.items() if _is_kept(name)}
        if not files:
            raise StorageError(f"upload {local} to {uri}: the folder is missing or empty.")
        if _bucket_and_key(uri) is None:
            local_files.mirror(files, _path(uri))
            return
        marker = join(uri, _UPLOADING)
        before = {info.uri for info in self.list(uri)}
        self.write_bytes(marker, b"")
        self._in_parallel(lambda name: self._upload(files[name], join(uri, name)), sorted(files))
        for stale in sorted(before - {join(uri, name) for name in files} - {marker}):
            self.delete(stale)
        self.delete(marker)

    def download_folder(self, uri: str, local: str | Path) -> None:
        """Copies the folder `uri` to `local`, which appears only when it is whole (an older copy is replaced)."""
        target = Path(local)
        objects = list(self.list(uri))
        if not objects:
            raise ObjectNotFoundError(f"download {uri}: there is nothing under this address.")
        if any(info.uri == join(uri, _UPLOADING) for info in objects):
            raise StorageError(f"download {uri}: its upload was cut short. Run the stage that writes it again.")
        base = uri.rstrip("/") + "/"
        with local_files.staging(target) as folder:
            self._in_parallel(lambda info: self._download(info, folder / info.uri.removeprefix(base)), objects)

    def arrow_filesystem(self) -> tuple[pyarrow.fs.FileSystem, str]:
        """The root as (pyarrow file system, ``bucket/prefix``), as ``ray.train.RunConfig`` takes them.

        The file system pickles with the embedded server's key.
        """
        import pyarrow.fs

        pair = self._credentials
        options: dict[str, Any] = {} if pair is None else {"access_key": pair.access_key, "secret_key": pair.secret_key}
        if self.endpoint_url is not None:
            parts = urlsplit(self.endpoint_url)
            options |= {"endpoint_override": parts.netloc + parts.path.rstrip("/"), "scheme": parts.scheme}
            options["force_virtual_addressing"] = self.settings.addressing_style == "virtual"
        retries = pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=self.settings.retry_attempts)
        return (
            pyarrow.fs.S3FileSystem(
                region=self.settings.region, retry_strategy=retries, connect_timeout=self.settings.connect_timeout_s,
                request_timeout=self.settings.read_timeout_s, **options,
            ),
            self.root.removeprefix("s3://"),
        )  # fmt: skip

    def environment(self) -> dict[str, str]:
        """Variables by which child processes (MLflow, Ray workers) reach the same store."""
        values = {"AWS_DEFAULT_REGION": self.settings.region, "AWS_REGION": self.settings.region}
        if self.endpoint_url is not None:
            values |= {"AWS_ENDPOINT_URL_S3": self.endpoint_url, "MLFLOW_S3_ENDPOINT_URL": self.endpoint_url}
        if self._credentials is not None:
            values["AWS_ACCESS_KEY_ID"] = self._credentials.access_key
            values["AWS_SECRET_ACCESS_KEY"] = self._credentials.secret_key
        return values

    def check(self) -> None:
        """StorageError unless the bucket is there, reachable and readable with the credentials at hand."""
        bucket = self.settings.bucket
        self._try(lambda _: self._client().list_objects_v2(Bucket=bucket, MaxKeys=1), f"open {self.root}", bucket)

    def create_bucket(self) -> None:
        """Makes the bucket unless it is there already."""

        def create(attempt: int) -> None:
            with contextlib.suppress(self._client().exceptions.BucketAlreadyOwnedByYou):
                self._client().create_bucket(Bucket=self.settings.bucket)

        try:
            self.check()
        except StorageError as error:
            if "does not exist" not in str(error):
                raise
            self._try(create, f"create {self.root}", self.settings.bucket)

    @property
    def endpoint_name(self) -> str:
        """The endpoint in words, for messages."""
        return self.endpoint_url or f"AWS S3 ({self.settings.region})"

    def _try(self, operation: Callable[[int], T], what: str, bucket: str) -> T:
        return retrying(operation, limits=self.settings, what=what, place=self._place(bucket))

    def _place(self, bucket: str) -> Place:
        home = self.settings.home if self.settings.kind == "embedded" else None
        return Place(endpoint=self.endpoint_name, bucket=bucket, home=home)

    def _client(self, *, transfer: bool = False) -> Any:
        """The client of this process; `transfer`: one that tries each part of a big file again by itself."""
        with self._lock:
            if self._pid != os.getpid():  # after a fork the parent's connections must not be shared
                self._clients, self._pid = {}, os.getpid()
            if transfer not in self._clients:
                try:
                    attempts = self.settings.retry_attempts if transfer else 1
                    self._clients[transfer] = self._make_client(attempts=attempts)
                except (BotoCoreError, ValueError) as error:
                    raise StorageError(
                        f"open {self.root}: {error}. Check storage.endpoint_url, storage.region and the AWS profile."
                    ) from error
            return self._clients[transfer]

    def _make_client(self, *, attempts: int) -> Any:
        pair, settings = self._credentials, self.settings
        config = Config(
            connect_timeout=settings.connect_timeout_s,
            read_timeout=settings.read_timeout_s,
            retries={"mode": "standard", "total_max_attempts": attempts},
            s3={"addressing_style": settings.addressing_style},
            max_pool_connections=16,
            # boto3's own default of sending checksums is needed: without one, SeaweedFS keeps an empty object when a
            # client dies between the header and the body of a write.
            request_checksum_calculation="when_supported",
            proxies={} if pair is not None else None,  # the embedded server is on loopback
        )
        return boto3.session.Session().client(
            "s3", endpoint_url=self.endpoint_url, region_name=settings.region, config=config,
            aws_access_key_id=pair.access_key if pair else None,
            aws_secret_access_key=pair.secret_key if pair else None,
        )  # fmt: skip

    def _upload(self, path: Path, uri: str) -> None:
        bucket, key = cast(tuple[str, str], _bucket_and_key(uri))

        def upload(attempt: int) -> None:
            with path.open("rb") as file:
                self._client(transfer=True).upload_fileobj(file, bucket, key, Config=TransferConfig(max_concurrency=4))

        self._try(upload, f"upload {path} to {uri}", bucket)

    def _download(self, info: ObjectInfo, path: Path) -> None:
        with local_files.disk_errors(f"download {info.uri} to {path}", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with self.open(info.uri) as stream, path.open("wb") as file:
                shutil.copyfileobj(stream, file, 4 * _BUFFER_BYTES)

    def _in_parallel(self, action: Callable[[Any], None], items: Sequence[Any]) -> None:
        with ThreadPoolExecutor(max_workers=4) as pool:
            for future in [pool.submit(action, item) for item in items]:
                future.result()


def _is_kept(name: str) -> bool:
    junk = (".part", ".tmp", ".pyc")
    return not any(part.startswith(".") or part == "__pycache__" or part.endswith(junk) for part in name.split("/"))


@contextlib.contextmanager
def open_storage(settings: StorageSettings) -> Iterator[Storage]:
    """Yields the storage of `settings`, ready for use; StorageError when it is not.

    With kind embedded, starts the S3 server on `settings.home` and ends it on exit, or uses the one that another
    fewstep process runs there, which stays; the bucket is made if missing. With kind s3, checks bucket and credentials.
    """
    if settings.kind == "s3":
        storage = Storage(settings)
        storage.check()
        yield storage
        return

    def answers(endpoint_url: str, credentials: Credentials) -> bool:
        probe = Storage(settings.model_copy(update={"connect_timeout_s": 1.0, "read_timeout_s": 5.0}),
                        endpoint_url=endpoint_url, credentials=credentials)  # fmt: skip
        try:
            probe._client().list_buckets()
        except (BotoCoreError, ClientError):
            return False
        return True

    with running_server(
        settings.home, answers=answers, start_timeout_s=settings.start_timeout_s, min_free_mb=settings.min_free_mb
    ) as server:
        storage = Storage(settings, endpoint_url=server.endpoint_url, credentials=server.credentials)
        storage.create_bucket()
        yield storage

"""S3 and local paths behind one small interface.

Everything is named by a URI: ``s3://bucket/key``, ``file:///folder/name`` or a plain local path. This is the only room
that talks to an object store.
"""

from fewstep.storage.faults import ObjectChangedError, ObjectNotFoundError
from fewstep.storage.local_files import disk_errors
from fewstep.storage.settings import StorageSettings, store_of_environment
from fewstep.storage.store import ObjectInfo, Storage, join, open_storage

__all__ = [
    "ObjectChangedError",
    "ObjectInfo",
    "ObjectNotFoundError",
    "Storage",
    "StorageSettings",
    "disk_errors",
    "join",
    "open_storage",
    "store_of_environment",
]

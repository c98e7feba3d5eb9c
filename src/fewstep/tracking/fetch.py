"""From any name of a model to a local diffusers folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from importlib.resources import files
from pathlib import Path

from fewstep.errors import ModelError, StorageError
from fewstep.storage import Storage
from fewstep.storage.faults import disk_error
from fewstep.tracking.cache import cached_folder
from fewstep.tracking.registry import Registry
from fewstep.tracking.settings import TrackingSettings
from fewstep.tracking.tracker import Tracker

ASSETS = Path(str(files("fewstep"))) / "assets"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FORMS = "a folder, s3://BUCKET/FOLDER, models:/NAME@ALIAS, models:/NAME/VERSION, asset:NAME, or a hub id ORG/NAME"
_MARKS = ("model_index.json", "fewstep.json", "config.json")
_HUB_FILES = ["*.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors", "*.md", "LICENSE*"]
_HUB_SKIPPED = ["*.fp16.safetensors", "*.non_ema.safetensors", "*.fp16-*.safetensors", "*.non_ema-*.safetensors"]


def fetch_model(
    uri: str, *, storage: Storage | None = None, tracking: Tracker | TrackingSettings | None = None
) -> Path:
    """The local folder of the model that `uri` names, fetched into $FEWSTEP_HOME/cache when it is elsewhere.

    `uri` is a folder, ``s3://…`` (read through `storage`), ``models:/…`` (through `tracking`), ``asset:NAME`` (shipped
    with fewstep) or a hub id. ModelError, StorageError or TrackingError, naming `uri`, what was tried and the mend.
    """
    if uri.startswith("asset:"):
        folder = packaged_model(uri.removeprefix("asset:"))
    elif uri.startswith("models:"):
        folder = _registered(uri, storage, tracking)
    elif uri.startswith("s3://"):
        folder = _stored(uri, storage)
    elif Path(uri).expanduser().is_dir():
        folder = Path(uri).expanduser()
    elif Path(uri).expanduser().is_file():
        raise ModelError(f"{uri}: it is a file; a model is a folder in diffusers' layout. Name the folder around it.")
    elif _HUB_ID.fullmatch(uri):
        folder = _from_hub(uri)
    else:
        raise ModelError(f"{uri!r}: there is no such folder, and it is no other name of a model. Write {_FORMS}.")
    if not any((folder / mark).is_file() for mark in _MARKS):
        raise ModelError(
            f"{uri}: {folder} has neither {' nor '.join(_MARKS)}, so it is no model folder in diffusers' layout. Save "
            "the model with save_pretrained, and name that folder."
        )
    return folder


def _registered(uri: str, storage: Storage | None, tracking: Tracker | TrackingSettings | None) -> Path:
    if not isinstance(tracking, Tracker):
        tracking = Tracker.open(tracking or TrackingSettings(), storage)
    return Registry(tracking).download_model(uri)


def _stored(uri: str, storage: Storage | None) -> Path:
    if storage is None:
        raise ModelError(f"{uri}: no object store is open to read it from. Give the storage section of the recipe.")
    objects = sorted(storage.list(uri), key=lambda info: info.uri)
    if not objects:
        raise ModelError(f"{uri}: there is nothing under this address. Check bucket and folder.")
    identity = json.dumps([storage.endpoint_url, *[[info.uri, info.size_bytes, info.etag] for info in objects]])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    name = re.sub(r"[^\w.-]", "_", uri.rstrip("/").rsplit("/", 1)[-1])
    return cached_folder(Path("s3", f"{name}-{digest}"), lambda folder: storage.download_folder(uri, folder))


def packaged_model(name: str, *, assets: Path = ASSETS, inside: tuple[str, ...] = ()) -> Path:
    """The folder of a model that ships with fewstep, below `assets`. ModelError when there is none of that name.

    A folder with a ``compose.json`` ``{"base": NAME}`` takes the files that it lacks from that base: students ship
    their U-Net only. `inside` holds the names that led here, so that a circle is found.
    """
    source = assets / name
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith(".") or not source.is_dir():
        have = sorted(path.name for path in assets.iterdir() if path.is_dir()) if assets.is_dir() else []
        raise ModelError(f"asset:{name}: fewstep ships no such model. It ships {', '.join(have) or 'none'}.")
    recipe = source / "compose.json"
    if not recipe.is_file():
        return source
    base_name = str(json.loads(recipe.read_text())["base"])
    if base_name in (*inside, name):
        raise ModelError(f"asset:{name}: its compose.json names {base_name}, which is built on {name} itself.")
    base = packaged_model(base_name, assets=assets, inside=(*inside, name))
    digest = hashlib.sha256()
    for folder in (base, source):
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(folder)}\n{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())

    def compose(target: Path) -> None:
        shutil.copytree(base, target)
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("compose.json"))

    return cached_folder(Path("assets", f"{name}-{digest.hexdigest()[:16]}"), compose)


def _from_hub(repo_id: str) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    if _is_missing_path(repo_id):
        raise ModelError(f"{repo_id}: there is no such folder. Check the path.")
    try:
        return Path(snapshot_download(repo_id, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_SKIPPED, max_workers=4))
    except GatedRepoError as error:
        raise ModelError(
            f"{repo_id}: the hub wants its licence accepted first. Do so on the model's page, then set HF_TOKEN."
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{repo_id}: there is no such folder here and no such model on the hub (a private one needs HF_TOKEN). "
            f"Write {_FORMS}."
        ) from error
    except (LocalEntryNotFoundError, OSError, ValueError, RuntimeError) as error:  # hf_xet raises RuntimeError
        disk = disk_error(error, what=f"{repo_id} from the hub", folders=[Path(constants.HF_HUB_CACHE)])
        if disk is not None:
            raise StorageError(f"{disk} HF_HUB_CACHE names another folder for what comes from the hub.") from error
        if isinstance(error, RuntimeError):
            raise
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise ModelError(
            f"{repo_id}: there is no such folder, {why}, and the hub's local cache at {constants.HF_HUB_CACHE} does "
            f"not have it. Download it where there is a network, copy it here and name the folder; or write {_FORMS}."
        ) from error


def _is_missing_path(text: str) -> bool:
    # "runs/student" reads like a hub id; where its first part is a folder here, a path was meant.
    return os.path.isdir(text.split("/", 1)[0])

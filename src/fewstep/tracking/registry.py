"""Registered students: one version a fingerprint, aliases behind a gate, download into a cache.

The alias is the deployment: serving loads ``models:/NAME@champion`` and follows it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewstep.errors import TrackingError
from fewstep.tracking.cache import cached_folder
from fewstep.tracking.connection import failures, is_missing, without_password
from fewstep.tracking.lineage import lineage
from fewstep.tracking.tracker import Run, Tracker, flatten

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

logger = logging.getLogger(__name__)
CHAMPION = "champion"
CANDIDATE = "candidate"
FINGERPRINT_TAG = "fewstep.fingerprint"
STEPS_TAG = "fewstep.num_inference_steps"
GATE_TAG = "fewstep.gate"  # passed or failed
REASON_TAG = "fewstep.gate_reason"
REQUIRED_TAGS = ("num_inference_steps", "teacher", "data_digest", "fingerprint")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_URI = re.compile(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))")


@dataclass(frozen=True)
class RegisteredModel:
    """One version in the registry."""

    name: str
    version: int
    aliases: tuple[str, ...]
    tags: dict[str, str]
    run_id: str
    created_ms: int
    source: str  # where its files are

    @property
    def uri(self) -> str:
        """``models:/NAME/VERSION``."""
        return f"models:/{self.name}/{self.version}"

    @property
    def num_inference_steps(self) -> int | None:
        """Steps that the student was made for; None when it was registered by other hands."""
        text = self.tags.get(STEPS_TAG, "")
        return int(text) if text.isdigit() else None

    @property
    def passed(self) -> bool | None:
        """Whether the version passed its gate; None when nobody has judged it."""
        return {"passed": True, "failed": False}.get(self.tags.get(GATE_TAG, ""))

    @property
    def reason(self) -> str:
        """What the gate said."""
        return self.tags.get(REASON_TAG, "")


class Registry:
    """The registered models of a tracker's MLflow. All failures are TrackingErrors."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._client = tracker.client

    def log_student(
        self,
        run: Run,
        folder: str | Path,
        *,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        metrics: Mapping[str, float],
        code: Mapping[str, str] | None = None,
    ) -> int:
        """Stores a student's diffusers folder as a logged model of `run` and registers it; the version number.

        `tags` must have num_inference_steps, teacher, data_digest and fingerprint; they, and the code's lineage, are
        put on the model and on the version as ``fewstep.TAG``. A fingerprint that is registered already for these steps
        gives its version, with these tags and metrics brought up to date and the lineage that it had, and nothing is
        stored again. `code` is the lineage of the process that trained it; without it this one's counts.
        """
        from mlflow.entities import LoggedModelOutput, Metric

        folder = _checked_folder(folder)
        _check_name(name)
        missing = [tag for tag in REQUIRED_TAGS if not tags.get(tag)]
        if missing:
            raise TrackingError(
                f"register {name!r}: tags {', '.join(missing)} are missing; a version must name them all."
            )
        own_tags = {tag if "." in tag else f"fewstep.{tag}": str(value) for tag, value in tags.items()}
        with failures(f"register {name!r}", self._tracker.settings):
            known = self._find(name, fingerprint=own_tags[FINGERPRINT_TAG], steps=own_tags[STEPS_TAG])
            if known is not None:
                # Without the lineage of this process: other code may be running now, and it did not make the weights.
                self._refresh(run, name, known, own_tags, metrics)
                return known
            all_tags = {**(code or lineage()), **own_tags}
            model = self._client.create_logged_model(
                self._tracker.experiment_id, name=name, source_run_id=run.id, tags=all_tags, params=flatten(params),
                model_type="diffusers",
            )  # fmt: skip
            try:
                self._tracker.artifacts.write_folder(model.artifact_location, folder)
            except BaseException:
                self._client.finalize_logged_model(model.model_id, "FAILED")
                raise
            self._client.finalize_logged_model(model.model_id, "READY")
            now_ms = int(time.time() * 1000)
            rows = [Metric(key, float(value), now_ms, 0, model_id=model.model_id) for key, value in metrics.items()]
            self._client.log_batch(run.id, metrics=rows)
            self._client.log_outputs(run.id, [LoggedModelOutput(model.model_id, step=0)])
            self._make_model(name)
            # The source is the place of the files, not models:/MODEL_ID: on sqlite MLflow 3.17 looks the latter up in
            # the process-wide tracking URI, not in this client's (store/model_registry/sqlalchemy_store.py).
            created = self._client.create_model_version(
                name,
                model.artifact_location,
                run_id=run.id,
                tags={**all_tags, "fewstep.model_id": model.model_id},
                model_id=model.model_id,
            )
            link = json.dumps([{"name": name, "version": int(created.version)}])
            self._client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": link})
        return int(created.version)

    def _refresh(
        self, run: Run, name: str, version: int, tags: Mapping[str, str], metrics: Mapping[str, float]
    ) -> None:
        """Give a version that was registered before the tags and figures of its newest evaluation."""
        from mlflow.entities import Metric

        known = self._client.get_model_version(name, str(version))
        for tag, value in tags.items():
            if tag.startswith("fewstep.") and known.tags.get(tag) != value:
                self._client.set_model_version_tag(name, str(version), tag, value)
        model_id, now_ms = known.tags.get("fewstep.model_id"), int(time.time() * 1000)
        rows = [Metric(key, float(value), now_ms, 0, model_id=model_id) for key, value in metrics.items()]
        self._client.log_batch(run.id, metrics=rows)

    def set_alias(self, name: str, alias: str, version: int) -> int | None:
        """Points `alias` at `version`; the version that it pointed at before, None when at none.

        A version that becomes champion is no longer a candidate.
        """
        before = self.find(f"models:/{name}@{alias}")
        with failures(f"set alias {alias!r} of {name!r} to version {version}", self._tracker.settings):
            self._client.set_registered_model_alias(name, alias, str(version))
        if alias == CHAMPION:
            self._take_alias(name, CANDIDATE, version)
        return None if before is None else before.version

    def _take_alias(self, name: str, alias: str, version: int) -> None:
        """Take an alias from a version, if it has it."""
        had = self.find(f"models:/{name}@{alias}")
        if had is not None and had.version == version:
            with failures(f"take alias {alias!r} from {name!r}", self._tracker.settings):
                self._client.delete_registered_model_alias(name, alias)

    def promote(self, name: str, version: int, *, passed: bool, reason: str) -> str:
        """Makes `version` the champion if it `passed` the gate, else a candidate; the alias given.

        One that fails a stricter gate than before is no longer champion; a failed one leaves another version that is
        champion as it is.
        """
        self._judge(name, version, passed=passed, reason=reason)
        alias = CHAMPION if passed else CANDIDATE
        self.set_alias(name, alias, version)
        if not passed:
            self._take_alias(name, CHAMPION, version)
        return alias

    def offer(self, name: str, version: int, *, passed: bool, reason: str) -> str | None:
        """Makes a new `version` the candidate, whatever the gate said, and leaves the champion as it is; the alias that
        the version has then, None when it has neither.

        One that was judged before keeps the alias that it has: what was promoted and rolled back since, or followed by
        a newer candidate, does not come back by being registered again.
        """
        model = self.get(f"models:/{name}/{version}")
        alias = next((each for each in (CHAMPION, CANDIDATE) if each in model.aliases), None)
        if alias is None and REASON_TAG not in model.tags:
            waiting = self.find(f"models:/{name}@{CANDIDATE}")
            if waiting is None or waiting.version < version:
                self.set_alias(name, CANDIDATE, version)
                alias = CANDIDATE
        # After the alias: a version that was judged is not new, whenever this process is killed.
        self._judge(name, version, passed=passed, reason=reason)
        return alias

    def _judge(self, name: str, version: int, *, passed: bool, reason: str) -> None:
        """Write what the gate said to the version's tags."""
        with failures(f"write the gate's verdict on version {version} of {name!r}", self._tracker.settings):
            self._client.set_model_version_tag(name, str(version), GATE_TAG, "passed" if passed else "failed")
            self._client.set_model_version_tag(name, str(version), REASON_TAG, reason)

    def find(self, uri: str) -> RegisteredModel | None:
        """The version behind ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``; None when there is none."""
        from mlflow.exceptions import MlflowException

        name, alias, version = _parse(uri)
        with failures(f"look up {uri}", self._tracker.settings):
            try:
                if alias is None:
                    return _registered(self._client.get_model_version(name, version))
                return _registered(self._client.get_model_version_by_alias(name, alias))
            except MlflowException as error:
                # MLflow answers an alias that is not set with INVALID_PARAMETER_VALUE. The word alone says nothing: a
                # server that cannot be reached is reported with the address, which ends in /alias.
                unset = error.error_code == "INVALID_PARAMETER_VALUE" and "alias" in str(error).lower()
                if is_missing(error) or unset:
                    return None
                raise

    def get(self, uri: str) -> RegisteredModel:
        """As `find`, but TrackingError, naming what there is, when there is no such version."""
        model = self.find(uri)
        if model is not None:
            return model
        name = _parse(uri)[0]
        versions = self.versions(name)
        if versions:
            place = f"MLflow at {without_password(self._tracker.uri)}"
            have = "; ".join(
                f"version {other.version}{' (' + ', '.join(other.aliases) + ')' if other.aliases else ''}"
                for other in versions[:10]
            )
            raise TrackingError(f"{uri}: {place} has no such version of {name!r}. It has {have}.")
        raise self._no_model(uri, name)

    def _no_model(self, asked: str, name: str) -> TrackingError:
        names = ", ".join(repr(other) for other in self.names()[:10]) or "none at all"
        return TrackingError(
            f"{asked}: MLflow at {without_password(self._tracker.uri)} has no model {name!r}. It has {names}. Run a "
            "recipe that registers it, or name another model."
        )

    def get_champion(self, name: str) -> RegisteredModel | None:
        """The champion of `name`; None when no version has passed the gate."""
        return self.find(f"models:/{name}@{CHAMPION}")

    def names(self) -> list[str]:
        """Names of all registered models."""
        found: list[str] = []
        token = None
        with failures("list models", self._tracker.settings):
            while True:
                page = self._client.search_registered_models(max_results=200, page_token=token)
                found += [model.name for model in page]
                token = page.token
                if not token:
                    return sorted(found)

    def known_versions(self, name: str) -> list[RegisteredModel]:
        """As `versions`, but TrackingError, naming the models there are, when there is none."""
        found = self.versions(name)
        if not found:
            raise self._no_model(name, name)
        return found

    def versions(self, name: str) -> list[RegisteredModel]:
        """All versions of `name` with their aliases, newest first; empty when there is no such model."""
        from mlflow.exceptions import MlflowException

        _check_name(name)
        with failures(f"list versions of {name!r}", self._tracker.settings):
            try:
                aliases = self._client.get_registered_model(name).aliases
            except MlflowException as error:
                if is_missing(error):
                    return []
                raise
            models = [_registered(version, aliases) for version in self._all_versions(name)]
        return sorted(models, key=lambda model: -model.version)

    def download_model(self, uri: str) -> Path:
        """The local folder of a registered model, from the cache when this version was fetched before."""
        model = self.get(uri)
        identity = f"{self._tracker.uri}\n{model.uri}\n{model.source}\n{model.created_ms}"
        digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
        with failures(f"download {model.uri}", self._tracker.settings):
            location = str(self._client.get_model_version_download_uri(name=model.name, version=str(model.version)))
        return cached_folder(
            Path("models", f"{model.name}-{model.version}-{digest}"),
            lambda folder: self._tracker.artifacts.read_folder(location, folder),
        )

    def _find(self, name: str, *, fingerprint: str, steps: str) -> int | None:
        matches = [
            int(version.version)
            for version in self._all_versions(name)
            if version.tags.get(FINGERPRINT_TAG) == fingerprint and version.tags.get(STEPS_TAG) == steps
        ]
        return min(matches, default=None)

    def _all_versions(self, name: str) -> list[ModelVersion]:
        found: list[ModelVersion] = []
        token = None
        while True:
            page = self._client.search_model_versions(f"name = '{name}'", max_results=200, page_token=token)
            found += page
            token = page.token
            if not token:
                return found

    def _make_model(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise


def check_uri(uri: str) -> None:
    """TrackingError unless `uri` is written models:/NAME@ALIAS or models:/NAME/VERSION; asks no server."""
    _parse(uri)


def _parse(uri: str) -> tuple[str, str | None, str]:
    match = _URI.fullmatch(uri)
    if match is None:
        raise TrackingError(f"{uri!r}: a registered model is written models:/NAME@ALIAS or models:/NAME/VERSION.")
    name, alias, version = match.groups()
    _check_name(name)
    return name, alias, version or ""


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise TrackingError(
            f"model name {name!r}: it must begin with a letter or digit and have letters, digits, . _ and - only."
        )


def _checked_folder(folder: str | Path) -> Path:
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise TrackingError(
            f"register {folder}: it has no model_index.json, so it is no diffusers folder. Export it first."
        )
    return folder


def _registered(version: ModelVersion, aliases: Mapping[str, str] | None = None) -> RegisteredModel:
    names = version.aliases if aliases is None else [a for a, v in aliases.items() if str(v) == str(version.version)]
    return RegisteredModel(
        name=version.name,
        version=int(version.version),
        aliases=tuple(sorted(names)),
        tags=dict(version.tags),
        run_id=version.run_id or "",
        created_ms=int(version.creation_timestamp),
        source=version.source or "",
    )

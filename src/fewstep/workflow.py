"""The stages in order: what is done is skipped, what was killed goes on where it was."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from fewstep.errors import FewstepError, StorageError
from fewstep.recipe import Recipe, StageName
from fewstep.stages.all_stages import STAGES
from fewstep.stages.context import DATA_DIGEST_TAG, DONE, Artifact, StageContext, data_tags, find_artifact, stage_uri
from fewstep.stages.fingerprints import fingerprint
from fewstep.stages.memory import Usage
from fewstep.stages.same_data import check_same_data
from fewstep.storage import Storage, join
from fewstep.train.cluster import local_ray
from fewstep.train.device import free_device_memory
from fewstep.workplace import Workplace

logger = logging.getLogger("fewstep")

#: Time and memory so far of a stage that is running.
_USAGE = "usage.json"


def run_workflow(recipe: Recipe, workplace: Workplace, *, out: Path) -> dict[StageName, Artifact]:
    """Run all stages of a recipe in order and return what each left; one Ray serves all of them.

    Args:
        recipe: the recipe.
        workplace: store and MLflow.
        out: local folder for the report.

    Raises:
        StorageError: nothing can be written to `out`: told before the work that it would be lost after.
    """
    begun = datetime.now(UTC)
    if "evaluate" in recipe.stages:
        _check_folder(out)
    with local_ray(recipe.cluster):
        return {name: run_stage(name, recipe, workplace, out=out, begun=begun) for name in recipe.stages}


def run_stage(
    name: StageName, recipe: Recipe, workplace: Workplace, *, out: Path, begun: datetime | None = None
) -> Artifact:
    """Run one stage unless its artifact is there already, and return the artifact.

    The marker `done.json` is written last: an artifact without it is not there. A stage that was killed starts again
    with the same settings, and its trainings go on from their checkpoints.

    Args:
        name: the stage.
        recipe: the recipe.
        workplace: store and MLflow.
        out: local folder for the report.
        begun: when the run that this stage belongs to began; a report marks older stages. None: not known.

    Raises:
        FewstepError: the recipe does not have the stage, or an earlier one has not finished.
    """
    if name not in recipe.stages:
        raise FewstepError(f"recipe {recipe.name} has no stage {name}; its stages are {', '.join(recipe.stages)}")
    storage, tracker = workplace.storage, workplace.tracker
    # These are quick and find what they did before; the registry may have moved on, which the store cannot tell.
    found = find_artifact(recipe, storage, name) if name not in ("register", "promote") else None
    if found is not None:
        check_same_data(name, recipe, found.facts, storage=storage)
        logger.info("%s: done already (%.0f s when it ran), skipped", name, found.seconds)
        _show(name, recipe, storage, out)
        return found
    if name == "evaluate":
        _check_folder(out)
    logger.info("%s …", name)
    digest = fingerprint(recipe, name)
    tags = {"fewstep.recipe": recipe.name, "fewstep.fingerprint": digest}
    if name not in ("prepare", "teacher", "encode"):
        tags |= data_tags(recipe, storage)
    with tracker.run(
        recipe.name, key=f"{recipe.name}/{recipe.digest()}", tags={"fewstep.recipe": recipe.name}
    ) as parent:
        parent.log_params(recipe.model_dump(mode="json", by_alias=True, exclude={"storage", "tracking"}))
        usage = _usage(join(stage_uri(recipe, storage, name), _USAGE), storage)
        with tracker.run(name, key=f"{recipe.name}/{digest}", parent=parent.id, tags=tags) as run, usage:
            context = StageContext(
                recipe=recipe,
                storage=storage,
                tracker=tracker,
                run=run,
                parent=parent.id,
                out=out,
                begun=begun,
                usage=usage,
            )
            try:
                facts = STAGES[name](context)
            finally:
                free_device_memory()
        if "data_digest" in facts:
            parent.set_tags({DATA_DIGEST_TAG: facts["data_digest"]})
        parent.log_metrics(
            {f"{name}.seconds": usage.seconds, f"{name}.peak_memory_gib": usage.peak_memory_bytes / 2**30}
        )
    artifact = Artifact(
        uri=stage_uri(recipe, storage, name),
        fingerprint=digest,
        facts=facts,
        seconds=usage.seconds,
        peak_memory_bytes=usage.peak_memory_bytes,
        finished=datetime.now(UTC).isoformat(),
    )
    record = asdict(artifact)
    del record["uri"]  # where it lies is where it is read from
    storage.write_json(join(artifact.uri, DONE), record)
    storage.delete(join(artifact.uri, _USAGE))
    logger.info("%s: done in %.0f s", name, usage.seconds)
    # As every later process will see it.
    return Artifact(uri=artifact.uri, **storage.read_json(join(artifact.uri, DONE)))


def _check_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise StorageError(
            f"the report cannot be written to {out}: {error.strerror or error}. Name another folder with --out, or its "
            "parent in $FEWSTEP_RUNS"
        ) from error


def _usage(uri: str, storage: Storage) -> Usage:
    """Return a meter that goes on from what a killed process of the same stage had used."""

    def save(usage: Usage) -> None:
        try:
            storage.write_json(uri, {"seconds": usage.seconds, "peak_memory_bytes": usage.peak_memory_bytes})
        except StorageError as error:  # a figure for the report is no reason to stop a training
            logger.debug("usage not stored: %s", error)

    found = storage.read_json(uri) if storage.exists(uri) else {}
    return Usage((float(found.get("seconds", 0)), int(found.get("peak_memory_bytes", 0))), save=save)


def _show(name: StageName, recipe: Recipe, storage: Storage, out: Path) -> None:
    # The report lies in the store; a user whose local folder is gone gets it back.
    if name != "evaluate":
        return
    _check_folder(out)
    folder = stage_uri(recipe, storage, "evaluate")
    for info in storage.list(folder):
        file = info.uri.removeprefix(folder + "/")
        if "/" not in file and file != DONE:
            (out / file).write_bytes(storage.read_bytes(info.uri))

"""What a stage is given, and what it leaves: a folder in the store, named by a fingerprint of all that made it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from fewstep.data.emoji.dataset import SPLITS, Split
from fewstep.distill.settings import LadderKind
from fewstep.errors import FewstepError
from fewstep.models import load_model
from fewstep.recipe import Recipe, StageName, digest
from fewstep.stages.batches import SampleFormat
from fewstep.stages.memory import Usage
from fewstep.storage import Storage, join
from fewstep.tracking.fetch import fetch_model
from fewstep.tracking.registry import Registry
from fewstep.tracking.tracker import Run, Tracker
from fewstep.train.settings import ONLY_ROUNDING, ONLY_WATCHING

DONE = "done.json"

#: Raised when a stage changes what it makes of the same settings, so that older artifacts are made again.
_FORMAT = 2

#: Written beside a folder after its last file.
_STORED = ".stored"


@dataclass(frozen=True)
class Artifact:
    """What a finished stage left.

    Attributes:
        uri: folder in the store.
        fingerprint: digest of the settings and inputs that made it.
        facts: figures and names that later stages and reports use; JSON.
        seconds: wall-clock time of the stage.
        peak_memory_bytes: most memory of the process tree during it.
        finished: when it ended; ISO 8601, UTC.
    """

    uri: str
    fingerprint: str
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    finished: str = ""

    def models(self) -> dict[str, str]:
        """Return the MODEL URIs of what the stage made, by a label for people; empty for stages that make no model."""
        if "converted" in self.facts:
            return {"converted teacher": self.facts["teacher"]}
        if "network" in self.facts:
            return {"teacher": join(self.uri, "export")}
        if "training" in self.facts:
            return {"stage one": self.facts["training"]["export_uri"]}
        if "models" in self.facts:
            return {
                f"{name}, {each['alias']}": f"models:/{name}/{each['version']}"
                for name, each in self.facts["models"].items()
            }
        students = list(self.facts.get("students", {}).values())
        students.sort(key=lambda each: (each["kind"], each["w"] or 0.0, -each["num_inference_steps"]))
        return {_in_words(each["kind"], each["w"], each["num_inference_steps"]): each["uri"] for each in students}


def _in_words(kind: str, w: float | None, steps: int) -> str:
    what = "student" if kind == "deterministic" else f"{kind} student"
    what += "" if w is None else f" of w = {w:g}"
    return f"{what}, {steps} step{'' if steps == 1 else 's'}"


@dataclass(frozen=True)
class StageContext:
    """What a stage works with.

    Attributes:
        recipe: the recipe.
        storage: the object store.
        tracker: MLflow.
        run: the stage's own MLflow run.
        parent: id of the workflow's run, for runs of rungs.
        out: local folder for what a user looks at (report, pictures).
        begun: when the run that this stage belongs to began; None when it is not known.
        usage: time and memory of the stage so far.
    """

    recipe: Recipe
    storage: Storage
    tracker: Tracker
    run: Run
    parent: str
    out: Path
    begun: datetime | None = None
    usage: Usage | None = None

    def uri(self, stage: StageName) -> str:
        """Return the folder of a stage's artifact."""
        return stage_uri(self.recipe, self.storage, stage)

    def artifact(self, stage: StageName) -> Artifact:
        """Return what an earlier stage left.

        Raises:
            FewstepError: it has not run.
        """
        found = find_artifact(self.recipe, self.storage, stage)
        if found is None:
            raise FewstepError(
                f"stage {stage} of recipe {self.recipe.name} has not finished: nothing is in {self.uri(stage)}. "
                f"Run `fewstep stage {stage} RECIPE` first, or the whole workflow with `fewstep run RECIPE`"
            )
        return found

    def shards(self, split: Split) -> str:
        """Return the URI of the picture shards of a split: train, evaluate or alignment.

        Raises:
            FewstepError: the recipe names none and has no prepare stage.
        """
        if getattr(self.recipe.data, split) is None:
            if "prepare" not in self.recipe.stages:
                raise FewstepError(f"the recipe names no data.{split}: add the URI of webdataset shards under that key")
            self.artifact("prepare")  # it has run
        return shards_uri(self.recipe, self.storage, split)

    def teacher(self) -> str:
        """Return the URI of the teacher to distill: the one that encode pinned, or what convert made of it."""
        return str(self._teacher_facts()["teacher"])

    def teacher_digest(self) -> str:
        """Return the digest of the teacher to distill."""
        return str(self._teacher_facts()["teacher_digest"])

    def _teacher_facts(self) -> dict[str, Any]:
        return self.artifact("convert" if "convert" in self.recipe.stages else "encode").facts

    def sample_format(self) -> SampleFormat:
        """Return how the training samples are read."""
        return SampleFormat(**self.artifact("encode").facts["format"])

    def latents(self, split: Literal["train", "evaluate"]) -> str:
        """Return the URI of the shards that a network is trained on: the latents that the encode stage made of a split,
        or for a model in pixels its pictures."""
        return str(self.artifact("encode").facts[split]["uri"])

    def fetch(self, uri: str) -> Path:
        """Return a local folder of a MODEL."""
        return fetch_model(uri, storage=self.storage, tracking=self.tracker)


def teacher_uri(recipe: Recipe, storage: Storage) -> str:
    """Return the MODEL URI of the teacher."""
    if recipe.teacher is not None:
        return recipe.teacher
    return join(stage_uri(recipe, storage, "teacher"), "export")


def pin_teacher(context: StageContext) -> str:
    """Return the URI of the teacher that all later stages use, on whatever machine.

    An alias becomes its version, and a folder of this machine is stored where the workers of other machines find it.
    A hub id and an s3:// URI stay as they are: what they name is taken not to change while the recipe runs.
    """
    uri = teacher_uri(context.recipe, context.storage)
    if uri.startswith("models:"):
        return Registry(context.tracker).get(uri).uri
    folder = Path(uri).expanduser()
    if "://" not in uri and not uri.startswith("asset:") and folder.is_dir():
        load_model(folder)  # an incomplete model is told before it is stored
        uri = join(context.storage.root, "teachers", folder_digest(folder)[:16])
        store_once(folder, uri, context.storage)
    return uri


def store_once(folder: Path, uri: str, storage: Storage) -> None:
    """Upload a folder unless it is there whole: others may be reading it. One that was cut short is stored again."""
    if not is_stored(uri, storage):
        storage.upload_folder(folder, uri)
        storage.write_bytes(uri + _STORED, b"")


def is_stored(uri: str, storage: Storage) -> bool:
    """Return whether `store_once` has stored a folder there."""
    return storage.exists(uri + _STORED)


def shards_uri(recipe: Recipe, storage: Storage, split: Split) -> str:
    """Return where the picture shards of a split lie: where the recipe says, or where prepare puts them."""
    named = getattr(recipe.data, split)
    return str(named) if named is not None else join(storage.root, "shards", split, _split(recipe, split)[:16])


def stage_uri(recipe: Recipe, storage: Storage, stage: StageName) -> str:
    """Return the folder of a stage's artifact; it depends on nothing but the recipe, so any process can compute it."""
    return join(storage.root, stage, fingerprint(recipe, stage)[:16])


def find_artifact(recipe: Recipe, storage: Storage, stage: StageName) -> Artifact | None:
    """Return what a stage left, or None when it has not finished."""
    uri = stage_uri(recipe, storage, stage)
    if not storage.exists(join(uri, DONE)):
        return None
    return Artifact(uri=uri, **storage.read_json(join(uri, DONE)))


def fingerprint(recipe: Recipe, stage: StageName) -> str:
    """Return a digest of the settings and inputs of a stage, those of the stages before it included.

    Settings that change nothing of the result (how often to log, where Ray runs) are left out, so that a stage that is
    done stays done when they change.
    """
    inputs: dict[str, Any] = {"stage": stage, "format": _FORMAT, "seed": recipe.seed}
    stream = _order(recipe)
    if stage == "prepare":
        # Which splits are drawn belongs to it: one that the recipe no longer names elsewhere has to be drawn after all.
        inputs |= {"settings": _dump(recipe.prepare or recipe.prepare_classes), "drawn": drawn_splits(recipe)}
    elif stage == "teacher":
        settings = recipe.train_teacher or recipe.train_class_teacher
        inputs |= {"settings": _dump(settings), "data": _split(recipe, "train"), "stream": stream}
        if recipe.train_teacher is not None and recipe.train_teacher.init is not None:
            inputs["init"] = _model(recipe.train_teacher.init)
            inputs["masks"] = _dump(recipe.encode.masks)  # of an inpainting teacher
    elif stage == "encode":
        data = [_split(recipe, "train"), _split(recipe, "evaluate")]
        inputs |= {"settings": _dump(recipe.encode), "data": data, "teacher": _teacher(recipe)}
    elif stage == "convert":
        inputs |= {"settings": _dump(recipe.convert), "encode": fingerprint(recipe, "encode"), "stream": stream}
    elif stage == "guidance":
        inputs |= {"settings": _dump(recipe.guidance), "encode": fingerprint(recipe, "encode"), "stream": stream}
        if "convert" in recipe.stages:
            inputs["convert"] = fingerprint(recipe, "convert")
    elif stage == "progressive":
        inputs["guidance_scale"] = recipe.evaluate.guidance_scale  # of the picture grids
        inputs |= {"settings": _dump(recipe.progressive), "guidance": fingerprint(recipe, "guidance"), "stream": stream}
    elif stage == "evaluate":
        judged = recipe.evaluate_classes or recipe.evaluate
        inputs |= {"settings": _dump(judged), "progressive": fingerprint(recipe, "progressive")}
        inputs["alignment"] = _split(recipe, "alignment")
    else:
        inputs |= {"settings": _dump(recipe.register_), "evaluate": fingerprint(recipe, "evaluate")}
    return digest(inputs)


def autoencoder_fingerprint(recipe: Recipe) -> str:
    """Return a digest of what the teacher's VAE depends on."""
    settings = recipe.train_teacher or recipe.train_class_teacher
    assert settings is not None
    assert settings.autoencoder_train is not None
    return digest(
        {
            "settings": settings.autoencoder and _dump(settings.autoencoder),
            "train": settings.autoencoder_train.of_the_weights(),
            "weights": [settings.kl_weight, settings.edge_weight],
            "data": _split(recipe, "train"),
            "stream": _order(recipe),
            "seed": recipe.seed,
            "format": _FORMAT,
        }
        # That of a teacher with classes reads pictures with a class, grey ones perhaps.
        | ({} if recipe.train_class_teacher is None else {"channels": recipe.train_class_teacher.network.channels})
    )


def latents_fingerprint(recipe: Recipe, *, shards_digest: str, teacher_digest: str, masks: bool = False) -> str:
    """Return a digest of the latents that a teacher gives of picture shards, both named by their content.

    Args:
        recipe: the recipe.
        shards_digest: digest of the index of the picture shards.
        teacher_digest: `folder_digest` of the teacher.
        masks: masks are drawn for the pictures, which depend on the recipe's seed.
    """
    inputs = {"settings": _dump(recipe.encode), "data": shards_digest, "teacher": teacher_digest, "format": _FORMAT}
    return digest(inputs | ({"seed": recipe.seed} if masks else {}))


def guidance_fingerprint(recipe: Recipe, *, teacher_digest: str, latents_digest: str) -> str:
    """Return a digest of what stage one's weights depend on: its settings, and its inputs by their content.

    Held-out data and the guidance scale of the evaluation are no part of it, so that evaluating on more prompts or at
    another scale trains nothing anew.

    Args:
        recipe: the recipe.
        teacher_digest: `folder_digest` of the teacher.
        latents_digest: digest of the latent shards that it is trained on.
    """
    assert recipe.guidance is not None
    return digest(
        {
            "settings": _without(_dump(recipe.guidance), {"num_validation"}),
            "teacher": teacher_digest,
            "latents": latents_digest,
            "stream": _order(recipe),
            "seed": recipe.seed,
            "format": _FORMAT,
        }
    )


def convert_fingerprint(recipe: Recipe, *, teacher_digest: str, latents_digest: str) -> str:
    """Return a digest of what a converted teacher's weights depend on; arguments as for `guidance_fingerprint`."""
    return digest(
        {
            "settings": _dump(recipe.convert),
            "teacher": teacher_digest,
            "latents": latents_digest,
            "stream": _order(recipe),
            "seed": recipe.seed,
            "format": _FORMAT,
        }
    )


def rung_fingerprint(
    recipe: Recipe, kind: LadderKind, num_inference_steps: int, *, w: float | None = None, before: str
) -> str:
    """Return a digest of one rung and all that it builds on; a change to a later rung leaves it as it is.

    Args:
        recipe: the recipe.
        kind: of the ladder.
        num_inference_steps: the rung.
        w: the weight of a single-w ladder.
        before: fingerprint of the rung before it; of stage one for the first.
    """
    assert recipe.progressive is not None
    stage = recipe.progressive
    # What another rung or another ladder is told does not matter to this one.
    own = stage.model_dump(
        mode="json", exclude={"ladder", "updates", "train", "kinds", "single_w", "first_teacher_steps"}
    )
    own |= {key: own[key].get(str(num_inference_steps), own[key].get(num_inference_steps)) for key in _BY_STEPS}
    own["skip_level"] = None  # it shows in the rung before, and in the number of its steps
    if kind != "naive":
        own["guided_share"] = None
    return digest(
        {
            "rung": num_inference_steps,
            "kind": kind,
            "w": w,
            "teacher_steps": stage.teacher_of(num_inference_steps)[1],
            "settings": stage.rung(num_inference_steps).of_the_weights(),
            "stage": own,
            "before": before,
        }
    )


_BY_STEPS = ("start_times", "prediction_type")


def _order(recipe: Recipe) -> dict[str, Any]:
    return {"num_streams": recipe.stream.num_streams, "shuffle_shards": recipe.stream.shuffle_shards}


def drawn_splits(recipe: Recipe) -> list[Split]:
    """Return the splits that prepare draws: those for which the recipe names no shards of the user's own."""
    return [split for split in SPLITS if getattr(recipe.data, split) is None]


def _split(recipe: Recipe, split: Split) -> str:
    """Return a digest of the shards of one split: how many samples the others have is no part of it."""
    named = getattr(recipe.data, split)
    drawn = recipe.prepare or recipe.prepare_classes
    if named is not None or drawn is None or "prepare" not in recipe.stages:
        return digest({"uri": named})
    others = {f"num_{other}" for other in SPLITS if other != split}
    return digest({"settings": _without(_dump(drawn), others), "format": _FORMAT})


def _teacher(recipe: Recipe) -> str:
    return fingerprint(recipe, "teacher") if recipe.teacher is None else _model(recipe.teacher)


def _model(uri: str) -> str:
    try:
        folder = fetch_model(uri) if uri.startswith("asset:") else Path(uri).expanduser()
    except FewstepError:
        return uri
    # A folder on disk may be saved again under the same name: its weights are part of what it is.
    return folder_digest(folder) if folder.is_dir() else uri


@lru_cache
def folder_digest(folder: Path) -> str:
    """Return the SHA-256 over names and content of the files of a model folder, in hex."""
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.suffix in (".safetensors", ".bin", ".json", ".txt"):
            total.update(str(file.relative_to(folder)).encode())
            with file.open("rb") as opened:
                total.update(hashlib.file_digest(opened, "sha256").digest())
    return total.hexdigest()


_WATCHING = {*ONLY_WATCHING, *ONLY_ROUNDING, "batch_size", "num_threads"}


def _dump(settings: Any) -> Any:
    return _without(settings.model_dump(mode="json"), _WATCHING)


def _without(value: Any, keys: set[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without(inner, keys) for key, inner in value.items() if key not in keys}
    return value

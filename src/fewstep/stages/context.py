"""What a stage is given, and what it leaves: a folder in the store, named by a fingerprint of all that made it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from fewstep.data.emoji.dataset import Split
from fewstep.data.mixture import Mixture, Shards
from fewstep.errors import FewstepError
from fewstep.models import load_model
from fewstep.recipe import Recipe, StageName
from fewstep.stages.batches import SampleFormat
from fewstep.stages.fingerprints import fingerprint, folder_digest, split_fingerprint
from fewstep.stages.memory import Usage
from fewstep.stages.same_data import check_same_data
from fewstep.storage import Storage, join
from fewstep.tracking.fetch import fetch_model
from fewstep.tracking.registry import Registry
from fewstep.tracking.tracker import Run, Tracker

DONE = "done.json"

#: Of MLflow's runs and of registered models: `data_digest` of what they were trained on.
DATA_DIGEST_TAG = "fewstep.data_digest"

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

    def shards(self, split: Split) -> Shards:
        """Return the URI of the picture shards of a split, train, evaluate or alignment; for train perhaps a mixture.

        Raises:
            FewstepError: the recipe names none and has no prepare stage.
        """
        if getattr(self.recipe.data, split) is None:
            if "prepare" not in self.recipe.stages:
                raise FewstepError(f"the recipe names no data.{split}: add the URI of webdataset shards under that key")
            self.artifact("prepare")  # it has run
        if split == "train" and isinstance(self.recipe.data.train, tuple):
            return Mixture(self.recipe.data.train)
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
        """Return how held-out samples are read."""
        return SampleFormat(**self.artifact("encode").facts["format"])

    def training_format(self) -> SampleFormat:
        """Return how the samples that networks are trained on are read: as `sample_format`, or with token ids where the
        shards hold no text embeddings."""
        facts = self.artifact("encode").facts
        return SampleFormat(**facts.get("training_format", facts["format"]))

    def latents(self, split: Literal["train", "evaluate"]) -> Shards:
        """Return the URI of the shards that a network is trained on, or a mixture of such: the latents that the encode
        stage made of a split, or for a model in pixels its pictures.

        Raises:
            DataError: pictures that are trained on are others now than encode has seen.
        """
        facts = self.artifact("encode").facts
        if split == "train" and self.training_format().kind != "latents":
            check_same_data("encode", self.recipe, facts, storage=self.storage)
        return encoded_shards(self.recipe, facts[split])

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
    assert not isinstance(named, tuple), "a mixture has no one address"
    return (
        str(named) if named is not None else join(storage.root, "shards", split, split_fingerprint(recipe, split)[:16])
    )


def encoded_shards(recipe: Recipe, facts: Mapping[str, Any]) -> Shards:
    """Return where the encode stage, by its facts about a split, has put what a network is trained on."""
    if "sources" not in facts:
        return str(facts.get("list", facts["uri"]))
    assert isinstance(recipe.data.train, tuple), "the fingerprint of encode has the sources"
    return Mixture(recipe.data.train).at([source.get("list", source["uri"]) for source in facts["sources"]])


def stage_uri(recipe: Recipe, storage: Storage, stage: StageName) -> str:
    """Return the folder of a stage's artifact; it depends on nothing but the recipe, so any process can compute it."""
    return join(storage.root, stage, fingerprint(recipe, stage)[:16])


def data_tags(recipe: Recipe, storage: Storage) -> dict[str, str]:
    """Return the tag that names the data, for the runs of stages after encode; nothing before."""
    encoded = find_artifact(recipe, storage, "encode") if "encode" in recipe.stages else None
    return {DATA_DIGEST_TAG: encoded.facts["data_digest"]} if encoded and "data_digest" in encoded.facts else {}


def find_artifact(recipe: Recipe, storage: Storage, stage: StageName) -> Artifact | None:
    """Return what a stage left, or None when it has not finished."""
    uri = stage_uri(recipe, storage, stage)
    if not storage.exists(join(uri, DONE)):
        return None
    return Artifact(uri=uri, **storage.read_json(join(uri, DONE)))

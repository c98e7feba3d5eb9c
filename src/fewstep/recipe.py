"""The one typed configuration. YAML only fills it; unknown keys are refused, and every check runs before any work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import Field, ValidationError, model_validator

from fewstep.changes import apply_changes, changes_at_hand, in_words, without_passwords
from fewstep.data.classes import ClassPicturesSettings
from fewstep.data.emoji import EmojiSettings
from fewstep.data.metadata.settings import MetadataSettings
from fewstep.data.samples import SampleRules
from fewstep.data.stream import StreamSettings
from fewstep.errors import RecipeError
from fewstep.evaluate.classes.settings import ClassEvaluateSettings
from fewstep.evaluate.settings import EvaluateSettings
from fewstep.stage_settings import (
    ClassTeacherStage,
    ConvertStage,
    DataSettings,
    EncodeSettings,
    GuidanceStage,
    ProgressiveStage,
    RegisterStage,
    StageSettings,
    TeacherStage,
    settings_class,
)
from fewstep.storage import StorageSettings
from fewstep.tracking.settings import TrackingSettings
from fewstep.train.settings import ClusterSettings, ElasticWorkers, wrong_group

StageName = Literal[
    "prepare", "teacher", "encode", "convert", "guidance", "progressive", "evaluate", "register", "promote"
]


#: 1.3 - 1 is a little more than 0.3 in floating point.
_SLACK = 1e-6


class Recipe(StageSettings):
    """A whole workflow."""

    name: str = Field(min_length=1, max_length=40, pattern=r"^[a-z0-9][a-z0-9-]*$", description="name of the workflow")
    seed: int = Field(0, description="seed of everything")
    stages: tuple[StageName, ...] = Field(
        description="the stages to run, in order; with promote, register makes candidates only, and promote makes "
        "those that passed the gate champions"
    )
    teacher: str | None = Field(
        None,
        description="MODEL to distill: folder, s3://, hub id, models:/ or asset:NAME; an alias of the registry becomes "
        "its version when encode runs first, so name another version to distill that",
    )
    storage: StorageSettings = Field(default_factory=StorageSettings, description="object store")
    tracking: TrackingSettings = Field(default_factory=TrackingSettings, description="MLflow")
    cluster: ClusterSettings = Field(default_factory=ClusterSettings, description="Ray")
    stream: StreamSettings = Field(default_factory=StreamSettings, description="how shards become batches")
    data: DataSettings = Field(default_factory=DataSettings, description="shards, when prepare does not make them")
    prepare: EmojiSettings | None = Field(None, description="the emoji set")
    prepare_classes: ClassPicturesSettings | None = Field(
        None, description="pictures with a class each, instead of the emoji set"
    )
    prepare_metadata: MetadataSettings | None = Field(
        None, description="pictures downloaded by metadata such as LAION's, instead of the emoji set"
    )
    train_teacher: TeacherStage | None = Field(None, description="settings of the teacher stage")
    train_class_teacher: ClassTeacherStage | None = Field(
        None, description="settings of the teacher stage for a class-conditional teacher"
    )
    encode: EncodeSettings = Field(default_factory=EncodeSettings, description="settings of the encode stage")
    convert: ConvertStage | None = Field(None, description="settings of the convert stage")
    guidance: GuidanceStage | None = Field(None, description="settings of stage one")
    progressive: ProgressiveStage | None = Field(None, description="settings of stage two")
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings, description="settings of the evaluation")
    evaluate_classes: ClassEvaluateSettings | None = Field(
        None, description="settings of the evaluation of class-conditional students"
    )
    register_: RegisterStage = Field(default_factory=RegisterStage, alias="register", description="registry settings")

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        order = [name for name in get_args(StageName) if name in self.stages]
        if list(self.stages) != order:
            raise ValueError(f"stages {list(self.stages)} are out of order or doubled; the order is {order}")
        needs = {
            "prepare": ("prepare", "prepare_classes", "prepare_metadata"),
            "teacher": ("train_teacher", "train_class_teacher"),
            "convert": ("convert",),
            "guidance": ("guidance",),
            "progressive": ("progressive",),
        }
        for stage, keys in needs.items():
            named = [key for key in keys if getattr(self, key) is not None]
            if stage in self.stages and not named:
                raise ValueError(
                    f"stages has {stage}, but its settings are missing: add the key {' or '.join(keys)}, "
                    "or drop the stage"
                )
            if len(named) > 1:
                raise ValueError(f"the recipe has both {' and '.join(named)}: the stage {stage} takes one of them")
        if "register" in self.stages and "evaluate" not in self.stages:
            raise ValueError(
                "stages has register but not evaluate: the gate judges what evaluate measured; add evaluate"
            )
        if "promote" in self.stages and "register" not in self.stages:
            raise ValueError("stages has promote but not register, which names the versions that it promotes: add it")
        if "prepare" not in self.stages and self.data.train is None:
            raise ValueError("there are no shards: name them in data.train, or put prepare into stages")
        if self.teacher is None and "teacher" not in self.stages:
            raise ValueError("there is no teacher: name a MODEL in the key teacher, or put teacher into stages")
        if self.teacher is not None and "teacher" in self.stages:
            raise ValueError(
                f"teacher is {self.teacher!r} and stages has teacher: drop one, it is either named or trained"
            )
        scale = self.evaluate.guidance_scale
        if self.guidance is not None:
            low, high = self.guidance.weights
            if not low - _SLACK <= scale - 1 <= high + _SLACK:
                raise ValueError(
                    f"evaluate.guidance_scale={scale:g} is w={scale - 1:g}, outside the trained range "
                    f"{low:g} … {high:g}: change it, or guidance.w_min and w_max"
                )
            if low > 0 and self.progressive is not None and "encoder" in self.progressive.kinds:
                raise ValueError(
                    f"progressive.kinds has encoder, and guidance begins at w={low:g}: pictures are encoded at w=0, "
                    "where nothing is guided; set guidance.w_min to 0"
                )
        if self.progressive is not None and "register" in self.stages:
            wanted = self.register_.num_inference_steps
            if wanted not in self.progressive.ladder:
                raise ValueError(
                    f"register.num_inference_steps={wanted} is not in "
                    f"progressive.ladder {list(self.progressive.ladder)}"
                )
        self._check_sizes()
        if "evaluate" in self.stages and self.progressive is not None and self.evaluate_classes is None:
            if "deterministic" not in self.progressive.kinds:
                raise ValueError(
                    f"progressive.kinds is {list(self.progressive.kinds)}, and evaluate judges the deterministic "
                    "students of prompts: add deterministic, or leave evaluate out of stages"
                )
            strangers = sorted(set(self.evaluate.steps) - set(self.progressive.ladder))
            if strangers:
                raise ValueError(
                    f"evaluate.steps has {strangers}, for which progressive.ladder {list(self.progressive.ladder)} "
                    "makes no student"
                )
        return self

    def _check_elastic(self, workers: ElasticWorkers) -> None:
        streams, processes = self.stream.num_streams, self.stream.loader_processes
        if workers.max > streams:
            raise ValueError(
                f"cluster.num_workers.max={workers.max} is above stream.num_streams={streams}, of which every worker "
                "takes at least one: lower max, or raise num_streams (which changes the order of samples)"
            )
        if processes > streams // workers.max:
            raise ValueError(
                f"stream.loader_processes={processes} needs as many streams in each worker, and with "
                f"cluster.num_workers.max={workers.max} some have {streams // workers.max} of "
                f"stream.num_streams={streams}: take at most {streams // workers.max} processes, or more streams"
            )

    def _check_sizes(self) -> None:
        """Refuse sizes that do not fit together, before a GPU is taken."""
        streams, workers = self.stream.num_streams, self.cluster.num_workers
        if isinstance(workers, int) and streams % workers:
            raise ValueError(
                f"stream.num_streams={streams} is no multiple of cluster.num_workers={workers}: every worker takes as "
                f"many streams; set num_streams to {workers * max(1, round(streams / workers))}"
            )
        if isinstance(workers, ElasticWorkers):
            self._check_elastic(workers)
        trainings = {
            "convert.train": self.convert and self.convert.train,
            "guidance.train": self.guidance and self.guidance.train,
            "progressive.train": self.progressive and self.progressive.train,
            "train_class_teacher.train": self.train_class_teacher and self.train_class_teacher.train,
            "train_class_teacher.autoencoder_train": self.train_class_teacher
            and self.train_class_teacher.autoencoder_train,
            "train_teacher.train": self.train_teacher and self.train_teacher.train,
            "train_teacher.autoencoder_train": self.train_teacher and self.train_teacher.autoencoder_train,
        }
        for key, train in trainings.items():
            if train and train.global_batch_size % streams:
                nearest = streams * max(1, round(train.global_batch_size / streams))
                raise ValueError(
                    f"{key}.global_batch_size={train.global_batch_size} is no multiple of "
                    f"stream.num_streams={streams}: take {nearest}, or other streams"
                )
        classes = [key for key in ("prepare_classes", "train_class_teacher", "evaluate_classes") if getattr(self, key)]
        if self.sample_rules and classes:
            raise ValueError(
                "data.filters and data.captions are for recipes whose teacher is told a caption, and this one has "
                f"{classes[0]}: leave them out, and filter the shards when they are made"
            )
        if self.encode.buckets is not None:
            self._check_buckets()
        if classes and self.encode.crop == "random":
            raise ValueError(f"encode.crop=random has no effect on pictures with a class ({classes[0]}): leave it out")
        if self.prepare_metadata is not None and None not in (
            self.data.train, self.data.evaluate, self.data.alignment
        ):  # fmt: skip
            raise ValueError(
                "prepare_metadata has nothing to draw, as data names shards for train, evaluate and alignment: take "
                "those that it shall draw out of data, or leave prepare_metadata out"
            )
        if (
            self.prepare_metadata is not None
            and {"prepare", "encode"} <= set(self.stages)
            and self.data.evaluate is None
            and not self.prepare_metadata.num_evaluate
        ):
            raise ValueError(
                "prepare_metadata.num_evaluate=0, and held-out pictures show how well a training does: draw some "
                "thousands, or name shards in data.evaluate"
            )
        if "evaluate" not in self.stages:
            return
        if self.evaluate_classes is not None:
            self._check_classes(self.evaluate_classes)
            return
        if self.train_class_teacher is not None:
            raise ValueError(
                "stages has evaluate, and train_class_teacher makes a teacher that is told a class: add the key "
                "evaluate_classes, or drop the stage"
            )
        if "prepare" not in self.stages and (self.data.evaluate is None or self.data.alignment is None):
            raise ValueError("stages has evaluate, so data.evaluate and data.alignment must name held-out shards")
        self._check_held_out()
        if "register" in self.stages:
            if self.register_.num_inference_steps not in self.evaluate.steps:
                raise ValueError(
                    f"register.num_inference_steps={self.register_.num_inference_steps} is not in evaluate.steps "
                    f"{list(self.evaluate.steps)}: a student that is not measured can never be champion"
                )
            if self.register_.gate.min_num_images > self.evaluate.num_prompts:
                raise ValueError(
                    f"register.gate.min_num_images={self.register_.gate.min_num_images} is more than "
                    f"evaluate.num_prompts={self.evaluate.num_prompts}: no student could ever pass"
                )

    def _check_buckets(self) -> None:
        """Refuse what cannot be trained in groups of one size of picture."""
        classes = [key for key in ("prepare_classes", "train_class_teacher", "evaluate_classes") if getattr(self, key)]
        if classes:
            raise ValueError(f"encode.buckets are for models that are told a caption, and this recipe has {classes[0]}")
        if self.train_teacher is not None and self.train_teacher.inpainting:
            raise ValueError("encode.buckets cannot be used with train_teacher.inpainting: leave one of them out")
        for key, stage in (("convert", self.convert), ("guidance", self.guidance), ("progressive", self.progressive)):
            train = None if stage is None else stage.train
            if train is not None and train.micro_batch_size is not None:
                group = train.global_batch_size // self.stream.num_streams
                if group % train.micro_batch_size:
                    words = wrong_group(train.micro_batch_size, group, train.global_batch_size)
                    raise ValueError(f"{key}.train.{words}")

    def _check_held_out(self) -> None:
        prompts = self.evaluate.num_prompts
        if self.prepare is not None and prompts > self.prepare.num_evaluate:
            raise ValueError(
                f"evaluate.num_prompts={prompts} is more than prepare.num_evaluate={self.prepare.num_evaluate}: every "
                "prompt is one held-out scene; raise num_evaluate"
            )
        metadata = self.prepare_metadata
        if metadata is None or "prepare" not in self.stages:
            return
        if self.data.evaluate is None and prompts > metadata.num_evaluate:
            raise ValueError(
                f"evaluate.num_prompts={prompts} is more than prepare_metadata.num_evaluate={metadata.num_evaluate}: "
                "every prompt is one held-out picture, and some cannot be downloaded; raise num_evaluate, or name "
                "shards in data.evaluate"
            )
        if self.data.alignment is None and not metadata.num_alignment:
            raise ValueError(
                "stages has evaluate, and prepare_metadata.num_alignment=0: its scorer of text alignment is fitted "
                "with held-out pictures; draw some thousands, or name shards in data.alignment"
            )

    def _check_classes(self, settings: ClassEvaluateSettings) -> None:
        if "register" in self.stages:
            raise ValueError(
                "stages has register, whose gate judges text-to-image students; this recipe's are class-conditional "
                "(evaluate_classes): drop register"
            )
        if "prepare" not in self.stages and self.data.evaluate is None:
            raise ValueError("stages has evaluate, so data.evaluate must name held-out shards")
        ladder = self.progressive.ladder if self.progressive is not None else ()
        strangers = sorted(set(settings.steps) - set(ladder))
        if strangers:
            raise ValueError(
                f"evaluate_classes.steps has {strangers}, for which progressive.ladder {list(ladder)} makes no student"
            )
        if self.progressive is not None and "deterministic" not in self.progressive.kinds:
            raise ValueError(
                f"progressive.kinds is {list(self.progressive.kinds)}, and the table of evaluate_classes begins with "
                "the deterministic students: add deterministic"
            )
        if self.guidance is not None:
            low, high = self.guidance.weights
            outside = [w for w in settings.weights if not low - _SLACK <= w <= high + _SLACK]
            if outside:
                raise ValueError(
                    f"evaluate_classes.weights has {outside}, outside the trained range {low:g} … {high:g}: change "
                    "them, or guidance.w_min and w_max"
                )

    @property
    def sample_rules(self) -> SampleRules:
        """Which samples are used, and what their captions are."""
        return SampleRules(self.data.filters, self.data.captions, self.seed)

    def digest(self) -> str:
        """Return a digest of the recipe, stores and cluster left out: where it runs does not change what it is."""
        return digest(self.model_dump(mode="json", by_alias=True, exclude={"storage", "tracking", "cluster"}))


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def load_recipe(path: Path | str, *, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe, change it as $FEWSTEP_SET and the command's options say, and check it.

    Args:
        path: its file.
        changes: each ``key.path=value``; they win over those of $FEWSTEP_SET, one a line.

    Raises:
        RecipeError: the file is missing, is no YAML mapping, has an unknown key or a value that cannot work; the
            message names every such key with its value and the rule, and the changes that were made.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"there is no recipe {path}; the shipped ones are in workflows/recipes/") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"the recipe {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"the recipe {path} must be a mapping of keys, not {type(content).__name__}")
    made = changes_at_hand(changes)
    content = apply_changes(content, made, is_text=_takes_text)
    return parse_recipe(content, source=f"{path}, {in_words(made)}" if made else str(path))


def parse_recipe(content: dict[str, Any], *, source: str = "recipe") -> Recipe:
    """Check the content of a recipe.

    Raises:
        RecipeError: see `load_recipe`.
    """
    try:
        return Recipe.model_validate(content)
    except RecipeError as error:
        raise RecipeError(f"{source}: {error}") from error
    except ValidationError as error:
        raise RecipeError(
            f"{source} cannot be used:\n" + "\n".join(_explain(fault) for fault in error.errors())
        ) from None


def _takes_text(path: tuple[str, ...]) -> bool:
    model: Any = Recipe
    for part in path:
        fields = {(field.alias or name): field for name, field in getattr(model, "model_fields", {}).items()}
        if part not in fields:
            return False
        annotation = fields[part].annotation
        model = settings_class(annotation)
    return annotation is str or set(get_args(annotation)) == {str, type(None)}


def _explain(fault: Any) -> str:
    place = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"  {place}: unknown key; {_known_keys(fault['loc'])}"
    if fault["type"] == "missing":
        return f"  {place}: this key is required and missing"
    message = fault["msg"].removeprefix("Value error, ")
    value = fault.get("input")
    shown = f"={without_passwords(repr(value))}" if isinstance(value, (str, int, float, bool)) else ""
    return f"  {place}{shown}: {message}" if place else f"  {message}"


def _known_keys(location: tuple[Any, ...]) -> str:
    model: Any = Recipe
    for part in location[:-1]:
        if isinstance(part, int):  # the place in a list
            continue
        fields = {(field.alias or name): field for name, field in getattr(model, "model_fields", {}).items()}
        if part not in fields:
            return "see docs/recipes.md for the keys"
        model = settings_class(fields[part].annotation)
    keys = [field.alias or name for name, field in getattr(model, "model_fields", {}).items()]
    return "the keys here are " + ", ".join(keys)

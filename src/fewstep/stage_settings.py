"""What a recipe may say about each stage; the rooms' own settings are put together here."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, TypeAdapter, field_validator, model_validator

from fewstep.data.buckets import BucketSettings
from fewstep.data.masks import MaskSettings
from fewstep.data.mixture import Source, named_sources
from fewstep.data.pictures import Crop
from fewstep.data.samples import CaptionSource, FieldFilter
from fewstep.diffusion.prediction import PredictionType
from fewstep.distill.settings import GuidanceSettings, ProgressiveSettings
from fewstep.distill.weights import LossWeight
from fewstep.evaluate.gate import GateSettings
from fewstep.models import AutoencoderArchitecture, ClassArchitecture, TeacherArchitecture
from fewstep.train.settings import TrainSettings

_VAE = "MODEL whose autoencoder is taken, instead of training one"
_VAE_HAS_SIZES = (
    "vae names the autoencoder of a model, which is trained and has its sizes: leave out autoencoder and "
    "autoencoder_train, or vae"
)


_SOURCES = TypeAdapter(tuple[Source, ...])


def _check_is_no_alias(key: str, uri: str | None) -> None:
    if uri is not None and uri.startswith("models:") and "@" in uri:
        raise ValueError(
            f"{key}={uri} is an alias of the registry, which may move, and a teacher that was trained from what it "
            "named before would be taken for one of what it names now: name a version, such as models:/NAME/3"
        )


class StageSettings(BaseModel):
    """Frozen; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DataSettings(StageSettings):
    """Where the text-image shards lie, when the prepare stage does not make them."""

    train: str | tuple[Source, ...] | None = Field(
        None,
        description="URI of webdataset shards to train on (img2dataset layout), or a list of sources that are mixed by "
        "their weights",
    )
    evaluate: str | None = Field(None, description="URI of held-out shards, for evaluation alone")
    alignment: str | None = Field(None, description="URI of further shards, to fit the scorer of text alignment with")
    version: str | None = Field(
        None,
        min_length=1,
        description="a word of your own for the content of the shards and of prepare_metadata.source: with another one "
        "all that depends on them is made anew",
    )
    filters: tuple[FieldFilter, ...] = Field(
        (), description="conditions on the .json of each sample, in every split; what fails one is left out and counted"
    )
    captions: tuple[CaptionSource, ...] = Field(
        (), description="where captions come from, one drawn for each sample by the seed; none: the member .txt"
    )

    @field_validator("train", mode="before")
    @classmethod
    def _name_sources(cls, train: Any) -> Any:
        if train is None or isinstance(train, str):
            return train
        if not isinstance(train, (list, tuple)):
            raise ValueError(f"{train!r} is neither the URI of shards nor a list of sources with uri and weight")
        if not train:
            raise ValueError("the list of sources is empty: name at least one, or a URI")
        sources = _SOURCES.validate_python(train)
        # There is nothing to mix in a single one, so that it is what its URI is.
        return sources[0].uri if len(sources) == 1 else named_sources(sources)


class EncodeSettings(StageSettings):
    """How pictures and captions become latents and text embeddings."""

    batch_size: int = Field(64, ge=1, description="pictures encoded at once")
    encoders: Literal["auto"] | PositiveInt = Field(
        "auto",
        description="processes in the cluster that encode, each with a GPU if trainings have one; auto: as many as "
        "cluster.num_workers where those have GPUs, and otherwise this process alone",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="what VAE and text encoder compute in; bfloat16 is faster on GPUs, and coarser"
    )
    store_latents: bool = Field(
        True,
        description="make the training latents once and read them; false: trainings read the pictures, and the "
        "teacher's frozen VAE and text encoder make latents and embeddings in every update, which needs no room in the "
        "store and costs the VAE's time again in each epoch",
    )
    store_text: bool = Field(
        True,
        description="store text embeddings beside the training latents; false: trainings make them of the captions, by "
        "the teacher's frozen text encoder, and shards are a third as large (Stable Diffusion 1.5)",
    )
    crop: Crop = Field(
        "center",
        description="what is kept of a picture's longer side: the middle, or a part drawn by the seed and its key "
        "(random)",
    )
    buckets: BucketSettings | None = Field(
        None,
        description="aspect-ratio buckets: crop training pictures to the nearest of some sizes of about as many "
        "pixels, instead of all to the square; for models of latents that are told a caption; null: the square alone",
    )
    picture_sizes: bool = Field(
        False,
        description="for Stable Diffusion XL: tell the networks each picture's own size and crop in training, instead "
        "of those of an uncropped picture of the model's size, which they are told when they draw",
    )
    masks: MaskSettings = Field(
        default_factory=MaskSettings, description="for inpainting teachers: how the mask of each picture is drawn"
    )


class ConvertStage(StageSettings):
    """Fine-tuning a teacher to another prediction type, before it is distilled."""

    prediction_type: PredictionType = Field(
        "v_prediction", description="what the teacher shall output: v_prediction, epsilon or sample"
    )
    rescale_betas_zero_snr: bool | None = Field(
        None, description="rescale its noise schedule to zero terminal SNR (true), or not; null: leave it as it is"
    )
    train: TrainSettings = Field(description="the fine-tuning")
    condition_dropout: float = Field(0.1, ge=0, lt=1, description="share of rows trained without their condition")
    loss_weight: LossWeight = Field("snr_plus_one", description="weight of the denoising loss")


class TeacherStage(StageSettings):
    """Training a teacher from nothing, a VAE and then U-Net and text encoders together; or training a model on."""

    init: str | None = Field(
        None, description="MODEL to train on; its VAE and tokenizer stay; null begins from nothing"
    )
    vae: str | None = Field(None, description=_VAE)
    inpainting: bool = Field(
        False,
        description="with init: let the model see a hole and the picture around it (encode.masks says how holes are "
        "drawn), if it does not yet",
    )
    add_pooled_text: bool = Field(
        False, description="with init: let the pooled prompt reach the time embedding too, if the model's does not yet"
    )
    prediction_type: PredictionType | None = Field(
        None,
        description="with init: what the model is to output from now on, epsilon, v_prediction or sample; null: what "
        "it does",
    )
    rescale_betas_zero_snr: bool | None = Field(
        None, description="with init: rescale its noise schedule to zero terminal SNR, or no longer; null: as it is"
    )
    autoencoder: AutoencoderArchitecture = Field(
        default_factory=AutoencoderArchitecture, description="sizes of the VAE"
    )
    autoencoder_train: TrainSettings | None = Field(None, description="training of the VAE, unless init is named")
    kl_weight: float = Field(1e-4, ge=0, description="weight of the VAE's KL term")
    edge_weight: float = Field(1.0, ge=0, description="weight of the VAE's loss on differences of neighbouring pixels")
    network: TeacherArchitecture = Field(
        default_factory=TeacherArchitecture, description="sizes of U-Net and text encoder"
    )
    train: TrainSettings = Field(description="training of U-Net and text encoder")
    condition_dropout: float = Field(0.1, ge=0, lt=1, description="share of rows trained without their caption")
    loss_weight: LossWeight = Field("snr_plus_one", description="weight of the denoising loss")

    @model_validator(mode="after")
    def _check_begin(self) -> TeacherStage:
        if sum(each is not None for each in (self.init, self.vae, self.autoencoder_train)) != 1:
            raise ValueError(
                "a teacher begins from a model (init), or with fresh networks around a model's autoencoder (vae) or "
                "around one that is trained first (autoencoder_train): name exactly one"
            )
        _check_is_no_alias("init", self.init)
        _check_is_no_alias("vae", self.vae)
        if self.vae is not None and "autoencoder" in self.model_fields_set:
            raise ValueError(_VAE_HAS_SIZES)
        if self.inpainting and self.init is None:
            raise ValueError(
                "inpainting changes the model named by init, and there is none: train a text-to-image teacher first "
                "and name it there (asset:emoji-teacher is one)"
            )
        for name in ("prediction_type", "rescale_betas_zero_snr"):
            if getattr(self, name) is not None and self.init is None:
                raise ValueError(
                    f"{name} changes the model named by init, and there is none; a teacher from nothing outputs v and "
                    "has zero terminal SNR"
                )
        if self.add_pooled_text and self.init is None:
            raise ValueError(
                "add_pooled_text changes the model named by init, and there is none; a network from nothing takes "
                "network.pooled_text"
            )
        return self


class ClassTeacherStage(StageSettings):
    """Training a class-conditional teacher from nothing: in pixels, or after a VAE in latents."""

    network: ClassArchitecture = Field(default_factory=ClassArchitecture, description="sizes of the U-Net")
    vae: str | None = Field(None, description=_VAE)
    autoencoder: AutoencoderArchitecture | None = Field(
        None, description="sizes of the VAE of a teacher in latents; null: a teacher in pixels"
    )
    autoencoder_train: TrainSettings | None = Field(None, description="training of the VAE")
    kl_weight: float = Field(1e-4, ge=0, description="weight of the VAE's KL term")
    edge_weight: float = Field(1.0, ge=0, description="weight of the VAE's loss on differences of neighbouring pixels")
    train: TrainSettings = Field(description="training of the U-Net")
    condition_dropout: float = Field(0.1, gt=0, lt=1, description="share of rows trained without their class")
    loss_weight: LossWeight = Field("snr_plus_one", description="weight of the denoising loss")

    @model_validator(mode="after")
    def _check_latents(self) -> ClassTeacherStage:
        _check_is_no_alias("vae", self.vae)
        if self.vae is not None and not (self.autoencoder is None and self.autoencoder_train is None):
            raise ValueError(_VAE_HAS_SIZES)
        if (self.autoencoder is None) != (self.autoencoder_train is None):
            raise ValueError(
                "a teacher in latents needs both autoencoder (its sizes) and autoencoder_train; one in pixels neither"
            )
        if self.autoencoder is not None and self.autoencoder.resolution != self.network.resolution:
            raise ValueError(
                f"autoencoder.resolution={self.autoencoder.resolution} is not network.resolution="
                f"{self.network.resolution}: both are the side of the pictures in pixels; give both the same"
            )
        return self

    @property
    def in_latents(self) -> bool:
        """Whether the network works in the latents of an autoencoder."""
        return self.vae is not None or self.autoencoder is not None


class GuidanceStage(GuidanceSettings):
    """Stage one and its training."""

    train: TrainSettings = Field(description="training of stage one")
    num_validation: int = Field(256, ge=1, description="held-out samples that the relative error is measured on")


class ProgressiveStage(ProgressiveSettings):
    """Stage two and its training."""

    train: TrainSettings = Field(description="training of each rung")
    updates: dict[int, PositiveInt] = Field(
        default_factory=dict, description="step count -> updates, where they differ"
    )

    @model_validator(mode="after")
    def _check_updates(self) -> ProgressiveStage:
        strangers = sorted(set(self.updates) - set(self.ladder))
        if strangers:
            raise ValueError(
                f"updates names the step counts {strangers}, which are not in the ladder {list(self.ladder)}"
            )
        short = {steps: count for steps, count in self.updates.items() if count < self.train.warmup_updates}
        if short:
            raise ValueError(
                f"updates {short} are fewer than train.warmup_updates={self.train.warmup_updates}: the learning rate "
                f"would never be reached; set it to at most {min(short.values())}"
            )
        return self

    def rung(self, num_inference_steps: int) -> TrainSettings:
        """Return the training settings of one rung."""
        updates = self.updates.get(num_inference_steps, self.train.updates)
        return self.train.model_copy(update={"updates": updates})


class RegisterStage(StageSettings):
    """What goes into the model registry."""

    name: str = Field("fewstep", min_length=1, description="registered model; its alias champion is what is served")
    num_inference_steps: int = Field(4, ge=1, description="the student that goes under this name; others get NAME-N")
    gate: GateSettings = Field(default_factory=GateSettings, description="what a student must reach to be champion")


def settings_class(annotation: Any) -> type[BaseModel] | None:
    """Return the settings that a key of this type takes, one or a list of them; None: it takes a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for each in get_args(annotation) if (found := settings_class(each)) is not None), None)

"""What a class-conditional picture set holds, with defaults that fit its source."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fewstep.data.splits import Split

Source = Literal["idx", "digits"]

#: Where Debian's package dataset-fashion-mnist puts its files.
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

#: Of scikit-learn's 1,797 digits these many are held out, whatever the settings.
DIGITS_TRAIN, DIGITS_HELD_OUT = 1500, 297


@dataclass(frozen=True)
class _Defaults:
    class_names: tuple[str, ...]
    credit: str
    license: str
    resolution: int
    num_train: int
    num_evaluate: int


_DEFAULTS: dict[str, _Defaults] = {
    "idx": _Defaults(
        class_names=(
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
        credit="Fashion-MNIST, copyright 2017 Zalando SE",
        license="MIT",
        resolution=32,
        num_train=60_000,
        num_evaluate=10_000,
    ),
    "digits": _Defaults(
        class_names=tuple("0123456789"),
        credit="Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository",
        license="CC-BY-4.0",
        resolution=8,
        num_train=DIGITS_TRAIN,
        num_evaluate=DIGITS_HELD_OUT,
    ),
}


def _default(name: str) -> Any:
    # A source that is wrong is told by its own error; any default will do beside it.
    return lambda data: getattr(_DEFAULTS[data.get("source", "idx")], name)


def _default_of_known(name: str) -> Any:
    """Return the source's default only where the pictures are taken to be the source's own: the names are its names."""

    def default(data: dict[str, Any]) -> str:
        known = _DEFAULTS[data.get("source", "idx")]
        return str(getattr(known, name)) if data.get("class_names") == known.class_names else "unknown"

    return default


class ClassPicturesSettings(BaseModel):
    """What a set of pictures with one class each holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Source = Field(
        description="idx: Fashion-MNIST, MNIST or another set in IDX files; digits: the 1,797 of scikit-learn"
    )
    path: Path = Field(
        FASHION_MNIST,
        description="idx: folder with the IDX files, plain or .gz, named as those of MNIST; "
        "Debian's package dataset-fashion-mnist installs the default",
    )
    class_names: tuple[str, ...] = Field(
        default_factory=_default("class_names"),
        min_length=1,
        description="name of each class, by label; left out: the ten of Fashion-MNIST, or 0 to 9 for digits",
    )
    credit: str = Field(
        default_factory=_default_of_known("credit"),
        min_length=1,
        description="whose pictures these are, written into every sample; left out: that of Fashion-MNIST or the "
        "digits, or unknown when class_names are others",
    )
    license: str = Field(
        default_factory=_default_of_known("license"),
        min_length=1,
        description="licence of the pictures, written into every sample; left out: as for credit",
    )
    resolution: int = Field(
        default_factory=_default("resolution"),
        ge=8,
        le=512,
        description="side of the pictures in pixels; 28 become 32 by a border of background, everything else is "
        "resized; left out: 32, or 8 for digits",
    )
    num_train: int = Field(
        default_factory=_default("num_train"),
        ge=1,
        description="pictures to train on, from the train files; left out: 60000, or 1500 for digits, which is all",
    )
    num_evaluate: int = Field(
        default_factory=_default("num_evaluate"),
        ge=1,
        description="held-out pictures, from the t10k files; left out: 10000, or 297 for digits, which is all",
    )
    samples_per_shard: int = Field(1000, ge=1, description="samples in one tar")
    seed: int = Field(0, description="seed of the order of the pictures, and so of which are taken when not all are")

    @model_validator(mode="after")
    def _check(self) -> ClassPicturesSettings:
        names = [name.strip() for name in self.class_names]
        if "" in names or len(set(names)) < len(names):
            raise ValueError(f"class_names={list(self.class_names)}: every class needs a name, and no two the same")
        if self.source != "digits":
            return self
        if self.path != FASHION_MNIST:
            raise ValueError(f"path={str(self.path)!r} has no effect on digits: leave it out, or take source: idx")
        if len(names) != 10:
            raise ValueError(f"class_names has {len(names)} names: the digits have ten classes")
        for key, most in (("num_train", DIGITS_TRAIN), ("num_evaluate", DIGITS_HELD_OUT)):
            if getattr(self, key) > most:
                raise ValueError(f"{key}={getattr(self, key)} is more than the {most} digits of that split: lower it")
        return self

    def num_samples(self, split: Split) -> int:
        """Return how many samples the split has; alignment is empty: there are no captions to align with."""
        return {"train": self.num_train, "evaluate": self.num_evaluate, "alignment": 0}[split]


def class_names(settings: ClassPicturesSettings) -> tuple[str, ...]:
    """Return the name of each class, by label."""
    return settings.class_names

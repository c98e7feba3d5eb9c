"""Style transfer with distilled encoders and decoders, measured; for `fewstep bench translation`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fewstep.data.counts import SampleCounts
from fewstep.data.pictures import decode_picture
from fewstep.data.shards import read_index
from fewstep.data.source import iterate_samples
from fewstep.errors import DataError, RecipeError
from fewstep.evaluate import distances
from fewstep.evaluate.features import Lite0Features
from fewstep.evaluate.sheet import SheetRow, draw_sheet, evaluations_note
from fewstep.models import Condition, load_model, read_student_info
from fewstep.models.editing import LoadedModel
from fewstep.models.translation import RoundTrip, round_trip, translate
from fewstep.recipe import Recipe
from fewstep.stages.context import find_artifact, shards_uri
from fewstep.storage import Storage
from fewstep.tracking.fetch import fetch_model

_LEAST = 20


class TranslationSettings(BaseModel):
    """What is translated and measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = Field("twemoji", min_length=1, description="word of the captions to begin from")
    target: str = Field("openmoji", min_length=1, description="word that is put in its place")
    w: float = Field(1.0, ge=0, description="guidance weight of the decoder")
    count: int = Field(128, ge=_LEAST, description="held-out pictures to translate, at most")
    reference_steps: int = Field(64, ge=1, description="steps of the teacher, each way")
    num_shown: int = Field(9, ge=1, description="pictures in the grid")
    num_bootstrap: int = Field(1000, ge=100, description="draws of the intervals")
    batch_size: int = Field(64, ge=1, description="pictures at once")
    seed: int = Field(0, description="of the draws")


@dataclass(frozen=True)
class Pair:
    """What encodes and what decodes.

    Attributes:
        method: student, or ddim or teacher (the teacher's own sampler, at as many steps or at many).
        encoder, decoder: the two models.
        steps: of each.
    """

    method: str
    encoder: LoadedModel
    decoder: LoadedModel
    steps: int

    @property
    def evaluations(self) -> int:
        """Network evaluations of a translated picture: up at w = 0, down guided."""
        return self.steps * (2 if self.method == "student" else 3)


@dataclass(frozen=True)
class Pictures:
    """What is translated.

    Attributes:
        pixels: uint8 (N, 3, H, W).
        captions: what they show.
        wanted: what they are to become.
        real: held-out pictures of the target's captions, uint8 (M, 3, H, W).
    """

    pixels: Tensor
    captions: list[str]
    wanted: list[str]
    real: Tensor


@dataclass(frozen=True)
class Translated:
    """What came of it.

    Attributes:
        figures: one row a pair, JSON.
        kid_before: KID of the untranslated pictures to the real ones of the target.
        given: what was translated.
        drawn: pairs and their pictures.
    """

    figures: list[dict[str, Any]]
    kid_before: float
    given: Pictures
    drawn: list[tuple[Pair, Tensor]]

    def draw(self, count: int) -> Image.Image:
        """Return a grid of the first pictures: as they came, then each pair's."""
        groups = [[SheetRow("given", "", self.given.pixels[:count])]]
        for pair, pictures in self.drawn:
            label = f"{pair.method}, {pair.steps} + {pair.steps}"
            row = SheetRow(label, evaluations_note(pair.evaluations), pictures[:count])
            if pair.method == "ddim":
                groups[-1].append(row)  # beside the students of as many steps
            else:
                groups.append([row])
        return draw_sheet(self.given.wanted[:count], groups)


def load_pairs(recipe: Recipe, storage: Storage, settings: TranslationSettings, *, device: torch.device) -> list[Pair]:
    """Return the teacher at many steps, then the students and the teacher at each number of steps that has both kinds.

    Raises:
        RecipeError: there are none.
    """
    trained = find_artifact(recipe, storage, "progressive")
    encoded = find_artifact(recipe, storage, "convert" if "convert" in recipe.stages else "encode")
    if trained is None or encoded is None:
        raise RecipeError(f"recipe {recipe.name} has trained no students yet: run `fewstep run RECIPE` first")
    uris = {
        (student["kind"], student["num_inference_steps"]): student["uri"]
        for student in trained.facts["students"].values()
    }
    steps = sorted((n for kind, n in uris if kind == "encoder" and ("deterministic", n) in uris), reverse=True)
    if not steps:
        raise RecipeError(
            f"recipe {recipe.name} has students of the kinds {sorted({kind for kind, _ in uris})}: a translation "
            "needs encoders and decoders of one number of steps; put deterministic and encoder into progressive.kinds"
        )
    teacher = load_model(fetch_model(encoded.facts["teacher"], storage=storage, tracking=recipe.tracking)).to(device)

    def student(kind: str, n: int) -> LoadedModel:
        folder = fetch_model(uris[kind, n], storage=storage)
        return LoadedModel(load_model(folder).to(device), read_student_info(folder))

    def plain(method: str, n: int) -> Pair:
        model = LoadedModel(teacher, None, n)
        return Pair(method, model, model, n)

    pairs = [plain("teacher", settings.reference_steps)]
    for n in steps:
        pairs += [Pair("student", student("encoder", n), student("deterministic", n), n), plain("ddim", n)]
    return pairs


def read_pictures(recipe: Recipe, storage: Storage, settings: TranslationSettings, *, resolution: int) -> Pictures:
    """Return the held-out pictures whose captions have the word to replace.

    Raises:
        DataError: there are too few of them, or of the real ones of the target.
    """
    index = read_index(shards_uri(recipe, storage, "evaluate"), storage=storage)
    decode = partial(decode_picture, resolution=resolution)
    counts = SampleCounts(recipe.stream.max_bad_share)
    samples = list(iterate_samples(index.shards, storage=storage, decode=decode, counts=counts))
    word = re.compile(rf"\b{re.escape(settings.source)}\b")
    chosen = [sample for sample in samples if word.search(sample["caption"])][: settings.count]
    aim = re.compile(rf"\b{re.escape(settings.target)}\b")
    real = [sample["pixels"] for sample in samples if aim.search(sample["caption"])]
    for name, found in ((settings.source, chosen), (settings.target, real)):
        if len(found) < _LEAST:
            raise DataError(
                f"{len(found)} of the {len(samples)} held-out captions have the word {name!r}, and a figure needs "
                f"{_LEAST}: take a word that more have (--from, --to)"
            )
    return Pictures(
        pixels=torch.stack([sample["pixels"] for sample in chosen]),
        captions=[sample["caption"] for sample in chosen],
        wanted=[word.sub(settings.target, sample["caption"]) for sample in chosen],
        real=torch.stack(real),
    )


def translate_rows(pairs: list[Pair], pictures: Pictures, settings: TranslationSettings) -> Translated:
    """Return pictures and figures of each pair; the first is the reference of the others."""
    features = Lite0Features()
    real = features(pictures.real)
    draws: dict[str, Any] = {"num_bootstrap": settings.num_bootstrap, "seed": settings.seed}
    figures: list[dict[str, Any]] = []
    drawn: list[tuple[Pair, Tensor]] = []
    for pair in pairs:
        back = _batched(partial(_round_trip, pair), pictures, settings.batch_size)
        translated = torch.cat(_batched(partial(_translate, pair, settings.w), pictures, settings.batch_size))
        measured = {
            "relative_error": torch.cat([part.relative_error for part in back]).cpu(),
            "round_trip_mse": torch.cat([part.pixel_mse for part in back]),
        }
        if drawn:
            difference = (translated.double() - drawn[0][1].double()) / 255
            measured["translated_mse"] = difference.square().flatten(1).mean(1)
        estimates = {name: distances.mean_with_interval(values, **draws) for name, values in measured.items()}
        estimates["kid"] = distances.kid_with_interval(features(translated), real, **draws)
        row: dict[str, Any] = {"method": pair.method, "num_inference_steps": pair.steps}
        row["evaluations"] = pair.evaluations
        for name, estimate in estimates.items():
            row |= {name: estimate.value, f"{name}_ci": estimate.interval}
        figures.append(row)
        drawn.append((pair, translated))
    before = distances.kid(features(pictures.pixels), real)
    return Translated(figures, before, pictures, drawn)


def _batched(work: Callable[[Tensor, list[str], list[str]], Any], pictures: Pictures, batch_size: int) -> list[Any]:
    slices = [slice(start, start + batch_size) for start in range(0, len(pictures.pixels), batch_size)]
    return [work(pictures.pixels[rows], pictures.captions[rows], pictures.wanted[rows]) for rows in slices]


def _round_trip(pair: Pair, pixels: Tensor, captions: list[str], _wanted: list[str]) -> RoundTrip:
    return round_trip(
        pair.encoder,
        pair.decoder,
        pixels,
        source=_condition(pair.encoder, captions),
        target=_condition(pair.decoder, captions),
    )


def _translate(pair: Pair, w: float, pixels: Tensor, captions: list[str], wanted: list[str]) -> Tensor:
    drawn = translate(
        pair.encoder,
        pair.decoder,
        pixels,
        source=_condition(pair.encoder, captions),
        target=_condition(pair.decoder, wanted),
        w=w,
    )
    return drawn.cpu()


def _condition(model: LoadedModel, captions: list[str]) -> Condition:
    return model.parts.conditions([{"caption": caption} for caption in captions])

"""Which students are served, and which of them a request is for. Plain data: no torch, no Ray."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fewstep.errors import FewstepError
from fewstep.serve.errors import InvalidRequestError


class NotLoadedError(FewstepError):
    """A model that is to be served has no version yet."""


@dataclass(frozen=True)
class StudentCard:
    """What the outside needs to know of one loaded student: its names and what it was made for.

    Attributes:
        id: name in the API: the registered name, or the folder's.
        version: version in the registry, None when it came from elsewhere.
        width: native width in pixels.
        height: native height in pixels.
        num_inference_steps: the one step count that it was distilled for.
        w_min: smallest guidance weight it was trained on (the paper's w; guidance_scale is 1 + w).
        w_max: largest.
        w_default: what is used when a request names none.
        max_prompt_tokens: tokens of the prompt that the text encoder sees, begin and end marks not counted.
        loaded_at_s: Unix time at which it was loaded.
    """

    id: str
    version: str | None
    width: int
    height: int
    num_inference_steps: int
    w_min: float
    w_max: float
    w_default: float
    max_prompt_tokens: int
    loaded_at_s: int

    @property
    def label(self) -> str:
        """The id, with @version when there is one."""
        return self.id if self.version is None else f"{self.id}@{self.version}"

    @property
    def size(self) -> str:
        """Native size as the API writes it, WIDTHxHEIGHT."""
        return f"{self.width}x{self.height}"

    @property
    def guidance_scale_range(self) -> tuple[float, float]:
        """Smallest and largest guidance_scale."""
        return 1 + self.w_min, 1 + self.w_max

    @property
    def guidance_scale_default(self) -> float:
        """The guidance_scale when a request names none."""
        return 1 + self.w_default


@dataclass(frozen=True)
class Catalog:
    """What an engine serves at one moment.

    Attributes:
        students: the loaded ones, default first.
        waiting: URIs models:/NAME@ALIAS that name no version yet.
    """

    students: tuple[StudentCard, ...]
    waiting: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageRequest:
    """One picture to draw. None means the default of the model; `extrapolate` takes guidance outside its range."""

    prompt: str
    seed: int
    model: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    extrapolate: bool = False


@dataclass(frozen=True)
class GeneratedImage:
    """One picture, and how it was made.

    Attributes:
        pixels: (H, W, 3) uint8, RGB.
        seed: seed of its noise.
        num_inference_steps: network evaluations.
        guidance_scale: 1 + w.
        model: label of the student.
        prompt_tokens: tokens of the prompt that the text encoder saw, begin and end marks not counted.
        prompt_tokens_cut: tokens of the prompt that did not fit.
    """

    pixels: np.ndarray
    seed: int
    num_inference_steps: int
    guidance_scale: float
    model: str
    prompt_tokens: int
    prompt_tokens_cut: int


def find_models(catalog: Catalog, model: str | None) -> list[StudentCard]:
    """Return the students that answer to the name `model` (id or id@version); all of them for None.

    Raises:
        InvalidRequestError: with status 404, no student has that name.
        NotLoadedError: it has no version yet.
    """
    found = [card for card in catalog.students if model is None or model in (card.id, card.label)]
    if found:
        return found
    asked = None if model is None else model.split("@")[0]
    waited_for = [uri for uri in catalog.waiting if asked in (None, registered_name(uri))]
    others = [card for card in catalog.students if card.id == asked]
    if waited_for and not others:
        raise NotLoadedError(f"There is no version of {', '.join(waited_for)} yet: try again once one is promoted.")
    if others:
        labels = ", ".join(card.label for card in others)
        fix = f"another version is: name {labels}, or {asked} alone for whichever is current."
    else:
        names = ", ".join(
            dict.fromkeys([card.id for card in catalog.students] + list(map(registered_name, catalog.waiting)))
        )
        fix = f"leave 'model' out or use one of {names}."
    raise InvalidRequestError(
        f"The model {str(model)[:80]!r} is not served here{',' if others else ':'} {fix}",
        param="model",
        code="model_not_found",
        status=404,
    )


def registered_name(uri: str) -> str:
    """Return NAME of models:/NAME@ALIAS."""
    return uri.removeprefix("models:/").split("@")[0]


def resolve(
    catalog: Catalog,
    *,
    model: str | None,
    num_inference_steps: int | None,
    guidance_scale: float | None,
    extrapolate: bool = False,
) -> tuple[StudentCard, float]:
    """Return the student that a request is for, and its guidance_scale.

    Without a model the step count alone chooses, among all; without a step count the first candidate is taken.
    `extrapolate` takes a guidance scale outside the trained range on purpose.

    Raises:
        InvalidRequestError: unknown model, a step count that no candidate was made for, or guidance out of range.
        NotLoadedError: the model has no version yet.
    """
    candidates = find_models(catalog, model)
    if num_inference_steps is not None:
        allowed = ", ".join(str(n) for n in sorted({card.num_inference_steps for card in candidates}))
        candidates = [card for card in candidates if card.num_inference_steps == num_inference_steps]
        if not candidates:
            raise InvalidRequestError(
                f"num_inference_steps={num_inference_steps} is not what {model or 'any served student'} was made for: "
                f"use {allowed}, or leave it out.",
                param="num_inference_steps",
                code="unsupported_value",
            )
    student = candidates[0]
    if guidance_scale is None:
        return student, student.guidance_scale_default
    low, high = student.guidance_scale_range
    # One part in a million of slack: 1 + w and g − 1 do not round to the same float.
    if low - 1e-6 <= guidance_scale <= high + 1e-6:
        return student, guidance_scale
    if low == high:
        raise InvalidRequestError(
            f"guidance_scale={guidance_scale:g} has no effect on {student.id}, which was made for {low:g} alone: "
            "send that, or leave it out.",
            param="guidance_scale",
            code="unsupported_value",
        )
    if not extrapolate:
        raise InvalidRequestError(
            f"guidance_scale={guidance_scale:g} is outside {low:g} … {high:g}, the range that {student.id} was trained "
            'for: choose one in it, leave it out, or send "extrapolate": true to go beyond it on purpose.',
            param="guidance_scale",
            code="unsupported_value",
        )
    return student, guidance_scale

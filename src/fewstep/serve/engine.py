"""Draws batches of pictures with one or several students. Knows nothing of Ray or HTTP."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fewstep.errors import ModelError, SamplingError
from fewstep.models import StudentInfo, TextToImageModel, load_text_to_image, read_student_info
from fewstep.serve.catalog import GeneratedImage, ImageRequest, StudentCard, resolve
from fewstep.serve.errors import InvalidRequestError
from fewstep.serve.files import default_guidance_scale
from fewstep.serve.sample import EMPTY_PROMPT, sample_pixels
from fewstep.serve.settings import ServeSettings
from fewstep.storage import Storage
from fewstep.tracking.fetch import fetch_model
from fewstep.tracking.registry import Registry
from fewstep.tracking.settings import TrackingSettings
from fewstep.tracking.tracker import Tracker

logger = logging.getLogger("fewstep.serve")

_NETWORKS = ("vae", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Student:
    """A loaded student: its card, its networks, and what it was made for, which says how it is sampled."""

    card: StudentCard
    parts: TextToImageModel
    info: StudentInfo


class Engine:
    """Students on one device, ready to draw.

    Args:
        students: the first is the default. Their step counts within one model id must differ.
        max_batch_size: most pictures that go through the network at once.
        pad_batches: fill every batch to `max_batch_size` rows. A batch of another size goes through other kernels, so
            without it the last bits of a picture depend on how many are drawn beside it.
    """

    def __init__(self, students: Sequence[Student], *, max_batch_size: int = 8, pad_batches: bool = False) -> None:
        self.students = list(students)
        self.catalog = [student.card for student in self.students]
        self.max_batch_size = max_batch_size
        self.pad_batches = pad_batches
        #: How many batches of each size (padding not counted) went through a network.
        self.batch_sizes: Counter[int] = Counter()
        names = Counter((card.id, card.num_inference_steps) for card in self.catalog)
        for (model_id, steps), count in names.items():
            if count > 1:
                raise ModelError(
                    f"{count} of the served models are called {model_id!r} and made for {steps} steps, so that "
                    "no request could tell them apart: serve one of them, or register them under different names"
                )
        _share_equal_networks([student.parts for student in self.students])

    def check(self, request: ImageRequest) -> Student:
        """Return the student that a request is for.

        Raises:
            InvalidRequestError: empty prompt, unknown model, or steps or guidance that it was not made for.
        """
        if not request.prompt.strip():
            raise InvalidRequestError(EMPTY_PROMPT, param="prompt", code="empty_prompt")
        card, _ = resolve(
            self.catalog,
            model=request.model,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            extrapolate=request.extrapolate,
        )
        return self.students[self.catalog.index(card)]

    def generate(self, requests: Sequence[ImageRequest]) -> list[GeneratedImage]:
        """Return one picture per request, in order. Requests for the same student run as one batch.

        Each picture's noise, a stochastic student's too, comes from a CPU generator with its own seed, (C, H, W), as in
        diffusers with a list of generators, so it does not depend on its batch-mates.

        Raises:
            InvalidRequestError: as in `check`; nothing is drawn then.
        """
        groups: dict[int, list[int]] = {}
        for position, request in enumerate(requests):
            groups.setdefault(self.students.index(self.check(request)), []).append(position)
        images: dict[int, GeneratedImage] = {}
        for student_index, positions in groups.items():
            for start in range(0, len(positions), self.max_batch_size):
                chunk = positions[start : start + self.max_batch_size]
                drawn = self._draw(self.students[student_index], [requests[position] for position in chunk])
                images.update(zip(chunk, drawn, strict=True))
        return [images[position] for position in range(len(requests))]

    def _draw(self, student: Student, requests: Sequence[ImageRequest]) -> list[GeneratedImage]:
        card, parts = student.card, student.parts
        self.batch_sizes[len(requests)] += 1
        guidance = [card.guidance_scale_default if r.guidance_scale is None else r.guidance_scale for r in requests]
        padding = self.max_batch_size - len(requests) if self.pad_batches else 0
        prompts = [request.prompt for request in requests] + [requests[-1].prompt] * padding
        seeds = [request.seed for request in requests] + [requests[-1].seed] * padding
        w = torch.tensor(guidance + [guidance[-1]] * padding, dtype=torch.float32) - 1
        pixels = sample_pixels(
            parts, prompts=prompts, seeds=seeds, w=w, num_inference_steps=card.num_inference_steps, info=student.info
        )
        images = pixels[: len(requests)].permute(0, 2, 3, 1).cpu().numpy()
        result = []
        for request, g, image in zip(requests, guidance, images, strict=True):
            tokens = len(parts.tokenizer(request.prompt, add_special_tokens=False, verbose=False)["input_ids"])
            result.append(
                GeneratedImage(
                    pixels=np.ascontiguousarray(image),
                    seed=request.seed,
                    num_inference_steps=card.num_inference_steps,
                    guidance_scale=g,
                    model=card.label,
                    prompt_tokens=min(tokens, card.max_prompt_tokens),
                    prompt_tokens_cut=max(tokens - card.max_prompt_tokens, 0),
                )
            )
        return result


def load_student(
    uri: str, *, storage: Storage | None, tracking: TrackingSettings, dtype: torch.dtype = torch.float32
) -> Student:
    """Return the student that a model URI names, on the CPU.

    Raises:
        ModelError: it cannot be had, it is no student for one step count, or one that is not sampled from noise with
            one evaluation a step.
    """
    version = None
    if uri.startswith("models:"):
        tracker = Tracker.open(tracking, storage)
        registered = Registry(tracker).get(uri)
        # By its number from here on: the alias may move between two calls.
        folder = fetch_model(registered.uri, storage=storage, tracking=tracker)
        model_id, version = registered.name, str(registered.version)
    else:
        folder = fetch_model(uri, storage=storage, tracking=tracking)
        model_id = uri.rstrip("/").removeprefix("asset:").rsplit("/", 1)[-1]
    info = read_student_info(folder)
    if info is None or info.num_inference_steps is None:
        what = "a teacher, or made by other hands" if info is None else "of stage one, for any step count"
        raise ModelError(
            f"{uri} is no few-step student ({what}): serve what the progressive stage made; "
            "`fewstep sample` draws with the others"
        )
    try:
        info.check_kind("serving", "deterministic", "stochastic")
    except SamplingError as error:
        raise ModelError(f"{uri} cannot be served: {error}") from error
    parts = load_text_to_image(folder, dtype=dtype)
    return Student(make_card(model_id, parts, info, version=version), parts, info)


def make_card(model_id: str, parts: TextToImageModel, info: StudentInfo, *, version: str | None = None) -> StudentCard:
    """Return the card of a loaded student that was made for one step count."""
    assert info.num_inference_steps is not None
    _, height, width = parts.latent_shape
    return StudentCard(
        id=model_id,
        version=version,
        width=width * parts.vae_scale_factor,
        height=height * parts.vae_scale_factor,
        num_inference_steps=info.num_inference_steps,
        w_min=info.w_min,
        w_max=info.w_max,
        w_default=default_guidance_scale(info, None) - 1,
        max_prompt_tokens=parts.tokenizer.model_max_length - 2,
        loaded_at_s=int(time.time()),
    )


def load_engine(settings: ServeSettings, *, storage: Storage | None, tracking: TrackingSettings) -> Engine:
    """Return an engine with the models of `settings` on this process's device, in the precision set.

    Raises:
        ModelError: a model cannot be had or is no student.
        StorageError, TrackingError: the store or the registry cannot be reached.
    """
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = settings.dtype if settings.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    dtype: torch.dtype = getattr(torch, name)
    students = [load_student(uri, storage=storage, tracking=tracking, dtype=dtype) for uri in settings.models]
    engine = Engine(students, max_batch_size=settings.max_batch_size, pad_batches=settings.pad_batches)
    for student in engine.students:
        student.parts.to(device)
        logger.info(
            "loaded %s for %d steps, %s on %s", student.card.label, student.card.num_inference_steps, name, device
        )
    return engine


def _share_equal_networks(students: Sequence[TextToImageModel]) -> None:
    """Let students of one family use the first one's VAE and text encoders, where all weights are equal."""
    for position, parts in enumerate(students):
        for name in (name for name in _NETWORKS if hasattr(parts, name)):
            own = getattr(parts, name)
            for earlier in students[:position]:
                if hasattr(earlier, name) and _equal(own, getattr(earlier, name)):
                    setattr(parts, name, getattr(earlier, name))
                    break


def _equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(
        first[key].shape == second[key].shape and torch.equal(first[key], second[key]) for key in first
    )

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
from fewstep.serve.catalog import Catalog, GeneratedImage, ImageRequest, StudentCard, resolve
from fewstep.serve.errors import InvalidRequestError
from fewstep.serve.files import default_guidance_scale
from fewstep.serve.sample import EMPTY_PROMPT, sample_latents, sample_pixels
from fewstep.serve.settings import ServeSettings
from fewstep.serve.watch import EngineWatch
from fewstep.storage import Storage
from fewstep.tracking.fetch import fetch_model
from fewstep.tracking.registry import Registry
from fewstep.tracking.settings import TrackingSettings
from fewstep.tracking.tracker import Tracker

logger = logging.getLogger("fewstep.serve")

_NETWORKS = ("vae", "text_encoder", "text_encoder_2")


@dataclass(frozen=True, eq=False)
class Student:
    """A loaded student: its card, its networks, and what it was made for, which says how it is sampled."""

    card: StudentCard
    parts: TextToImageModel
    info: StudentInfo


@dataclass(frozen=True)
class _Served:
    students: tuple[Student, ...]
    catalog: Catalog


class Engine:
    """Students on one device, ready to draw.

    What is served may be replaced by another thread at any time: a picture is drawn by the student that `check`
    returned for it, and a student lives for as long as one of its pictures is still to be drawn.

    Args:
        students: the first is the default. Their step counts within one model id must differ.
        waiting: URIs of models that have no version yet.
        max_batch_size: most pictures that go through the network at once.
        pad_batches: fill every batch to `max_batch_size` rows. A batch of another size goes through other kernels, so
            without it the last bits of a picture depend on how many are drawn beside it.
        watch: told of every batch.
    """

    def __init__(
        self,
        students: Sequence[Student],
        *,
        waiting: Sequence[str] = (),
        max_batch_size: int = 8,
        pad_batches: bool = False,
        watch: EngineWatch | None = None,
    ) -> None:
        self.max_batch_size = max_batch_size
        self.pad_batches = pad_batches
        #: How many batches of each size (padding not counted) went through a network.
        self.batch_sizes: Counter[int] = Counter()
        self._watch = watch or EngineWatch()
        for position, student in enumerate(students):
            _share_equal_networks(student.parts, [earlier.parts for earlier in students[:position]])
        self.install(students, waiting=waiting)

    @property
    def students(self) -> tuple[Student, ...]:
        """What is served now, default first."""
        return self._served.students

    @property
    def catalog(self) -> Catalog:
        """The cards of what is served now, and what has no version yet."""
        return self._served.catalog

    def install(self, students: Sequence[Student], *, waiting: Sequence[str] = ()) -> None:
        """Serve these students from now on, in one step.

        Raises:
            ModelError: two of them have the same id and step count; what was served stays.
        """
        names = Counter((student.card.id, student.card.num_inference_steps) for student in students)
        for (model_id, steps), count in names.items():
            if count > 1:
                raise ModelError(
                    f"{count} of the served models are called {model_id!r} and made for {steps} steps, so that "
                    "no request could tell them apart: serve one of them, or register them under different names"
                )
        cards = tuple(student.card for student in students)
        self._served = _Served(tuple(students), Catalog(cards, tuple(waiting)))

    def adopt(self, student: Student, device: torch.device) -> None:
        """Move a student that is not served yet to the device; it uses networks of served ones that equal its own."""
        _share_equal_networks(student.parts, [served.parts for served in self.students])
        student.parts.to(device)

    def check(self, request: ImageRequest) -> Student:
        """Return the student that a request is for.

        Raises:
            InvalidRequestError: empty prompt, unknown model, or steps or guidance that it was not made for.
            NotLoadedError: the model has no version yet.
        """
        if not request.prompt.strip():
            raise InvalidRequestError(EMPTY_PROMPT, param="prompt", code="empty_prompt")
        served = self._served
        card, _ = resolve(
            served.catalog,
            model=request.model,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            extrapolate=request.extrapolate,
        )
        return served.students[served.catalog.students.index(card)]

    def generate(self, requests: Sequence[ImageRequest]) -> list[GeneratedImage]:
        """Return one picture per request, in order, each by the student that `check` gives now.

        Raises:
            InvalidRequestError, NotLoadedError: as in `check`; nothing is drawn then.
        """
        return self.draw([(self.check(request), request) for request in requests])

    def draw(self, jobs: Sequence[tuple[Student, ImageRequest]]) -> list[GeneratedImage]:
        """Return one picture per job, in order. Jobs of the same student run as one batch.

        Each picture's noise, a stochastic student's too, comes from a CPU generator with its own seed, (C, H, W), as in
        diffusers with a list of generators, so it does not depend on its batch-mates.
        """
        groups: dict[Student, list[int]] = {}
        for position, (student, _) in enumerate(jobs):
            groups.setdefault(student, []).append(position)
        images: dict[int, GeneratedImage] = {}
        for student, positions in groups.items():
            for start in range(0, len(positions), self.max_batch_size):
                chunk = positions[start : start + self.max_batch_size]
                began_s = time.perf_counter()
                drawn = self._draw(student, [jobs[position][1] for position in chunk])
                self._watch.drew(student.card, batch_size=len(chunk), seconds=time.perf_counter() - began_s)
                images.update(zip(chunk, drawn, strict=True))
        return [images[position] for position in range(len(jobs))]

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


def load_engine(
    settings: ServeSettings,
    *,
    storage: Storage | None,
    tracking: TrackingSettings,
    uris: Sequence[str] | None = None,
    watch: EngineWatch | None = None,
) -> Engine:
    """Return an engine with models on this process's device, in the precision set; each has drawn a smoke picture.

    Args:
        settings: the service.
        storage, tracking: where models come from.
        uris: those of its models that are loaded; all of them when nothing is said.
        watch: told of every batch.

    Raises:
        ModelError: a model cannot be had, is no student, or cannot draw.
        StorageError, TrackingError: the store or the registry cannot be reached.
    """
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    device, dtype = placement(settings)
    uris = settings.models if uris is None else uris
    students = [load_student(uri, storage=storage, tracking=tracking, dtype=dtype) for uri in uris]
    engine = Engine(students, max_batch_size=settings.max_batch_size, pad_batches=settings.pad_batches, watch=watch)
    for student in engine.students:
        student.parts.to(device)
        try_out(student, max_batch_size=settings.max_batch_size)
        logger.info(
            "loaded %s for %d steps, %s on %s", student.card.label, student.card.num_inference_steps, dtype, device
        )
    return engine


def placement(settings: ServeSettings) -> tuple[torch.device, torch.dtype]:
    """Return the device and the precision of the networks."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = settings.dtype if settings.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return device, dtype


@torch.inference_mode()
def try_out(student: Student, *, max_batch_size: int = 1) -> None:
    """Draw a smoke picture, which warms the device up too; on a GPU also a batch of the largest size.

    Raises:
        ModelError: the latents are not finite, or the picture has another size than the card says or is one flat
            colour, as is what a VAE makes that overflows.
    """
    card, parts = student.card, student.parts
    for count in {1, max_batch_size if parts.device.type == "cuda" else 1}:
        latents = sample_latents(
            parts,
            prompts=["a red apple"] * count,
            seeds=range(count),
            num_inference_steps=card.num_inference_steps,
            w=torch.full((count,), card.guidance_scale_default - 1, dtype=torch.float32),
            info=student.info,
        )
        if not torch.isfinite(latents).all():
            raise ModelError(
                f"{card.label} cannot be served: its smoke picture is not finite. Train or export it again"
            )
        pixels = parts.decode(latents)
        if tuple(pixels.shape) != (count, 3, card.height, card.width):
            raise ModelError(
                f"{card.label} cannot be served: its smoke picture has the shape {tuple(pixels.shape)[1:]} and not "
                f"{(3, card.height, card.width)}, as its configuration says. Train or export it again"
            )
        if pixels[0].min() == pixels[0].max():
            raise ModelError(
                f"{card.label} cannot be served: its smoke picture is one flat colour. Train or export it again, or "
                "serve it with dtype float32"
            )


def _share_equal_networks(parts: TextToImageModel, others: Sequence[TextToImageModel]) -> None:
    """Let a student use the VAE and text encoders of the first of the others whose weights are all equal."""
    for name in (name for name in _NETWORKS if hasattr(parts, name)):
        own = getattr(parts, name)
        for other in others:
            if hasattr(other, name) and _equal(own, getattr(other, name)):
                setattr(parts, name, getattr(other, name))
                break


def _equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    if first.keys() != second.keys() or any(_kind(first[key]) != _kind(second[key]) for key in first):
        return False
    # Tensor by tensor: a new student may still be on the CPU, and a copy of all of a network need not fit.
    return all(torch.equal(first[key].to(second[key].device), second[key]) for key in first)


def _kind(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype

"""The teacher as workers get it, and the objectives that have its encoders make latents and embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from fewstep.distill import Objective
from fewstep.distill.from_pictures import FromPictures, PictureEncoders
from fewstep.distill.tokens import FromTokens, TextEncoders
from fewstep.models import Parts, load_model
from fewstep.stages.batches import SampleFormat
from fewstep.storage import Storage
from fewstep.tracking.fetch import fetch_model
from fewstep.tracking.settings import TrackingSettings


@dataclass(frozen=True)
class TeacherSource:
    """Where a worker, on whatever machine, gets the teacher from."""

    uri: str
    storage: Storage
    tracking: TrackingSettings

    def load(self) -> Parts:
        """Return the teacher's parts, fetched if this machine does not have them."""
        return load_model(fetch_model(self.uri, storage=self.storage, tracking=self.tracking))


def told_of(
    objective: Callable[[torch.device], Objective], source: TeacherSource, samples: SampleFormat
) -> Callable[[torch.device], Objective]:
    """Return what makes the objective for samples of this format: where they are pictures or have token ids, one that
    makes the latents or the text embeddings itself."""
    if samples.encoded is not None:
        return partial(_from_pictures, objective, source, samples.encoded == "bfloat16")
    return partial(_from_tokens, objective, source) if samples.has_token_ids else objective


def _from_tokens(
    objective: Callable[[torch.device], Objective], source: TeacherSource, device: torch.device
) -> Objective:
    return FromTokens(objective(device), TextEncoders(source.load()).to(device))


def _from_pictures(
    objective: Callable[[torch.device], Objective], source: TeacherSource, bfloat16: bool, device: torch.device
) -> Objective:
    return FromPictures(objective(device), PictureEncoders(source.load()).to(device), bfloat16=bfloat16)

"""A tiny teacher, batches of it, and a way to see what a network was called with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.diffusion import RowRandom
from fewstep.distill.objective import Batch
from fewstep.models import TextToImageParts, make_student
from tiny import CAPTIONS, tiny_teacher


@dataclass
class Calls:
    """What a network was called with and gave, call by call."""

    args: list[tuple[Any, ...]] = field(default_factory=list)
    kwargs: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.args)


@pytest.fixture
def watch() -> Iterator[Callable[[nn.Module], Calls]]:
    """Return a function that records the calls of a network until the test ends."""
    hooks = []

    def start(network: nn.Module) -> Calls:
        calls = Calls()

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls.args.append(args)
            calls.kwargs.append(kwargs)
            calls.outputs.append(output[0] if isinstance(output, tuple) else getattr(output, "sample", output))

        hooks.append(network.register_forward_hook(record, with_kwargs=True))
        return calls

    yield start
    for hook in hooks:
        hook.remove()


@pytest.fixture
def teacher() -> TextToImageParts:
    return tiny_teacher()


@pytest.fixture
def null_embedding(teacher: TextToImageParts) -> Tensor:
    return teacher.encode_prompts([""])


@pytest.fixture
def batch(teacher: TextToImageParts) -> Batch:
    """Four rows of made latents with the text embeddings of real captions."""
    generator = torch.Generator().manual_seed(0)
    return {
        "latent_mean": torch.randn(4, 4, 4, 4, generator=generator),
        "latent_std": torch.full((4, 4, 4, 4), 0.1),
        "text": teacher.encode_prompts(CAPTIONS),
    }


@pytest.fixture
def w_teacher(teacher: TextToImageParts) -> Any:
    """A w-conditioned U-Net whose w input has an effect: a teacher of stage two."""
    unet = make_student(teacher.unet, embedding_dim=16)
    torch.manual_seed(1)
    torch.nn.init.normal_(unet.time_embedding.cond_proj.weight, std=0.5)
    return unet


@pytest.fixture
def loss_after() -> Callable[..., tuple[float, float]]:
    """Return a function that gives the loss before and after some AdamW updates on the same rows, times and noise."""

    def train(
        objective: Any, batch: Batch, random: Callable[[], RowRandom], *, updates: int, learning_rate: float
    ) -> tuple[float, float]:
        optimiser = torch.optim.AdamW(objective.network.parameters(), lr=learning_rate)
        losses = []
        for _ in range(updates + 1):
            loss, _ = objective.loss(objective.network, batch, random())
            losses.append(float(loss.detach()))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return losses[0], losses[-1]

    return train

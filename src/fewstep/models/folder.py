"""Reading the networks of a diffusers folder, with what is missing or damaged told in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.logging import disable_progress_bar as disable_diffusers_bars
from transformers.utils.logging import disable_progress_bar as disable_transformers_bars

from fewstep.errors import ModelError

# Bars for files that load in a blink would bury the progress that matters.
disable_transformers_bars()
disable_diffusers_bars()

#: Longest sequence of latent pixels for which the plain attention product is the faster one on a CPU.
_SMALL_SEQUENCE = 1024


def check_components(folder: Path, needed: Mapping[str, str], *, what: str) -> None:
    """Refuse a folder without the sub-folders that a family needs.

    Args:
        folder: the model.
        needed: name of the sub-folder -> what it is, in words.
        what: the kind of model, in words.

    Raises:
        ModelError: naming those that are missing.
    """
    missing = [f"{name}/ ({words})" for name, words in needed.items() if not (folder / name).is_dir()]
    if missing:
        raise ModelError(
            f"the model folder {folder} lacks {', '.join(missing)}. {what} needs "
            f"{', '.join(needed)}: save the whole pipeline, not the U-Net alone"
        )


def read_scheduler(folder: Path) -> dict[str, Any]:
    """Return the scheduler's configuration of a model folder."""
    config: dict[str, Any] = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    return config


def load_network(kind: Any, folder: Path, **settings: Any) -> Any:
    """Return a network of a diffusers or transformers class, read from its folder.

    Raises:
        ModelError: the file lacks weights.
    """
    # Both libraries fill what a file lacks with random numbers and a warning: a picture of noise, much later.
    network, report = kind.from_pretrained(str(folder), output_loading_info=True, **settings)
    lacking = sorted(report["missing_keys"])
    if lacking:
        raise ModelError(
            f"the weights in {folder} lack {len(lacking)} tensors of a {kind.__name__}, {lacking[0]} for one: "
            "the file is incomplete or of another kind of network; save the model again"
        )
    if hasattr(network, "register_to_config"):
        # diffusers would write where the network was read from, a folder of this machine, into every copy.
        network.register_to_config(_name_or_path=None)
    return network


def choose_attention(height: int, width: int) -> None:
    """Take the faster attention of this machine for pictures or latents of a size."""
    # For a few dozen tokens torch's CPU flash kernel, one small product at a time inside a parallel region, halves the
    # speed of the whole training; for long sequences it saves the memory of the full attention matrix.
    if not torch.cuda.is_available() and height * width <= _SMALL_SEQUENCE:
        torch.backends.cuda.enable_flash_sdp(False)  # despite its name the switch of the CPU kernel too

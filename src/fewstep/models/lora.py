"""Students of low-rank adapters (LoRA): trained beside a frozen U-Net, and saved so that diffusers puts them on it.

A student's folder holds both forms: the adapters alone, `pytorch_lora_weights.safetensors`, and under `unet/` the
network with them merged in. So `load_lora_weights(folder)` of a pipeline over the base gives the student, and so does
whatever reads the folder as a model: the next rung, the evaluation, the service, `from_pretrained`. None of these needs
the base or the package peft.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.errors import ModelError
from fewstep.models.architecture import unet_like

#: The name that diffusers looks for in a folder.
ADAPTER_FILE = "pytorch_lora_weights.safetensors"

#: All linear and convolutional layers inside the blocks: what LCM-LoRA adapts (Luo et al. 2023; diffusers'
#: `train_lcm_distill_lora_sd_wds.py`).
TARGET_MODULES = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)

_ADAPTER = "default"
_PREFIX = "unet."
_METADATA = "lora_adapter_metadata"


class LoraSettings(BaseModel):
    """Low-rank adapters: W x becomes W x + (alpha/rank) B A x, and only A and B are trained (Hu et al. 2022)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(64, ge=1, description="rank of the adapters; 64 is LCM-LoRA's")
    alpha: float | None = Field(None, gt=0, description="the adapters' part is scaled by alpha/rank; null: the rank")
    target_modules: tuple[str, ...] = Field(
        TARGET_MODULES,
        min_length=1,
        description="layers of the U-Net that get adapters, by the ends of their names; LCM-LoRA's",
    )

    @model_validator(mode="after")
    def _check(self) -> LoraSettings:
        new = [name for name in self.target_modules if "cond_proj" in name]
        if new:
            raise ValueError(
                f"target_modules names {new[0]}, the projection of w, which the base does not have: adapters add to a "
                "layer of the base; leave it out"
            )
        return self

    @property
    def scale(self) -> float:
        """alpha/rank."""
        return (self.rank if self.alpha is None else self.alpha) / self.rank


def check_peft() -> None:
    """Refuse to train adapters without the package that makes them.

    Raises:
        ModelError: peft is not installed.
    """
    if find_spec("peft") is None:
        raise ModelError(
            "lora needs the package peft, which is not installed: pip install 'fewstep[lora]', on the workers too; or "
            "leave lora out to train the whole network"
        )


def lora_student(base: Any, settings: LoraSettings, *, start: Path | str | None = None) -> Any:
    """Return a copy of a U-Net with trainable adapters; all else in it is frozen, and dropout is off.

    Args:
        base: the U-Net to adapt; a w-conditioned one keeps its projection of w as it is.
        settings: of the adapters.
        start: folder of a student with adapters on the same base, to go on from; None: adapters that add nothing yet.

    Raises:
        ModelError: peft is not installed; the network is no U-Net; no layer has such a name; or the adapters to start
            from are others.
    """
    check_peft()
    if not hasattr(base, "add_adapter"):
        raise ModelError(
            f"lora puts adapters on U-Nets, and diffusers cannot put any on a {type(base).__name__}: leave lora out to "
            "train the whole network"
        )
    from peft import LoraConfig
    from peft.utils.save_and_load import set_peft_model_state_dict

    student = unet_like(base, dropout=0.0)
    student.load_state_dict(base.state_dict())
    student.requires_grad_(False)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank * settings.scale,  # type: ignore[arg-type]  # peft divides by the rank
        target_modules=list(settings.target_modules),
    )
    try:
        student.add_adapter(config, adapter_name=_ADAPTER)
    except ValueError as error:
        raise ModelError(
            f"target_modules={list(settings.target_modules)} cannot be adapted in this U-Net: {error}"
        ) from error
    if start is not None:
        weights, described = _read(Path(start))
        wanted = _description(settings)
        if described != wanted:
            differs = next(key for key in wanted if described.get(key) != wanted[key])
            raise ModelError(
                f"the adapters in {start} have {differs}={described.get(differs)}, and lora asks for "
                f"{wanted[differs]}: adapters go on from the rung before as they are; name the same settings in both"
            )
        result: Any = set_peft_model_state_dict(student, weights, adapter_name=_ADAPTER)
        if result.unexpected_keys:
            raise ModelError(
                f"the adapters in {start} are those of another U-Net: there is no {result.unexpected_keys[0]} in it"
            )
    return student.train()


def has_adapters(network: nn.Module) -> bool:
    """Return whether a network is one of `lora_student`."""
    return _ADAPTER in getattr(network, "peft_config", {})


def merged(student: Any) -> Any:
    """Return a copy of a student with its adapters added to the weights: an ordinary U-Net with the base's names."""
    network = copy.deepcopy(student)
    network.fuse_lora()
    network.unload_lora()
    return network


def save_adapters(student: Any, folder: Path | str) -> None:
    """Write a student's adapters as the file that diffusers' `load_lora_weights(folder)` reads, alpha included."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from peft.utils.save_and_load import get_peft_model_state_dict

    config = student.peft_config[_ADAPTER]
    weights = get_peft_model_state_dict(student, adapter_name=_ADAPTER)
    settings = LoraSettings(
        rank=config.r, alpha=float(config.lora_alpha), target_modules=tuple(sorted(config.target_modules))
    )
    StableDiffusionPipeline.save_lora_weights(
        str(folder),
        unet_lora_layers={name: weight.contiguous() for name, weight in weights.items()},
        unet_lora_adapter_metadata=_description(settings),
    )


def adapters_in(folder: Path | str) -> Path | None:
    """Return the file of a student's adapters, or None where the folder holds none."""
    file = Path(folder) / ADAPTER_FILE
    return file if file.is_file() else None


def _description(settings: LoraSettings) -> dict[str, Any]:
    """Return what diffusers makes peft's configuration from."""
    return {
        "r": settings.rank,
        "lora_alpha": settings.rank * settings.scale,
        "target_modules": sorted(settings.target_modules),
    }


def _read(folder: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Return adapters by peft's names, and what describes them.

    Raises:
        ModelError: there are none, or not ours.
    """
    file = adapters_in(folder)
    if file is None:
        raise ModelError(f"{folder} holds no {ADAPTER_FILE}: it is not the folder of a student of adapters")
    with safe_open(file, "pt") as opened:
        described = json.loads((opened.metadata() or {}).get(_METADATA, "{}"))
    weights = {name.removeprefix(_PREFIX): weight for name, weight in load_file(file).items()}
    return weights, {key.removeprefix(_PREFIX): value for key, value in described.items()}

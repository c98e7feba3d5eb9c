"""What a model is made of, without its weights: shipped shapes, and the configurations of a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from fewstep.errors import ModelError

#: A network or scheduler as its folder describes itself.
Component = dict[str, Any]

_SHIPPED = Path(str(files("fewstep"))) / "plan" / "shapes"
_NETWORKS = ("unet", "transformer")
_TIME_IDS = 6


@dataclass(frozen=True)
class Shape:
    """The sizes of a model.

    Attributes:
        name: a shipped shape's name, or the folder's.
        components: configurations by the sub-folder that they lie in: unet or transformer, vae, text_encoder,
            text_encoder_2, scheduler.
        about: what it is, in words.
        num_train: training samples of the data set that it is for, where that is a known one.
        class_tokens: tokens that stand for a class where the network attends to classes.
        prompt_tokens: longest prompt; None: what the text encoder takes.
    """

    name: str
    components: Mapping[str, Component]
    about: str = ""
    num_train: int | None = None
    class_tokens: int = 0
    prompt_tokens: int | None = None

    @cached_property
    def network(self) -> Component:
        """The denoising network."""
        return next(self.components[name] for name in _NETWORKS if name in self.components)

    @property
    def vae(self) -> Component | None:
        """The autoencoder; None for a model in pixels."""
        return self.components.get("vae")

    @property
    def text_encoders(self) -> tuple[Component, ...]:
        """The text encoders; empty for a model of classes."""
        names = ("text_encoder", "text_encoder_2")
        return tuple(self.components[name] for name in names if name in self.components)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of what is diffused."""
        network = self.network
        # A U-Net for inpainting takes more channels than are diffused, a DiT may put out more (a variance).
        channels = network["in_channels"] if "patch_size" in network else network["out_channels"]
        size = network["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return channels, height, width

    @property
    def resolution(self) -> int:
        """Side of the pictures in pixels."""
        side = self.sample_shape[1]
        return side if self.vae is None else side * 2 ** (len(self.vae["block_out_channels"]) - 1)

    @property
    def pixel_bytes(self) -> int:
        """Bytes of a sample's picture when it is decoded, uint8; with its hole, a byte a pixel, for inpainting."""
        planes = 4 if "masked_latents" in self.conditions else 3
        return planes * self.resolution**2

    @property
    def attended(self) -> tuple[int, int] | None:
        """(tokens, width) of what the network attends to; None when it does not."""
        blocks = [*self.network.get("down_block_types", ()), str(self.network.get("mid_block_type", _CROSS))]
        if "patch_size" in self.network or not any("CrossAttn" in block for block in blocks):
            return None
        encoders = self.text_encoders
        tokens = self.class_tokens or self.prompt_tokens or encoders[0]["max_position_embeddings"]
        return tokens, self.network["cross_attention_dim"]

    @property
    def conditions(self) -> dict[str, tuple[int, ...]]:
        """What the network is told of a sample, as the latent shards keep it: name -> shape."""
        told: dict[str, tuple[int, ...]] = {}
        channels, height, width = self.sample_shape
        network = self.network
        if self.attended is not None:
            told["text"] = self.attended
        if network.get("addition_embed_type") == "text_time":
            told["pooled"] = (self.pooled_width,)
            told["time_ids"] = (_TIME_IDS,)
        if network.get("num_class_embeds") or network.get("num_embeds_ada_norm"):
            told["label"] = ()
        if "patch_size" not in network and network["in_channels"] == 2 * channels + 1:
            told["mask"] = (1, height, width)
            told["masked_latents"] = (channels, height, width)
        return told

    @property
    def pooled_width(self) -> int:
        """Numbers of the pooled text of a model that takes it (SDXL)."""
        return int(
            self.network["projection_class_embeddings_input_dim"] - _TIME_IDS * self.network["addition_time_embed_dim"]
        )


_CROSS = "UNetMidBlock2DCrossAttn"

#: Names of conditions that latent shards keep as whole numbers of 8 bytes; the others are float16.
WHOLE_NUMBERS = frozenset({"label", "time_ids"})


def shipped_shapes() -> dict[str, Shape]:
    """Return the shapes that fewstep ships, by name."""
    return {file.stem: _from_file(file) for file in sorted(_SHIPPED.glob("*.json"))}


def shape_of_teacher(uri: str) -> Shape | None:
    """Return the shipped shape of a teacher that goes by this name: a hub id, or the last part of another address."""
    for file in sorted(_SHIPPED.glob("*.json")):
        names = json.loads(file.read_text(encoding="utf-8"))["teachers"]
        if uri in names or ("://" in uri and uri.rstrip("/").rsplit("/", 1)[-1] in names):
            return _from_file(file)
    return None


def shape_of_folder(folder: Path) -> Shape:
    """Return the shape of a model folder; it needs no weights, only the configurations.

    Raises:
        ModelError: a configuration is missing or damaged.
    """
    components: dict[str, Component] = {}
    try:
        for file in sorted(folder.glob("*/*config.json")):
            if file.name in ("config.json", "scheduler_config.json"):
                components[file.parent.name] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"the configurations in {folder} cannot be read: {error}") from error
    network = next((components[name] for name in _NETWORKS if name in components), None)
    if network is None or "scheduler" not in components:
        raise ModelError(
            f"{folder} has no unet/config.json (or transformer/config.json) and scheduler/scheduler_config.json: name "
            "a diffusers folder (its weights are not needed), or a shipped shape"
        )
    for name, component in components.items():
        if name.startswith("text_encoder"):
            component.setdefault("_class_name", (component.get("architectures") or ["CLIPTextModel"])[0])
    return Shape(name=folder.name, components=components, about="its own configurations")


def _from_file(file: Path) -> Shape:
    content = json.loads(file.read_text(encoding="utf-8"))
    return Shape(
        name=file.stem,
        components=content["components"],
        about=content["about"],
        num_train=content.get("num_train"),
        class_tokens=content.get("class_tokens", 0),
    )

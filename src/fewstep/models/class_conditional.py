"""Class to picture: what such models share, and those of a UNet2DConditionModel, in pixels or in latents."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from fewstep.diffusion.cosine import CosineSchedule
from fewstep.diffusion.schedulers import CosineDDIMScheduler
from fewstep.errors import ModelError
from fewstep.models.class_pipeline import ClassConditionalPipeline
from fewstep.models.denoiser import Condition, Denoiser
from fewstep.models.folder import check_components, choose_attention, load_network, read_scheduler
from fewstep.models.latent import scaled_posterior
from fewstep.models.parts import Parts, pixels_of

#: The continuous cosine schedule of the paper's pixel models, with v-prediction.
COSINE_CONFIG: dict[str, Any] = {
    "_class_name": CosineSchedule.scheduler_class_name,
    "logsnr_min": -20.0,
    "logsnr_max": 20.0,
    "prediction_type": "v_prediction",
    "clip_sample": True,
    "stochastic": False,
}


class ClassArchitecture(BaseModel):
    """Sizes of a class-conditional U-Net."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_classes: int = Field(10, ge=1, description="classes; the network gets one more, for no class")
    resolution: int = Field(32, ge=4, description="side of the pictures in pixels")
    channels: int = Field(3, description="channels of the pictures: 3, or 1 for grey ones")
    block_out_channels: tuple[int, ...] = Field((64, 128, 128), description="channels from full to lowest resolution")
    layers_per_block: int = Field(1, ge=1, description="residual layers per resolution")
    attention_from_level: int = Field(2, ge=0, description="first resolution with self-attention, 0 is the highest")
    attention_head_dim: int = Field(32, ge=1, description="channels of an attention head")
    norm_num_groups: int = Field(16, ge=1, description="groups of the group norms")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout of the residual layers, for the teacher alone")

    def build_unet(self, *, in_channels: int, sample_size: int) -> UNet2DConditionModel:
        """Return a fresh U-Net for samples of (in_channels, sample_size, sample_size)."""
        attends = [level >= self.attention_from_level for level in range(len(self.block_out_channels))]
        return UNet2DConditionModel(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=in_channels,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
            mid_block_type="UNetMidBlock2D",
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
            block_out_channels=self.block_out_channels,
            layers_per_block=self.layers_per_block,
            # For these blocks it is what its name says; for those with cross-attention it is the number of heads.
            attention_head_dim=tuple(min(width, self.attention_head_dim) for width in self.block_out_channels),
            norm_num_groups=self.norm_num_groups,
            num_class_embeds=self.num_classes + 1,
            # The time embedding, which also carries class and w, scales features as well as shifting them.
            resnet_time_scale_shift="scale_shift",
            dropout=self.dropout,
        )


class ClassModel(Parts):
    """A class-conditional model: its networks are told a label, and the label after the last stands for no class.

    Attributes:
        scheduler_config: the scheduler's configuration as a dictionary.
        vae: None for a model in pixels.
        class_names: a name for each class, or empty.
    """

    vae: AutoencoderKL | None
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        # A schedule or prediction type that is not known is told when the model is read, not in the first step.
        _ = self.schedule, self.prediction_type
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ModelError(
                f"{len(self.class_names)} classes have names and the network knows {self.num_classes} (it has one "
                "embedding more than classes, for no class): the two must be equal"
            )
        if self.vae is not None and self.sample_shape[0] != self.vae.config["latent_channels"]:
            raise ModelError(
                f"the denoising network takes {self.sample_shape[0]} channels but the VAE has latents of "
                f"{self.vae.config['latent_channels']}: the two must be equal, so take both from one model"
            )

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Number of classes, the label of no class left out; that label is this number."""

    @property
    def stores_latents(self) -> bool:  # type: ignore[override]
        return self.vae is not None

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        size = self.network.config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return self.network.config["in_channels"], height, width

    @property
    def resolution(self) -> int:
        factor = 1 if self.vae is None else 2 ** (len(self.vae.config["block_out_channels"]) - 1)
        return self.sample_shape[1] * factor

    @property
    def picture_channels(self) -> int:
        channels: int = self.sample_shape[0] if self.vae is None else self.vae.config["in_channels"]
        return channels

    def denoiser(self) -> Denoiser:
        # A network that takes w has one branch.
        guided = self.network.config["time_cond_proj_dim"] is None
        return Denoiser(
            network=self.network,
            forward=self._forward,
            schedule=self.schedule,
            prediction_type=self.prediction_type,
            condition_names=("label",),
            null={"label": torch.tensor([self.num_classes])} if guided else {},
            # Latents have no bounds.
            clip_sample=not self.stores_latents and bool(self.scheduler_config.get("clip_sample", True)),
        )

    @staticmethod
    @abstractmethod
    def _forward(
        network: nn.Module, z: Tensor, time: Tensor, condition: Condition, w_embedding: Tensor | None
    ) -> Tensor:
        """Return the network's output for z_t, labels (B,) and, if it takes one, an embedding of w; z_t's shape."""

    def conditions(self, samples: Sequence[Mapping[str, Any]]) -> Condition:
        """Return the labels of the samples."""
        return {"label": torch.stack([torch.as_tensor(sample["label"]) for sample in samples]).to(self.device)}

    @torch.no_grad()
    def encode_pictures(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        if self.vae is not None:
            return scaled_posterior(self.vae, pixels)
        x = pixels.to(self.device).float() / 127.5 - 1
        return x, torch.zeros_like(x)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        if self.vae is None:
            return pixels_of(z)
        return pixels_of(self.vae.decode((z / self.vae.config["scaling_factor"]).to(self.vae.dtype)).sample)

    def _scheduler(self) -> CosineDDIMScheduler | DDIMScheduler:
        kind = CosineDDIMScheduler if isinstance(self.schedule, CosineSchedule) else DDIMScheduler
        return kind.from_config(self.scheduler_config)


@dataclass
class ClassParts(ClassModel):
    """The parts of a class-conditional U-Net.

    Attributes:
        unet: with `num_class_embeds` = classes + 1; the last one stands for no class.
        scheduler_config: the scheduler's configuration as a dictionary.
        vae: None for a model in pixels.
        class_names: a name for each class, or empty.
    """

    unet: UNet2DConditionModel
    scheduler_config: dict[str, Any]
    vae: AutoencoderKL | None = None
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        config = self.unet.config
        if not config["num_class_embeds"]:
            raise ModelError(
                "the U-Net has no num_class_embeds, so it knows no classes: a class-conditional teacher needs one "
                "embedding for each class and one more for no class"
            )
        kinds = (*config["down_block_types"], config["mid_block_type"], *config["up_block_types"])
        attending = [kind for kind in kinds if kind is not None and "CrossAttn" in kind]
        if attending:
            raise ModelError(
                f"the U-Net has a {attending[0]}, which attends to text that a class-conditional model is not given: "
                "build it with AttnDownBlock2D, UNetMidBlock2D and AttnUpBlock2D"
            )
        if config["out_channels"] != config["in_channels"]:
            raise ModelError(
                f"the U-Net takes {config['in_channels']} channels and outputs {config['out_channels']}: the two must "
                "be equal (a learned sigma is known of DiTs alone)"
            )
        super().__post_init__()

    @property
    def family(self) -> str:  # type: ignore[override]
        return "class_pixel" if self.vae is None else "class_latent"

    @property
    def network(self) -> UNet2DConditionModel:
        return self.unet

    @property
    def _networks(self) -> Sequence[nn.Module]:
        return [self.unet] if self.vae is None else [self.unet, self.vae]

    def with_network(self, network: nn.Module, scheduler_config: dict[str, Any]) -> Self:
        return replace(self, unet=network, scheduler_config=scheduler_config)

    @property
    def num_classes(self) -> int:
        count: int = self.unet.config["num_class_embeds"]
        return count - 1

    @staticmethod
    def _forward(
        network: nn.Module, z: Tensor, time: Tensor, condition: Condition, w_embedding: Tensor | None
    ) -> Tensor:
        output: Tensor = network(
            z, time, None, class_labels=condition["label"], timestep_cond=w_embedding, return_dict=False
        )[0]
        return output

    def pipeline(self) -> ClassConditionalPipeline:
        """Return a diffusers pipeline over these parts."""
        return ClassConditionalPipeline(
            unet=self.unet, scheduler=self._scheduler(), vae=self.vae, class_names=list(self.class_names)
        )

    def save(self, folder: Path | str) -> None:
        """Write a folder that ClassConditionalPipeline.from_pretrained reads."""
        self.pipeline().save_pretrained(str(folder), safe_serialization=True)


def load_class_conditional(folder: Path, *, dtype: torch.dtype) -> ClassParts:
    """Read a class-conditional model; see `load_model`.

    Raises:
        ModelError: a part is missing or of another kind, or the parts do not fit together.
    """
    needed = {"unet": "the denoising network", "scheduler": "the noise schedule"}
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    in_latents = (index.get("vae") or [None])[0] is not None
    if in_latents:
        needed["vae"] = "the autoencoder of the latents"
    check_components(folder, needed, what="A class-conditional teacher")
    parts = ClassParts(
        unet=load_network(UNet2DConditionModel, folder / "unet", torch_dtype=dtype),
        scheduler_config=read_scheduler(folder),
        vae=load_network(AutoencoderKL, folder / "vae", torch_dtype=dtype) if in_latents else None,
        class_names=tuple(index.get("class_names") or ()),
    )
    choose_attention(*parts.sample_shape[1:])
    return parts

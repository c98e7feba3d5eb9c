"""Class to picture in latents by a diffusion transformer: DiT (Peebles & Xie 2023) as diffusers' DiTPipeline has it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from diffusers.configuration_utils import register_to_config
from diffusers.models import AutoencoderKL
from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings, TimestepEmbedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  # pipelines look for it in this module
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.pipelines.dit.pipeline_dit import DiTPipeline
from torch import Tensor, nn
from torch.nn import functional

from fewstep.errors import ModelError
from fewstep.models.class_conditional import ClassModel
from fewstep.models.class_pipeline import DiTStudentPipeline
from fewstep.models.denoiser import Condition
from fewstep.models.folder import check_components, choose_attention, load_network, read_scheduler


class ConditionedDiT(DiTTransformer2DModel):
    """A DiT that can take the guidance weight; without `time_cond_proj_dim` it computes what its base class does.

    The embedding of w enters as in diffusers' U-Nets: through `cond_proj`, added to the sinusoids of the time before
    the first linear layer of their embedding. A DiT embeds the time in every block anew, so each block has a
    `cond_proj`; the output takes the embedding of the first block, as in the base class.

    Two more things differ from it. Labels are never dropped: whoever trains drops them, once for all blocks, where
    the base class draws for each block anew. And what the output takes of the first block is computed in that block's
    forward pass, so that a sharded network has its weights there when they are needed.

    Args:
        time_cond_proj_dim: width of the embedding of w; None: no such input.
        num_attention_heads, …: as in the base class. Listed, for a network is built from the names listed here.
    """

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        attention_bias: bool = True,
        sample_size: int = 32,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_zero",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-5,
        time_cond_proj_dim: int | None = None,
    ) -> None:
        super().__init__(
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            dropout=dropout,
            norm_num_groups=norm_num_groups,
            attention_bias=attention_bias,
            sample_size=sample_size,
            patch_size=patch_size,
            activation_fn=activation_fn,
            num_embeds_ada_norm=num_embeds_ada_norm,
            upcast_attention=upcast_attention,
            norm_type=norm_type,
            norm_elementwise_affine=norm_elementwise_affine,
            norm_eps=norm_eps,
        )
        for block in self.transformer_blocks:
            block.norm1.emb = _TimeLabelEmbeddings(num_embeds_ada_norm, self.inner_dim, time_cond_proj_dim)
        self.transformer_blocks[0].register_forward_hook(_and_its_embedding)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor,
        timestep_cond: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Return the output for z_t, (B, out_channels, h, w), in a tuple or a Transformer2DModelOutput.

        Args:
            hidden_states: z_t, (B, C, h, w).
            timestep: times as the network is told them, (B,).
            class_labels: (B,) int64; `num_embeds_ada_norm` stands for no class.
            timestep_cond: embedding of w, (B, time_cond_proj_dim).
            return_dict: rather than a tuple.

        Raises:
            ModelError: the network takes an embedding of w and none came, or the other way round.
        """
        dim = self.config["time_cond_proj_dim"]
        if (dim is None) != (timestep_cond is None):
            raise ModelError(
                f"this DiT has time_cond_proj_dim={dim}, and {'an' if dim is None else 'no'} embedding of w came: "
                "sample students with DiTStudentPipeline, and teachers with DiTPipeline"
            )
        # Blocks hand `timestep` on to their embedding as it is, through gradient checkpointing too.
        told = (timestep, timestep_cond)
        x: Any = self.pos_embed(hidden_states)
        embedding: Any = None
        for block in self.transformer_blocks:
            arguments = (x, None, None, None, told, None, class_labels)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, *arguments)
            else:
                x = block(*arguments)
            if embedding is None:
                x, embedding = x
        shift, scale = self.proj_out_1(functional.silu(embedding)).chunk(2, dim=1)
        x = self.proj_out_2(self.norm_out(x) * (1 + scale[:, None]) + shift[:, None])
        side, patch, channels = math.isqrt(x.shape[1]), self.patch_size, self.out_channels
        x = torch.einsum("nhwpqc->nchpwq", x.reshape(-1, side, side, patch, patch, channels))
        output = x.reshape(-1, channels, side * patch, side * patch)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)


class _TimeLabelEmbeddings(CombinedTimestepLabelEmbeddings):
    """The sum of the embeddings of (time, w) and of the label."""

    def __init__(self, num_classes: int, embedding_dim: int, cond_proj_dim: int | None) -> None:
        super().__init__(num_classes, embedding_dim)
        self.class_embedder.dropout_prob = 0.0  # built with dropout: that is what gives it a row for no class
        if cond_proj_dim is not None:
            width = self.time_proj.num_channels
            self.timestep_embedder = TimestepEmbedding(width, embedding_dim, cond_proj_dim=cond_proj_dim)

    def forward(
        self, timestep: tuple[Tensor, Tensor | None], class_labels: Tensor, hidden_dtype: torch.dtype | None = None
    ) -> Tensor:
        time, w_embedding = timestep
        sinusoids = self.time_proj(time).to(dtype=hidden_dtype)
        embedding: Tensor = self.timestep_embedder(sinusoids, w_embedding) + self.class_embedder(class_labels)
        return embedding


def _and_its_embedding(block: Any, arguments: tuple[Any, ...], output: Tensor) -> tuple[Tensor, Tensor]:
    told, labels = arguments[4], arguments[6]
    return output, block.norm1.emb(told, labels, hidden_dtype=output.dtype)


@dataclass(kw_only=True)
class DiTParts(ClassModel):
    """The parts of a DiT.

    A DiT that was trained with a learned sigma outputs twice as many channels as it takes; the first half is what
    `prediction_type` says (eps, or v after the stage convert), and it alone is guided, sampled and trained. The second
    half, the variance of an ancestral sampler, gets no gradient and no use: in a student it means nothing any more.
    Facebook's code guides the first three of the four channels of eps by default, "for exact reproducibility", and
    says that all channels are the standard way; diffusers' DiTPipeline guides all, and so does everything here.

    Attributes:
        transformer: the label `num_embeds_ada_norm` stands for no class.
        vae: as in `DiTPipeline`.
        scheduler_config: the scheduler's configuration as a dictionary.
        class_names: a name for each class (`id2label`), or empty.
    """

    transformer: ConditionedDiT
    vae: AutoencoderKL
    scheduler_config: dict[str, Any]
    class_names: tuple[str, ...] = ()

    family: ClassVar[str] = "dit"

    def __post_init__(self) -> None:
        made, taken = self.transformer.out_channels, self.transformer.config["in_channels"]
        if made not in (taken, 2 * taken):
            raise ModelError(
                f"the DiT takes {taken} channels and outputs {made}: it must be as many, or twice as many, of which "
                "the second half is a learned sigma"
            )
        super().__post_init__()

    @property
    def network(self) -> ConditionedDiT:
        return self.transformer

    @property
    def _networks(self) -> Sequence[nn.Module]:
        return [self.transformer, self.vae]

    def with_network(self, network: nn.Module, scheduler_config: dict[str, Any]) -> Self:
        assert isinstance(network, ConditionedDiT)
        return replace(self, transformer=network, scheduler_config=scheduler_config)

    @property
    def num_classes(self) -> int:
        count: int = self.transformer.config["num_embeds_ada_norm"]
        return count

    def pipeline(self) -> DiTPipeline | DiTStudentPipeline:
        """Return an unmodified DiTPipeline over these parts, or for a network that takes w a DiTStudentPipeline.

        DiTPipeline takes 1000 for no class: with another number of classes it cannot guide.
        """
        takes_w = self.transformer.config["time_cond_proj_dim"] is not None
        labels = {str(number): name for number, name in enumerate(self.class_names)}
        pipeline = (DiTStudentPipeline if takes_w else DiTPipeline)(
            transformer=self.transformer if takes_w else _plain(self.transformer),
            vae=self.vae,
            scheduler=self._scheduler(),
            id2label=labels or None,
        )
        pipeline.register_to_config(id2label=labels)  # which diffusers reads, and does not write
        return pipeline

    def save(self, folder: Path | str) -> None:
        """Write a folder that DiTPipeline.from_pretrained reads, or DiTStudentPipeline for a network that takes w."""
        self.pipeline().save_pretrained(str(folder), safe_serialization=True)

    @staticmethod
    def _forward(
        network: nn.Module, z: Tensor, time: Tensor, condition: Condition, w_embedding: Tensor | None
    ) -> Tensor:
        output: Tensor = network(z, time, condition["label"], timestep_cond=w_embedding, return_dict=False)[0]
        return output[:, : z.shape[1]]  # without the learned sigma


def _plain(network: ConditionedDiT) -> DiTTransformer2DModel:
    """Return diffusers' own class around the same weights, of a network that takes no w."""
    config = {key: value for key, value in network.config.items() if key != "time_cond_proj_dim"}
    with init_empty_weights():
        plain = DiTTransformer2DModel.from_config({key: value for key, value in config.items() if key[0] != "_"})
    plain.load_state_dict(network.state_dict(), assign=True)
    return plain.to(network.device).train(network.training)


#: What a DiT's weights may say that they are; the second is what diffusers made of DiTs at first.
_NETWORKS = ("DiTTransformer2DModel", "Transformer2DModel", "ConditionedDiT")


def load_dit(folder: Path, *, dtype: torch.dtype) -> DiTParts:
    """Read a DiT, a teacher or a student; see `load_model`.

    Raises:
        ModelError: a part is missing or of another kind, or the parts do not fit together.
    """
    needed = {
        "transformer": "the denoising network",
        "vae": "the autoencoder of the latents",
        "scheduler": "the noise schedule",
    }
    check_components(folder, needed, what="A DiT")
    index, config = (
        json.loads((folder / name).read_text(encoding="utf-8"))
        for name in ("model_index.json", "transformer/config.json")
    )
    if config.get("_class_name") not in _NETWORKS:
        raise ModelError(
            f"the transformer of {folder} is a {config.get('_class_name')}, and a DiT is one of {', '.join(_NETWORKS)}"
        )
    parts = DiTParts(
        transformer=load_network(ConditionedDiT, folder / "transformer", torch_dtype=dtype),
        vae=load_network(AutoencoderKL, folder / "vae", torch_dtype=dtype),
        scheduler_config=read_scheduler(folder),
        class_names=_names(index.get("id2label") or {}, folder),
    )
    patch = parts.transformer.config["patch_size"]
    choose_attention(*(side // patch for side in parts.sample_shape[1:]))
    return parts


def _names(id2label: dict[str, str], folder: Path) -> tuple[str, ...]:
    numbers = sorted(int(number) for number in id2label)
    if numbers != list(range(len(numbers))):
        raise ModelError(
            f"id2label in {folder}/model_index.json names {len(numbers)} classes, {numbers[0]} … {numbers[-1]}: it "
            "must name every class from 0 on, or be left out"
        )
    return tuple(id2label[str(number)] for number in numbers)

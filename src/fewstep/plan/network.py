"""Networks of a shape on the meta device: built, called, measured. Everything is measured once and remembered."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, Literal

import diffusers
import torch
import transformers
from torch import Tensor, nn

from fewstep.errors import ModelError
from fewstep.models.dit import ConditionedDiT
from fewstep.plan.footprint import Call, Footprint, forward_footprint, update_footprint
from fewstep.plan.shapes import Component, Shape
from fewstep.train.parallel import blocks, transformer_blocks

#: Positional and named arguments.
_Inputs = tuple[tuple[Any, ...], dict[str, Any]]

#: What a pass is made through: the denoising network (with its text encoders where these are trained too), its down
#: blocks alone, the autoencoder whole or half, or the text encoders.
Role = Literal["denoiser", "denoiser_and_text", "encoder", "autoencoder", "vae_encoder", "vae_decoder", "text_encoders"]


@dataclass(frozen=True)
class Network:
    """One network of a shape; equal ones are measured once.

    Attributes:
        role: what is called.
        content: the shape, as JSON.
        embedding_dim: width of the w embedding that the denoising network takes; None: it takes none.
    """

    role: Role
    content: str
    embedding_dim: int | None = None

    @classmethod
    def of(cls, shape: Shape, role: Role = "denoiser", *, embedding_dim: int | None = None) -> Network:
        """Return a network of a shape."""
        content = {
            "components": dict(shape.components),
            "class_tokens": shape.class_tokens,
            "prompt_tokens": shape.prompt_tokens,
        }
        return cls(role, json.dumps(content, sort_keys=True, default=list), embedding_dim)

    def with_weight(self, embedding_dim: int | None) -> Network:
        """Return the same network with an input for w."""
        return replace(self, embedding_dim=embedding_dim)


@dataclass(frozen=True)
class Sizes:
    """Numbers of weights.

    Attributes:
        weights: all.
        outside: those outside the units that FSDP gathers one by one.
        around: the most that is outside the transformer blocks of a block that has any.
        largest_unit: those of the largest unit.
    """

    weights: int
    outside: int
    around: int
    largest_unit: int


@cache
def sizes(network: Network) -> Sizes:
    """Return the numbers of weights of a network."""
    module, _ = _build(network)
    weights = _count(module)
    inside = {block: [_count(part) for part in transformer_blocks(block)] for block in blocks(module)}
    own = {block: _count(block) - sum(parts) for block, parts in inside.items()}
    return Sizes(
        weights=weights,
        outside=weights - sum(own.values()) - sum(map(sum, inside.values())),
        around=max((own[block] for block, parts in inside.items() if parts), default=0),
        largest_unit=max((*own.values(), *(part for parts in inside.values() for part in parts)), default=0),
    )


def forward_pass(network: Network, *, bfloat16: bool) -> Footprint:
    """Return the footprint of a forward pass without gradients.

    The input for w is left out: one product a sample is a millionth of the pass, and teacher and student are measured
    as one.
    """
    return _forward_pass(network.with_weight(None), bfloat16)


def training_pass(network: Network, *, bfloat16: bool, checkpointing: bool) -> Footprint:
    """Return the footprint of a forward and a backward pass, the input for w left out."""
    return _training_pass(network.with_weight(None), bfloat16, checkpointing)


@cache
def _forward_pass(network: Network, bfloat16: bool) -> Footprint:
    module, call = _build(network)
    return forward_footprint(call, module.eval(), bfloat16=bfloat16)


@cache
def _training_pass(network: Network, bfloat16: bool, checkpointing: bool) -> Footprint:
    module, call = _build(network)
    return update_footprint(call, module.train(), bfloat16=bfloat16, checkpointing=checkpointing)


@cache
def adapter_weights(network: Network, *, rank: int, target_modules: tuple[str, ...]) -> int:
    """Return the number of weights of low-rank adapters: rank · (in + out) a linear layer, and likewise for a
    convolution, whose kernel the first of the two factors has."""
    module, _ = _build(network)
    count = 0
    for name, layer in module.named_modules():
        if any(name == target or name.endswith(f".{target}") for target in target_modules):
            if isinstance(layer, nn.Linear):
                count += rank * (layer.in_features + layer.out_features)
            elif isinstance(layer, nn.Conv2d):
                kernel = layer.kernel_size[0] * layer.kernel_size[1]
                count += rank * (layer.in_channels * kernel + layer.out_channels)
    return count


def networks_of_parts(shape: Shape) -> tuple[Network, ...]:
    """Return all networks of a shape: what its folder holds."""
    roles: list[Role] = ["denoiser"]
    if shape.vae is not None:
        roles.append("autoencoder")
    if shape.text_encoders:
        roles.append("text_encoders")
    return tuple(Network.of(shape, role) for role in roles)


def weights_of_parts(shape: Shape) -> int:
    """Return the number of weights of all networks of a shape."""
    return sum(sizes(network).weights for network in networks_of_parts(shape))


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@lru_cache(maxsize=8)
def _build(network: Network) -> tuple[nn.Module, Call]:
    content = json.loads(network.content)
    shape = Shape(name="", **content)
    with torch.device("meta"):
        if network.role in ("denoiser", "denoiser_and_text", "encoder"):
            return _build_denoiser(shape, network)
        if network.role == "text_encoders":
            encoders = nn.ModuleList(build_text_encoder(each) for each in shape.text_encoders)
            return encoders, _call_text(encoders, shape)
        assert shape.vae is not None
        vae = build_network(shape.vae)
        return vae, _call_vae(vae, shape, network.role)


def _build_denoiser(shape: Shape, network: Network) -> tuple[nn.Module, Call]:
    denoiser = build_network({**shape.network, "time_cond_proj_dim": network.embedding_dim})
    if network.role == "encoder":
        # As `fewstep.distill.features` cuts it off.
        denoiser.mid_block, denoiser.up_blocks = None, nn.ModuleList()
        denoiser.conv_norm_out, denoiser.conv_out = None, nn.Identity()
    inputs = _denoiser_inputs(shape, network.embedding_dim)

    def call(rows: int) -> Tensor:
        args, kwargs = inputs(rows)
        output: Tensor = denoiser(*args, **kwargs, return_dict=False)[0]
        return output

    if network.role != "denoiser_and_text":
        return denoiser, call
    encoders = nn.ModuleList(build_text_encoder(each) for each in shape.text_encoders)
    call_text = _call_text(encoders, shape)

    def call_both(rows: int) -> Tensor:
        text = call_text(rows)
        args, kwargs = inputs(rows)
        # Its gradient reaches the text encoders as it would through attention; the values do not matter.
        kwargs["encoder_hidden_states"] = text
        output: Tensor = denoiser(*args, **kwargs, return_dict=False)[0]
        return output

    return nn.ModuleDict({"unet": denoiser, "text": encoders}), call_both


def _denoiser_inputs(shape: Shape, embedding_dim: int | None) -> Callable[[int], _Inputs]:
    channels, height, width = shape.sample_shape
    told = shape.conditions
    if "masked_latents" in told:
        channels = 2 * channels + 1

    def inputs(rows: int) -> _Inputs:
        def empty(*size: int) -> Tensor:
            return torch.empty(rows, *size, device="meta")

        whole = torch.empty(rows, dtype=torch.int64, device="meta")
        kwargs: dict[str, Any] = {}
        if "text" in told:
            kwargs["encoder_hidden_states"] = empty(*told["text"])
        elif "patch_size" not in shape.network:
            kwargs["encoder_hidden_states"] = None
        if "label" in told:
            kwargs["class_labels"] = whole
        if "pooled" in told:
            kwargs["added_cond_kwargs"] = {"text_embeds": empty(*told["pooled"]), "time_ids": empty(*told["time_ids"])}
        if embedding_dim is not None:
            kwargs["timestep_cond"] = empty(embedding_dim)
        return (empty(channels, height, width), whole), kwargs

    return inputs


def _call_text(encoders: nn.ModuleList, shape: Shape) -> Call:
    def call(rows: int) -> Tensor:
        states = []
        for encoder, config in zip(encoders, shape.text_encoders, strict=True):
            tokens = shape.prompt_tokens or config["max_position_embeddings"]
            ids = torch.empty(rows, tokens, dtype=torch.int64, device="meta")
            states.append(encoder(ids, output_hidden_states=True).hidden_states[-1])
        return torch.cat(states, dim=-1)

    return call


def _call_vae(vae: Any, shape: Shape, role: Role) -> Call:
    assert shape.vae is not None
    side = shape.resolution

    def call(rows: int) -> Tensor:
        if role == "vae_decoder":
            decoded: Tensor = vae.decode(torch.empty(rows, *shape.sample_shape, device="meta"), return_dict=False)[0]
            return decoded
        pictures = torch.empty(rows, vae.config["in_channels"], side, side, device="meta")
        encoded = vae.encode(pictures, return_dict=False)[0]
        if role == "vae_encoder":
            return encoded if isinstance(encoded, Tensor) else encoded.mean
        output: Tensor = vae.decode(encoded.mean + encoded.std, return_dict=False)[0]
        return output

    return call


def build_network(config: Component) -> Any:
    """Return a network of diffusers by its configuration, with fresh weights on torch's default device.

    Raises:
        ModelError: diffusers has no such class.
    """
    name = config.get("_class_name", "UNet2DConditionModel")
    kind = ConditionedDiT if "DiT" in name else getattr(diffusers, name, None)
    if kind is None or not hasattr(kind, "from_config"):
        raise ModelError(
            f"the shape names a network of the class {name}, which diffusers does not have: plans are made for "
            "UNet2DConditionModel and DiTTransformer2DModel, with AutoencoderKL and CLIP"
        )
    return kind.from_config({key: value for key, value in config.items() if not key.startswith("_")})


def build_text_encoder(config: Component) -> Any:
    """Return a text encoder of transformers by its configuration, with fresh weights on torch's default device."""
    kind = getattr(transformers, config["_class_name"])
    values = {key: value for key, value in config.items() if not key.startswith("_")}
    return kind(transformers.CLIPTextConfig(**values))

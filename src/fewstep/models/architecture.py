"""Building a small Stable-Diffusion-shaped teacher from nothing: sizes, tokenizer and fresh networks."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self

from diffusers.models import AutoencoderKL, UNet2DConditionModel
from pydantic import BaseModel, ConfigDict, Field, model_validator
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from fewstep.errors import ModelError

#: Stable Diffusion's betas, rescaled to zero terminal SNR (Lin et al. 2023): sampling may start from pure noise.
SCHEDULER_CONFIG: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "set_alpha_to_one": True,
    "steps_offset": 1,
    "clip_sample": False,
}


class AutoencoderArchitecture(BaseModel):
    """Sizes of the VAE; it halves the resolution once for every channel count after the first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    resolution: int = Field(32, description="side of the pictures in pixels")
    block_out_channels: tuple[int, ...] = Field((32, 64, 96), description="channels from full to lowest resolution")
    layers_per_block: int = Field(1, description="residual layers per resolution")
    latent_channels: int = Field(4, description="channels of the latents")
    norm_num_groups: int = Field(16, description="groups of the group norms")

    def build(self, *, channels: int = 3) -> AutoencoderKL:
        """Return a fresh VAE for pictures of so many channels."""
        depth = len(self.block_out_channels)
        return AutoencoderKL(
            in_channels=channels,
            out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * depth,
            up_block_types=("UpDecoderBlock2D",) * depth,
            block_out_channels=self.block_out_channels,
            layers_per_block=self.layers_per_block,
            latent_channels=self.latent_channels,
            norm_num_groups=self.norm_num_groups,
            sample_size=self.resolution,
        )


#: Numbers that a sinusoid makes of each of SDXL's sizes.
_SIZE_EMBEDDING_DIM = 32


class TeacherArchitecture(BaseModel):
    """Sizes of the text encoders and the U-Net."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: Literal["text_latent", "sdxl"] = Field(
        "text_latent",
        description="kind of the model: text_latent (Stable Diffusion) or sdxl (two text encoders, of which the second "
        "is pooled, and the picture's sizes)",
    )
    block_out_channels: tuple[int, ...] = Field((96, 192), description="U-Net channels from full to lowest resolution")
    layers_per_block: int = Field(1, description="residual layers per resolution")
    attention_from_level: int = Field(1, description="first resolution with cross-attention, 0 is the highest")
    num_attention_heads: int = Field(8, description="heads of the U-Net's attention")
    norm_num_groups: int = Field(16, description="groups of the group norms")
    text_width: int = Field(160, description="width of the text encoder and of cross-attention")
    text_layers: int = Field(2, description="layers of the text encoder")
    text_heads: int = Field(4, description="heads of the text encoder")
    second_text_width: int | None = Field(
        None, description="sdxl: width of the second text encoder; null: that of the first; layers and heads are alike"
    )
    vocabulary_size: int = Field(2500, description="entries of the byte-pair vocabulary")
    max_prompt_tokens: int = Field(24, description="longest prompt in tokens, begin and end included")
    pooled_text: bool = Field(
        True,
        description="also add the pooled prompt to the time embedding, so that it reaches every layer; sdxl does so "
        "always",
    )

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        sharing = [("text_width", self.text_width, "text_heads", self.text_heads)]
        if self.family == "sdxl":
            sharing.append(("second_text_width", self._pooled_width, "text_heads", self.text_heads))
        elif self.pooled_text:
            sharing.append(("text_width", self.text_width, "num_attention_heads", self.num_attention_heads))
        for name, width, sharer, heads in sharing:
            if width % heads:
                raise ValueError(f"{name}={width} cannot be shared equally by {sharer}={heads}; take a multiple of it")
        return self

    @model_validator(mode="after")
    def _check_family(self) -> Self:
        if self.family != "sdxl":
            if self.second_text_width is not None:
                raise ValueError(
                    f"second_text_width={self.second_text_width} is for family: sdxl, and {self.family} has one text "
                    "encoder: leave it out"
                )
            return self
        if self.text_layers < 2:
            raise ValueError(
                f"text_layers={self.text_layers}, but sdxl takes the last but one layer of its text encoders: with "
                "fewer than 2 no token would know of another"
            )
        if not self.pooled_text:
            raise ValueError("pooled_text=false is not possible with family: sdxl, whose U-Net always gets it")
        return self

    @property
    def _pooled_width(self) -> int:
        return self.text_width if self.second_text_width is None else self.second_text_width

    def build_unet(self, *, latent_channels: int, latent_size: int) -> UNet2DConditionModel:
        """Return a fresh U-Net for latents of (latent_channels, latent_size, latent_size)."""
        attends = [level >= self.attention_from_level for level in range(len(self.block_out_channels))]
        return UNet2DConditionModel(
            sample_size=latent_size,
            in_channels=latent_channels,
            out_channels=latent_channels,
            down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
            up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
            block_out_channels=self.block_out_channels,
            layers_per_block=self.layers_per_block,
            cross_attention_dim=self.text_width + (self._pooled_width if self.family == "sdxl" else 0),
            # diffusers' historical name: it is the number of heads.
            attention_head_dim=self.num_attention_heads,
            norm_num_groups=self.norm_num_groups,
            # The time embedding, which also carries w in the student, scales features as well as shifting them.
            resnet_time_scale_shift="scale_shift",
            **self._added_conditions(),
        )

    def _added_conditions(self) -> dict[str, Any]:
        if self.family == "sdxl":
            return {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": _SIZE_EMBEDDING_DIM,
                "projection_class_embeddings_input_dim": self._pooled_width + 6 * _SIZE_EMBEDDING_DIM,
            }
        return _pooled_text(self.num_attention_heads) if self.pooled_text else {}

    def build_text_encoder(self, tokenizer: CLIPTokenizer) -> CLIPTextModel:
        """Return a fresh text encoder for the tokenizer."""
        return CLIPTextModel(self._text_config(tokenizer, self.text_width))

    def build_second_text_encoder(self, tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
        """Return a fresh second text encoder of SDXL's for the tokenizer."""
        return CLIPTextModelWithProjection(self._text_config(tokenizer, self._pooled_width))

    def _text_config(self, tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=self.text_layers,
            num_attention_heads=self.text_heads,
            max_position_embeddings=self.max_prompt_tokens,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    def train_tokenizer(self, captions: Iterable[str]) -> CLIPTokenizer:
        """Return a CLIPTokenizer whose byte-pair vocabulary is learned from the captions; the same for the same ones.

        The vocabulary begins as CLIP's does: every byte, within a word and at its end (512 entries), so that no prompt
        holds an unknown one.
        """
        # The same splitting as CLIP's own tokenizer; transformers rebuilds it from vocabulary and merges alone.
        words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
        bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>", continuing_subword_prefix=""))
        bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(words, behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocabulary_size,
            # The trainer numbers word ends as it meets them, in an order that differs from run to run; and ends that
            # no caption has would be unknown. Naming them here settles both.
            special_tokens=["<|startoftext|>", "<|endoftext|>", *(f"{byte}</w>" for byte in alphabet)],
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        )
        bpe.train_from_iterator(captions, trainer)
        with tempfile.TemporaryDirectory() as folder:
            bpe.model.save(folder)
            vocabulary = json.loads((Path(folder) / "vocab.json").read_text(encoding="utf-8"))
            merges = (Path(folder) / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
        # transformers says list[str], and takes pairs.
        pairs: list[Any] = [tuple(line.split(" ")) for line in merges]
        return CLIPTokenizer(
            vocab=vocabulary,
            merges=pairs,
            model_max_length=self.max_prompt_tokens,
        )


def add_pooled_text(unet: UNet2DConditionModel, *, num_heads: int) -> UNet2DConditionModel:
    """Return a U-Net that also adds the pooled prompt to its time embedding, the same one if it does so already.

    At first the addition is zero, so that both compute the same.

    Args:
        unet: takes text embeddings (B, L, D).
        num_heads: heads of the attention that pools them.

    Raises:
        ModelError: the heads cannot share D equally.
    """
    if unet.config["addition_embed_type"] is not None:
        return unet
    width = unet.config["cross_attention_dim"]
    if width % num_heads:
        raise ModelError(
            f"the model's text embeddings have {width} numbers, which {num_heads} heads cannot share equally to pool "
            "them; set network.num_attention_heads to a divisor"
        )
    grown = unet_like(unet, **_pooled_text(num_heads))
    grown.load_state_dict(unet.state_dict(), strict=False)
    # The last norm's output is what is added.
    nn.init.zeros_(grown.add_embedding.norm2.weight)
    nn.init.zeros_(grown.add_embedding.norm2.bias)
    return grown


def unet_like(unet: UNet2DConditionModel, **changes: Any) -> UNet2DConditionModel:
    """Return a fresh U-Net of another one's configuration with changes, device and precision."""
    config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    fresh = type(unet).from_config({**config, **changes})
    # diffusers warns about every cast, also about one that changes nothing.
    return fresh.to(unet.device) if fresh.dtype == unet.dtype else fresh.to(unet.device, unet.dtype)


def _pooled_text(num_heads: int) -> dict[str, Any]:
    # diffusers pools what cross-attention gets, so that the stock StableDiffusionPipeline needs nothing more. With
    # cross-attention at the lowest resolution alone, text reaches the other layers only this way.
    return {"addition_embed_type": "text", "addition_embed_type_num_heads": num_heads}

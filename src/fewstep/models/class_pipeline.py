"""Diffusers pipelines for class-conditional networks, guided or with the guidance weight as an input.

`DiffusionPipeline.from_pretrained(folder)` looks a pipeline up by its name inside of diffusers alone and cannot find
these. Name the class; the parts that are not diffusers' own (scheduler, transformer) it imports by itself::

    from fewstep.models import ClassConditionalPipeline

    pipe = ClassConditionalPipeline.from_pretrained(folder)
    pipe([3, 3, 7], num_inference_steps=4, guidance_scale=2.0).images
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fewstep.errors import SamplingError
from fewstep.models.embedding import guidance_embedding


class _ClassPipeline(DiffusionPipeline, ABC):
    """From class labels to pictures: all but the network, which each kind calls in its own way."""

    @property
    @abstractmethod
    def _network(self) -> Any:
        """The denoising network."""

    @property
    @abstractmethod
    def _num_classes(self) -> int:
        """Number of classes, without the one for no class."""

    @abstractmethod
    def _evaluate(self, z: Tensor, t: Tensor, labels: Tensor, cond: Tensor | None) -> Tensor:
        """Return the network's output of z's shape; t is (B,)."""

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int] | Tensor,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Return one picture for each label.

        Args:
            class_labels: 0 … classes − 1.
            num_inference_steps: N; a student's own, as its `fewstep.json` says.
            guidance_scale: g = 1 + w. A w-conditioned network is told w; another one is guided with two evaluations a
                step, so leave 1 for a student of one single w, which has it built in.
            generator: of the starting noise and of a stochastic sampler; a list has one for each picture.
            latents: the starting noise, (B, C, h, w).
            output_type: "pil", "np" (B, H, W, C) in [0, 1], or "latent" for what was diffused.
            return_dict: an ImagePipelineOutput rather than a tuple.

        Raises:
            SamplingError: labels that are none of the classes, no step, a guidance scale below 1, latents of another
                shape, or an unknown output type.
        """
        device, dtype, config = self._execution_device, self._network.dtype, self._network.config
        labels = self._check(class_labels, num_inference_steps, guidance_scale, output_type).to(device)
        rows, size = len(labels), config.sample_size
        shape = (rows, config.in_channels, *((size, size) if isinstance(size, int) else size))
        if latents is not None and latents.shape != shape:
            raise SamplingError(
                f"latents are {tuple(latents.shape)}, and {rows} labels at the model's own size need {shape}: give as "
                "many as labels, or leave latents out"
            )
        z = randn_tensor(shape, generator=generator, device=device) if latents is None else latents
        z = z.to(device, torch.float32)
        w, dim = guidance_scale - 1, config.time_cond_proj_dim
        cond = None if dim is None else guidance_embedding(torch.full((rows,), w, device=device), dim).to(dtype)
        guided = dim is None and w > 0
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, self._num_classes)])
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        for t in self.progress_bar(self.scheduler.timesteps):
            asked = torch.cat([z, z]) if guided else z
            output = self._evaluate(asked.to(dtype), t.expand(len(asked)), labels, cond).float()
            if guided:
                with_class, without = output.chunk(2)
                output = with_class + w * (with_class - without)
            z = self.scheduler.step(output, t, z, generator=generator, return_dict=False)[0]
        images = self._pictures(z, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check(
        self, class_labels: Sequence[int] | Tensor, num_inference_steps: int, guidance_scale: float, output_type: str
    ) -> Tensor:
        wrong = SamplingError(f"class_labels={class_labels!r}: give a list of whole numbers, one for each picture")
        try:
            labels = torch.as_tensor(class_labels)
        except (TypeError, ValueError, RuntimeError) as error:
            raise wrong from error
        if labels.ndim != 1 or not len(labels) or labels.is_floating_point() or labels.dtype == torch.bool:
            raise wrong
        strangers = sorted({int(label) for label in labels if not 0 <= label < self._num_classes})
        if strangers:
            raise SamplingError(
                f"class_labels has {strangers}, and the classes of this model are 0 … {self._num_classes - 1}: "
                "take labels out of these"
            )
        if num_inference_steps < 1:
            raise SamplingError(
                f"num_inference_steps={num_inference_steps} is below 1: a sampler makes at least one step"
            )
        if not guidance_scale >= 1:  # NaN too
            raise SamplingError(
                f"guidance_scale={guidance_scale:g} is below 1: it is 1 + w, and 1 is a model without guidance"
            )
        if output_type not in ("pil", "np", "latent"):
            raise SamplingError(f"output_type={output_type!r} is none of pil, np and latent")
        return labels.long()

    def _pictures(self, z: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return z
        if self.vae is not None:
            z = self.vae.decode((z / self.vae.config.scaling_factor).to(self.vae.dtype)).sample
        images = (z.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        return self.numpy_to_pil(np.asarray(images)) if output_type == "pil" else images


class ClassConditionalPipeline(_ClassPipeline):
    """From class labels to pictures; the folders of class-conditional U-Nets, teachers and students.

    A stochastic student on a discrete schedule has the configuration of DDIMScheduler, which samples it as if it were a
    deterministic one: put `StochasticDDIMScheduler.from_pretrained(folder, subfolder="scheduler")` in its place.

    Args:
        unet: UNet2DConditionModel with `num_class_embeds` = classes + 1.
        scheduler: CosineDDIMScheduler, or DDIMScheduler with trailing times.
        vae: AutoencoderKL, or None for a model in pixels.
        class_names: a name for each class, or none.
    """

    model_cpu_offload_seq = "unet->vae"
    _optional_components: ClassVar[list[str]] = ["vae"]

    def __init__(self, unet: Any, scheduler: Any, vae: Any = None, class_names: list[str] | None = None) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)
        self.register_to_config(class_names=list(class_names or []))

    @property
    def _network(self) -> Any:
        return self.unet

    @property
    def _num_classes(self) -> int:
        count: int = self.unet.config.num_class_embeds
        return count - 1

    def _evaluate(self, z: Tensor, t: Tensor, labels: Tensor, cond: Tensor | None) -> Tensor:
        output: Tensor = self.unet(z, t, None, class_labels=labels, timestep_cond=cond, return_dict=False)[0]
        return output


class DiTStudentPipeline(_ClassPipeline):
    """From class labels to pictures; the folders of DiT students that take the guidance weight.

    The parts are those of diffusers' DiTPipeline, which guides with two evaluations a step instead. As for a
    stochastic student's scheduler, see `ClassConditionalPipeline`.

    Args:
        transformer: ConditionedDiT.
        vae: AutoencoderKL.
        scheduler: DDIMScheduler with trailing times.
        id2label: label -> name, or none.
    """

    model_cpu_offload_seq = "transformer->vae"

    def __init__(self, transformer: Any, vae: Any, scheduler: Any, id2label: dict[str, str] | None = None) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.register_to_config(id2label=dict(id2label or {}))

    @property
    def _network(self) -> Any:
        return self.transformer

    @property
    def _num_classes(self) -> int:
        count: int = self.transformer.config.num_embeds_ada_norm
        return count

    def _evaluate(self, z: Tensor, t: Tensor, labels: Tensor, cond: Tensor | None) -> Tensor:
        output: Tensor = self.transformer(z, t, labels, timestep_cond=cond, return_dict=False)[0]
        return output[:, : z.shape[1]]  # without the learned sigma

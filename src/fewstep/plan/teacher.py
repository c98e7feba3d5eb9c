"""Which shape a recipe's teacher has, without fetching any weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache

from fewstep.errors import ModelError
from fewstep.models import TeacherArchitecture
from fewstep.plan.shapes import Component, Shape, shape_of_folder, shape_of_teacher, shipped_shapes
from fewstep.recipe import Recipe
from fewstep.stage_settings import ClassTeacherStage, TeacherStage
from fewstep.tracking.fetch import packaged_model


def find_shape(recipe: Recipe, *, named: str | None = None) -> Shape:
    """Return the shape of the teacher that a recipe distills or trains.

    Args:
        recipe: the recipe.
        named: a shipped shape, or a folder with a model's configurations, to take instead.

    Raises:
        ModelError: there is no such shape, or the teacher's cannot be found on this machine.
    """
    if named is not None:
        return _named(named)
    if recipe.train_class_teacher is not None and recipe.teacher is None:
        return _of_class_teacher(recipe.train_class_teacher)
    settings = recipe.train_teacher if recipe.teacher is None else None
    if settings is None:
        assert recipe.teacher is not None  # the recipe checks it: a teacher is named or trained
        return _of_teacher(recipe.teacher)
    return _of_text_teacher(settings) if settings.init is None else _grown(_of_teacher(settings.init), settings)


def _named(name: str) -> Shape:
    shipped = shipped_shapes()
    if name in shipped:
        return shipped[name]
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ModelError(
            f"--shape {name}: no such shape is shipped, and there is no such folder. Take one of "
            f"{', '.join(shipped)}, or a folder with the model's configurations (unet/config.json, …); "
            "no weights are needed"
        )
    return shape_of_folder(folder)


def _of_teacher(uri: str) -> Shape:
    if uri.startswith("asset:"):
        return shape_of_folder(packaged_model(uri.removeprefix("asset:")))
    folder = Path(uri).expanduser()
    if "://" not in uri and folder.is_dir():
        return shape_of_folder(folder)
    shape = shape_of_teacher(uri)
    if shape is not None:
        return shape
    if "://" not in uri and uri.count("/") == 1:
        cached = try_to_load_from_cache(uri, "model_index.json")
        if isinstance(cached, str):
            return shape_of_folder(Path(cached).parent)
    raise ModelError(
        f"the sizes of the teacher {uri} are not known on this machine, and a plan fetches nothing. Name a shipped "
        f"shape like it with --shape ({', '.join(shipped_shapes())}), or --shape FOLDER with its configurations "
        "(unet/config.json, vae/config.json, text_encoder/config.json, scheduler/scheduler_config.json); "
        "no weights are needed"
    )


def _of_text_teacher(settings: TeacherStage) -> Shape:
    network, vae = settings.network, _autoencoder(settings)
    assert vae is not None
    with torch.device("meta"):
        unet = network.build_unet(latent_channels=vae["latent_channels"], latent_size=_latent_size(vae))
    return Shape(
        name="train_teacher",
        about="the sizes in train_teacher",
        components={
            "unet": _config_of(unet),
            "vae": vae,
            "scheduler": {},
            **_text_encoders(network),
        },
    )


def _of_class_teacher(settings: ClassTeacherStage) -> Shape:
    network, vae = settings.network, _autoencoder(settings)
    with torch.device("meta"):
        if vae is None:
            unet = network.build_unet(in_channels=network.channels, sample_size=network.resolution)
        else:
            unet = network.build_unet(in_channels=vae["latent_channels"], sample_size=_latent_size(vae))
    components: dict[str, Component] = {"unet": _config_of(unet), "scheduler": {}}
    if vae is not None:
        components["vae"] = vae
    return Shape(name="train_class_teacher", about="the sizes in train_class_teacher", components=components)


def _grown(shape: Shape, settings: TeacherStage) -> Shape:
    """Return the shape of a model that is trained on, with what the recipe adds to it."""
    unet = dict(shape.network)
    if settings.inpainting:
        unet["in_channels"] = 2 * unet["out_channels"] + 1
    if settings.add_pooled_text and unet.get("addition_embed_type") is None:
        heads = settings.network.num_attention_heads
        unet |= {"addition_embed_type": "text", "addition_embed_type_num_heads": heads}
    scheduler = dict(shape.components["scheduler"])
    for name in ("prediction_type", "rescale_betas_zero_snr"):
        if getattr(settings, name) is not None:
            scheduler[name] = getattr(settings, name)
    return Shape(
        name=shape.name, about=shape.about, components={**shape.components, "unet": unet, "scheduler": scheduler}
    )


def _autoencoder(settings: TeacherStage | ClassTeacherStage) -> Component | None:
    """Return the configuration of a fresh teacher's VAE; None for one in pixels."""
    if settings.vae is not None:
        vae = _of_teacher(settings.vae).vae
        if vae is None:
            raise ModelError(f"vae={settings.vae} is a model in pixels, without an autoencoder: name one in latents")
        return vae
    if settings.autoencoder is None:
        return None
    with torch.device("meta"):
        return _config_of(settings.autoencoder.build())


def _latent_size(vae: Component) -> int:
    return int(vae["sample_size"] // 2 ** (len(vae["block_out_channels"]) - 1))


def _config_of(module: Any) -> Component:
    return {**module.config, "_class_name": type(module).__name__}


class _Vocabulary:
    """As much of a tokenizer as the sizes of a text encoder depend on."""

    bos_token_id, eos_token_id, pad_token_id = 0, 1, 1

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size


def _text_encoders(network: TeacherArchitecture) -> dict[str, Component]:
    tokenizer: Any = _Vocabulary(network.vocabulary_size)
    with torch.device("meta"):
        built = {"text_encoder": network.build_text_encoder(tokenizer)}
        if network.family == "sdxl":
            built["text_encoder_2"] = network.build_second_text_encoder(tokenizer)
    return {
        name: {**encoder.config.to_dict(), "_class_name": type(encoder).__name__} for name, encoder in built.items()
    }

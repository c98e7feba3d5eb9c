"""Members of a latent shard, written and read."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from fewstep.data.latents import LATENTS_MEMBER, condition_member, decode_latents, latent_sample
from fewstep.data.sample import BadSampleError

TEXT_MEMBER = condition_member("text")


@pytest.fixture
def sample() -> dict[str, Any]:
    torch.manual_seed(0)
    return latent_sample("k1", "ein Bär", torch.randn(4, 2, 2), torch.rand(4, 2, 2), {"text": torch.randn(5, 3)})


def test_what_is_written_is_read_in_half_precision() -> None:
    mean, std, text = torch.randn(4, 2, 3), torch.rand(4, 2, 3), torch.randn(5, 3)
    decoded = decode_latents(latent_sample("k1", "ein Bär", mean, std, {"text": text}))
    for name, value in (("latent_mean", mean), ("latent_std", std), ("text", text)):
        assert torch.equal(decoded[name], value.half())
    assert decoded["caption"] == "ein Bär"
    assert "token_ids" not in decoded


def test_key_and_caption_are_in_the_record(sample: dict[str, Any]) -> None:
    assert sample["__key__"] == "k1"
    assert json.loads(sample["json"]) == {"key": "k1", "caption": "ein Bär"}


def test_every_part_of_a_condition_is_kept_and_whole_numbers_stay_whole() -> None:
    condition = {"pooled": torch.randn(6), "label": torch.tensor(70_001), "mask": torch.ones(1, 2, 2, dtype=torch.bool)}
    sample = latent_sample("k1", "", torch.zeros(4, 2, 2), torch.ones(4, 2, 2), condition)
    decoded = decode_latents(sample, condition_names=("pooled", "label", "mask"))
    assert torch.equal(decoded["pooled"], condition["pooled"].half())
    assert torch.equal(decoded["label"], condition["label"])
    assert torch.equal(decoded["mask"], condition["mask"])


def test_with_a_tokenizer_there_are_token_ids_and_no_text() -> None:
    sample = latent_sample("k1", "a cat", torch.zeros(4, 2, 2), torch.ones(4, 2, 2), None)
    assert TEXT_MEMBER not in sample
    asked: list[list[str]] = []

    def token_ids(prompts: list[str]) -> torch.Tensor:
        asked.append(prompts)
        return torch.tensor([[1, 2, 3]])

    decoded = decode_latents(sample, condition_names=(), token_ids={"token_ids": token_ids})
    assert asked == [["a cat"]]
    assert decoded["token_ids"].tolist() == [1, 2, 3]
    assert "text" not in decoded


@pytest.mark.parametrize("member", [LATENTS_MEMBER, TEXT_MEMBER])
def test_a_missing_member_is_a_bad_sample(sample: dict[str, Any], member: str) -> None:
    del sample[member]
    with pytest.raises(BadSampleError, match="these are not latent shards") as caught:
        decode_latents(sample)
    assert caught.value.reason == f"no {member}"


@pytest.mark.parametrize("member", [LATENTS_MEMBER, TEXT_MEMBER])
@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-3], lambda data: b"x" * 20 + data[20:]])
def test_a_damaged_member_is_a_bad_sample(sample: dict[str, Any], member: str, damage: Any) -> None:
    sample[member] = damage(sample[member])
    with pytest.raises(BadSampleError) as caught:
        decode_latents(sample)
    assert caught.value.reason == f"broken {member}"


def test_latents_of_another_shape_are_a_bad_sample(sample: dict[str, Any]) -> None:
    sample[LATENTS_MEMBER] = sample[TEXT_MEMBER]
    with pytest.raises(BadSampleError, match=r"\(5, 3\) is not \(2, C, h, w\)") as caught:
        decode_latents(sample)
    assert caught.value.reason == "latents of another shape"


def test_pickled_members_are_not_opened(sample: dict[str, Any]) -> None:
    import io

    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    sample[LATENTS_MEMBER] = buffer.getvalue()
    with pytest.raises(BadSampleError) as caught:
        decode_latents(sample)
    assert caught.value.reason == f"broken {LATENTS_MEMBER}"

"""EfficientNet-Lite0 features: the real weights on pictures that they know."""

from __future__ import annotations

import pytest
import torch

from fewstep.errors import DataError
from fewstep.evaluate.features import FEATURE_DIM, Lite0Features, limited_threads


def noise_pictures(count: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def test_features_are_the_same_for_any_batch_size_and_repeat(lite0: Lite0Features) -> None:
    pictures = noise_pictures(5, 32)
    first = lite0(pictures)
    assert first.shape == (5, FEATURE_DIM)
    assert torch.equal(first, lite0(pictures))
    one_by_one = torch.cat([lite0(picture[None]) for picture in pictures])
    torch.testing.assert_close(first, one_by_one, atol=1e-4, rtol=1e-4)


def test_the_weights_know_what_a_real_photograph_shows(lite0: Lite0Features) -> None:
    """With the classifier's own last layer; wrong scaling or channel order loses it."""
    from sklearn.datasets import load_sample_image

    temple = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None]
    top = lite0._network._fc(lite0(temple)).topk(5).indices[0].tolist()
    stupa, monastery = 832, 663
    assert top[0] == stupa
    assert monastery in top


def test_features_tell_a_blurred_set_from_the_set(lite0: Lite0Features) -> None:
    small = noise_pictures(1, 8)
    enlarged = torch.nn.functional.interpolate(small, size=(96, 96), mode="nearest")
    smooth = torch.nn.functional.interpolate(small.float(), size=(96, 96), mode="bicubic").clamp(0, 255).to(torch.uint8)
    assert (lite0(enlarged) - lite0(smooth)).norm() > 5


@pytest.mark.parametrize("bad", [torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8, 3, dtype=torch.uint8)])
def test_other_pictures_are_refused(lite0: Lite0Features, bad: torch.Tensor) -> None:
    with pytest.raises(DataError, match="uint8 tensor"):
        lite0(bad)


def test_thread_count_is_put_back() -> None:
    before = torch.get_num_threads()
    with limited_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before

"""Which student a request is for."""

import pickle
from dataclasses import replace

import pytest

from fewstep.errors import SamplingError
from fewstep.serve.catalog import Catalog, NotLoadedError, StudentCard, find_models, resolve
from fewstep.serve.errors import InvalidRequestError


def card(model_id: str, steps: int, version: str | None = None) -> StudentCard:
    return StudentCard(
        id=model_id, version=version, width=16, height=16, num_inference_steps=steps, w_min=0.0, w_max=4.0,
        w_default=2.0, max_prompt_tokens=14, loaded_at_s=1,
    )  # fmt: skip


CARDS = (card("emoji", 4, "3"), card("emoji", 2, "4"), card("fast", 1))
CATALOG = Catalog(CARDS)


def choose(
    model: str | None = None, steps: int | None = None, guidance: float | None = None
) -> tuple[StudentCard, float]:
    return resolve(CATALOG, model=model, num_inference_steps=steps, guidance_scale=guidance)


def test_the_first_student_and_its_guidance_are_the_default() -> None:
    assert choose() == (CARDS[0], 3.0)


def test_the_step_count_chooses_among_all_or_within_the_model() -> None:
    assert choose(steps=1)[0] is CARDS[2]
    assert choose("emoji", 2)[0] is CARDS[1]
    assert choose("emoji@4")[0] is CARDS[1]


def test_a_wrong_step_count_lists_the_right_ones() -> None:
    with pytest.raises(InvalidRequestError, match="use 2, 4, or leave it out") as caught:
        choose("emoji", 1)
    assert (caught.value.param, caught.value.status) == ("num_inference_steps", 400)


def test_an_unknown_model_lists_the_known_ones() -> None:
    with pytest.raises(InvalidRequestError, match="use one of emoji, fast") as caught:
        find_models(CATALOG, "dall-e-3")
    assert (caught.value.code, caught.value.status) == ("model_not_found", 404)


def test_a_version_that_has_gone_names_the_one_that_came() -> None:
    with pytest.raises(
        InvalidRequestError, match="'fast@1' is not served here, another version is: name fast@2, or fast "
    ):
        find_models(Catalog((card("fast", 1, "2"),)), "fast@1")


def test_a_model_without_a_version_is_waited_for_and_hides_no_other() -> None:
    uri = "models:/slow@champion"
    waiting = Catalog((card("fast", 1),), (uri,))
    assert find_models(waiting, None) == [card("fast", 1)]
    for name in ("slow", "slow@2"):
        with pytest.raises(NotLoadedError, match=f"There is no version of {uri} yet"):
            find_models(waiting, name)
    with pytest.raises(NotLoadedError, match=uri):
        find_models(Catalog((), (uri,)), None)
    with pytest.raises(InvalidRequestError, match="use one of fast, slow"):
        find_models(waiting, "dall-e-3")
    other_alias = Catalog((card("slow", 1, "3"),), (uri,))
    with pytest.raises(InvalidRequestError, match="name slow@3"):
        find_models(other_alias, "slow@2")


@pytest.mark.parametrize("guidance", [0.9, 5.1])
def test_guidance_out_of_range_names_the_range_unless_it_is_meant(guidance: float) -> None:
    with pytest.raises(InvalidRequestError, match=r'outside 1 … 5.*"extrapolate": true'):
        choose(guidance=guidance)
    settings = {"model": None, "num_inference_steps": None, "guidance_scale": guidance}
    assert resolve(CATALOG, **settings, extrapolate=True) == (CARDS[0], guidance)


def test_a_student_of_one_weight_has_nothing_to_extrapolate() -> None:
    single = Catalog((replace(CARDS[0], w_min=2.0, w_max=2.0),))
    settings = {"model": None, "num_inference_steps": None, "extrapolate": True}
    assert resolve(single, guidance_scale=3.0, **settings)[1] == 3.0
    with pytest.raises(InvalidRequestError, match="no effect on emoji, which was made for 3 alone"):
        resolve(single, guidance_scale=4.0, **settings)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_the_ends_of_the_guidance_range_are_in_it(guidance: float) -> None:
    assert choose(guidance=guidance)[1] == guidance


def test_the_refusal_keeps_its_fields_between_processes() -> None:
    error = pickle.loads(pickle.dumps(InvalidRequestError("no", param="n", code="c", status=404)))
    assert isinstance(error, SamplingError)
    assert (str(error), error.param, error.code, error.status) == ("no", "n", "c", 404)

"""The request body: what is taken, what is refused, and with which field and code."""

import pytest
from pydantic import ValidationError

from fewstep.serve.errors import describe_validation_error
from fewstep.serve.wire import ImageGenerationRequest


def refusal(body: dict[str, object]) -> tuple[str, str | None, str]:
    with pytest.raises(ValidationError) as caught:
        ImageGenerationRequest.model_validate(body)
    return describe_validation_error(caught.value.errors())


def test_only_the_prompt_is_required() -> None:
    request = ImageGenerationRequest.model_validate({"prompt": "a red apple"})
    assert (request.n, request.seed, request.model) == (None, None, None)


def test_every_field_that_the_client_knows_is_taken() -> None:
    ImageGenerationRequest.model_validate(
        {
            "prompt": "a red apple", "model": "emoji", "n": 10, "size": "auto", "response_format": "b64_json",
            "output_format": "webp", "output_compression": 80, "quality": "hd",
            "style": "vivid",
            "background": "opaque", "moderation": "low", "user": "u", "safety_identifier": "s",
            "stream": False, "partial_images": 0,
            "complexity": None, "frame_count": None, "frame_duration_ms": None, "svg": None,
            "seed": 7, "num_inference_steps": 4, "guidance_scale": 3, "extrapolate": True, "negative_prompt": None,
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "param", "code", "words"),
    [
        ({"prompt": None}, "prompt", "invalid_type", "string"),
        ({"prompt": "  \n"}, "prompt", "empty_prompt", "say what to draw"),
        ({"prompt": "a" * 32_001}, "prompt", "invalid_value", "32000"),
        ({"n": 0}, "n", "invalid_value", "greater than or equal to 1"),
        ({"n": 11}, "n", "invalid_value", "less than or equal to 10"),
        ({"n": "two"}, "n", "invalid_type", "integer"),
        ({"n": True}, "n", "invalid_type", "integer"),
        ({"seed": -1}, "seed", "invalid_value", "0"),
        ({"seed": 2**32}, "seed", "invalid_value", "4294967296"),
        ({"guidance_scale": float("nan")}, "guidance_scale", "invalid_value", "finite"),
        ({"response_format": "url"}, "response_format", "unsupported_value", "b64_json"),
        ({"output_format": "gif"}, "output_format", "unsupported_value", "png, webp or jpeg"),
        ({"output_compression": 101}, "output_compression", "invalid_value", "100"),
        ({"background": "transparent"}, "background", "unsupported_value", "opaque"),
        ({"quality": "best"}, "quality", "invalid_value", "standard"),
        ({"stream": True}, "stream", "unsupported_value", "not supported yet"),
        ({"partial_images": 2}, "partial_images", "unsupported_value", "leave out"),
        ({"frame_count": 9}, "frame_count", "unsupported_parameter", "leave it out"),
        ({"extrapolate": "yes"}, "extrapolate", "invalid_type", "boolean"),
        ({"negative_prompt": ""}, "negative_prompt", "unsupported_parameter", "no effect"),
        ({"negative_prompt": "blurry"}, "negative_prompt", "unsupported_parameter", "no effect"),
        ({"num_inference_step": 4}, "num_inference_step", "unknown_parameter", "did you mean 'num_inference_steps'?"),
        ({"zzz": 4}, "zzz", "unknown_parameter", "known fields are"),
    ],
)
def test_refused_with_field_code_and_words(change: dict[str, object], param: str, code: str, words: str) -> None:
    message, got_param, got_code = refusal({"prompt": "a red apple"} | change)
    assert (got_param, got_code) == (param, code)
    assert words in message


def test_a_missing_prompt_says_what_to_send() -> None:
    message, param, code = refusal({"n": 2})
    assert (param, code) == ("prompt", "missing_required_parameter")
    assert '{"prompt": "a red apple"}' in message


def test_a_long_value_is_not_echoed_whole() -> None:
    message, _, _ = refusal({"prompt": "a", "quality": "x" * 10_000})
    assert len(message) < 400


def test_braces_in_a_refused_value_do_not_break_the_message() -> None:
    message, _, code = refusal({"prompt": "a", "output_format": "{x}"})
    assert code == "unsupported_value"
    assert "png, webp or jpeg" in message

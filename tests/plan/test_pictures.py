"""Plans of trainings that read pictures and make latents themselves (encode.store_latents: false), by hand."""

from __future__ import annotations

from typing import Any

import pytest

from fewstep.plan import Plan, Step, plan_data_of, plan_recipe, render_data
from fewstep.plan.memory import RESERVE_BYTES, memory_of
from fewstep.plan.network import Network, forward_pass, sizes, training_pass
from fewstep.plan.rates import shipped_rates
from fewstep.plan.teacher import find_shape
from fewstep.plan.work import Training, work_of
from fewstep.recipe import Recipe, load_recipe, parse_recipe

TRAIN = {"updates": 10, "global_batch_size": 64, "learning_rate": 1.0e-4, "precision": "bfloat16"}

#: Bytes of the emoji teacher's picture: PNG of 32 px at 2.5 a pixel, caption, JSON file; in blocks of 512, with heads.
PICTURE = (512 + 2560) + (512 + 512) + (512 + 512)

#: Numbers of its latents (mean and deviation, 4 × 8 × 8 each) and text embeddings.
LATENTS, TEXT = 2 * 256, 24 * 160

H100_BFLOAT16, H100_FLOAT32 = 989.4e12, 494.7e12


def recipe_of(**changes: Any) -> Recipe:
    return parse_recipe(
        {
            "name": "small",
            "stages": ["prepare", "encode", "convert", "guidance", "progressive"],
            "teacher": "asset:emoji-teacher",
            "prepare": {"resolution": 32, "num_train": 5000, "num_evaluate": 300},
            "convert": {"prediction_type": "epsilon", "train": TRAIN},
            "guidance": {"embedding_dim": 256, "train": TRAIN},
            "progressive": {"ladder": [4, 2], "train": TRAIN},
            "stream": {"num_streams": 8},
            **changes,
        }
    )


def both(recipe: Recipe, **options: Any) -> tuple[Plan, Plan]:
    """Return the plan with latents that are stored, and with latents made in training."""
    settings = recipe.encode.model_copy(update={"store_latents": False})
    return plan_recipe(recipe, **options), plan_recipe(recipe.model_copy(update={"encode": settings}), **options)


def flops_of(recipe: Recipe) -> tuple[float, float]:
    """Return the FLOPs of encoding one picture and one caption."""
    shape = find_shape(recipe)
    vae, text = Network.of(shape, "vae_encoder"), Network.of(shape, "text_encoders")
    return forward_pass(vae, bfloat16=False).flops, forward_pass(text, bfloat16=False).flops


def test_every_training_reads_pictures_and_encodes_them_and_their_captions() -> None:
    recipe = recipe_of()
    stored, made = both(recipe, gpu="h100", mfu=0.5)
    vae, text = flops_of(recipe)
    weights = sum(sizes(Network.of(find_shape(recipe), role)).weights for role in ("autoencoder", "text_encoders"))
    assert [step.name for step in made.trainings] == ["convert", "stage one", "4 steps", "2 steps"]
    for first, second in zip(stored.trainings, made.trainings, strict=True):
        assert (first.reads_pictures, second.reads_pictures) == (False, True)
        assert second.sample_bytes == PICTURE
        assert second.read_bytes == 640 * PICTURE
        assert second.flops == pytest.approx(first.flops + vae + text, rel=1e-12)
        # The encoders' own precision is float32, of half the speed.
        seconds = second.samples * (first.flops / (0.5 * H100_BFLOAT16) + (vae + text) / (0.5 * H100_FLOAT32))
        assert second.gpu_seconds == pytest.approx(seconds)
        assert second.memory.frozen == first.memory.frozen + 4 * weights
        # The update's pictures and those at work, uint8, and what is made of the latter in float32.
        assert second.memory.inputs == (64 + 64) * 3 * 32**2 + 64 * 4 * (LATENTS + TEXT)
        assert second.stored_bytes == first.stored_bytes
    assert made.total("stored_bytes") < stored.total("stored_bytes")


def test_text_is_made_once_whatever_store_text_says() -> None:
    _, made = both(recipe_of())
    _, without = both(recipe_of(encode={"store_text": False}))
    assert made.steps == without.steps


def test_bfloat16_makes_latents_twice_as_fast() -> None:
    recipe = recipe_of(encode={"precision": "bfloat16"})
    _, made = both(recipe, gpu="h100", mfu=0.5)
    for step in made.trainings:
        assert step.gpu_seconds == pytest.approx(step.samples * step.flops / (0.5 * H100_BFLOAT16))
    frozen = {**TRAIN, "frozen_dtype": "bfloat16"}
    _, cast = both(recipe_of(guidance={"embedding_dim": 256, "train": frozen}), gpu="h100", mfu=0.5)
    assert cast.trainings[1].gpu_seconds == pytest.approx(made.trainings[1].gpu_seconds)


def test_text_alone_is_made_in_float32() -> None:
    recipe = recipe_of(encode={"store_text": False, "precision": "bfloat16"})
    _, text = flops_of(recipe)
    step = plan_recipe(recipe, gpu="h100", mfu=0.5).trainings[0]
    seconds = (step.flops - text) / (0.5 * H100_BFLOAT16) + text / (0.5 * H100_FLOAT32)
    assert step.gpu_seconds == pytest.approx(step.samples * seconds)


@pytest.mark.parametrize("changes", [{}, {"encode": {"store_text": False}}], ids=["with text", "without"])
def test_encode_makes_held_out_latents_alone(changes: dict[str, Any]) -> None:
    stored, made = both(recipe_of(**changes), num_workers=4)
    first, second = stored.steps[0], made.steps[0]
    assert (first.label, first.samples, first.num_gpus) == ("encode", 5000, 4)
    assert (second.label, second.samples, second.num_gpus) == ("encode, held-out pictures", 300, 1)
    assert second.flops == first.flops
    assert second.read_bytes == 300 * PICTURE
    # Latents of 128 + 2 · 512 bytes and a text of 128 + 2 · 3840 in .npy; they keep their text.
    assert second.stored_bytes == 300 * ((512 + 1536) + (512 + 7 * 1024 + 1024) + 2 * (512 + 512))
    assert second.memory == first.memory


def test_held_out_shards_of_ones_own_are_taken_to_hold_as_many_as_are_judged() -> None:
    named = {"stages": ["encode", "guidance"], "prepare": None, "progressive": None, "convert": None}
    data = {"train": "s3://b/train", "evaluate": "s3://b/held-out"}
    _, made = both(recipe_of(**named, data=data, evaluate={"num_prompts": 77}))
    assert made.steps[0].samples == 77


def inpainting() -> Recipe:
    return recipe_of(
        stages=["prepare", "teacher", "encode", "guidance"],
        teacher=None,
        convert=None,
        progressive=None,
        train_teacher={"init": "asset:emoji-teacher", "inpainting": True, "train": TRAIN},
    )


def test_inpainting_encodes_a_second_picture_with_its_hole() -> None:
    recipe = inpainting()
    stored, made = both(recipe)
    vae, text = flops_of(recipe)
    first, second = stored.trainings[-1], made.trainings[-1]
    assert second.name == "stage one"
    assert second.flops == pytest.approx(first.flops + 2 * vae + text, rel=1e-12)
    # A hole has a byte a pixel; of mask and masked latents 64 and 256 numbers are made.
    assert second.memory.inputs == (64 + 64) * 4 * 32**2 + 64 * 4 * (LATENTS + TEXT + 64 + 256)


def test_the_teacher_is_trained_on_its_own_latents_in_any_case() -> None:
    stored, made = both(inpainting())
    of_teacher = [step for step in made.steps if step.stage == "teacher"]
    assert [step.name for step in of_teacher] == ["encode for the teacher", "teacher"]
    assert of_teacher == [step for step in stored.steps if step.stage == "teacher"]


def test_classes_in_latents_have_no_text_to_make() -> None:
    recipe = load_recipe("workflows/recipes/emoji-classes.yaml")
    stored, made = both(recipe)
    shape = find_shape(recipe)
    vae = Network.of(shape, "vae_encoder")
    for first, second in zip(stored.trainings, made.trainings, strict=True):
        if first.stage == "teacher":
            assert second == first
            continue
        assert second.reads_pictures
        assert second.flops == pytest.approx(first.flops + forward_pass(vae, bfloat16=False).flops, rel=1e-12)
        assert second.memory.frozen == first.memory.frozen + 4 * sizes(vae).weights


def test_nothing_changes_for_teachers_in_pixels() -> None:
    stored, made = both(load_recipe("workflows/recipes/cifar10.yaml"))
    assert made == stored


def test_memory_of_stable_diffusions_encoders() -> None:
    train = {**TRAIN, "micro_batch_size": 32, "gradient_checkpointing": True}
    recipe = recipe_of(
        stages=["encode", "guidance"],
        teacher="stable-diffusion-v1-5/stable-diffusion-v1-5",
        prepare=None,
        convert=None,
        progressive=None,
        data={"train": "s3://b/train", "evaluate": "s3://b/held-out"},
        guidance={"embedding_dim": 256, "train": train},
        encode={"store_latents": False},
    )
    shape = find_shape(recipe)
    training = next(each for each in work_of(recipe, shape) if isinstance(each, Training))
    found = memory_of(training, training.settings, shape, num_workers=1)
    unet, vae, text = 859_520_964, 83_653_863, 123_060_480
    assert found.frozen == 4 * (unet + vae + text)
    # Pictures of 512 px go through the VAE 16 at a time, which takes more than 32 rows in the recomputed U-Net.
    encoding = forward_pass(Network.of(shape, "vae_encoder"), bfloat16=False)
    student = training_pass(training.network, bfloat16=True, checkpointing=True).peak_bytes(32)
    assert found.activations == encoding.peak_bytes(16) > student
    assert found.reserve == RESERVE_BYTES + round(0.08 * found.activations)
    one = memory_of(training, training.settings.model_copy(update={"micro_batch_size": 1}), shape, num_workers=1)
    assert one.activations < found.activations


def readings_of(**encode: Any) -> tuple[Step, Any]:
    recipe = recipe_of(
        stages=["prepare", "encode", "guidance"], convert=None, progressive=None,
        stream={"num_streams": 8, "loader_processes": 2, "cache_bytes": 1000},
        encode={"store_latents": False, **encode},
    )  # fmt: skip
    plan = plan_recipe(recipe, num_samples=7_000_000, num_workers=4)
    return plan.trainings[0], plan_data_of(plan, recipe, shards=1000)


def test_the_data_path_carries_and_decodes_pictures() -> None:
    rates = shipped_rates()
    step, data = readings_of()
    (reading,) = data.readings  # of the stage encode there is none
    assert reading.label == "guidance, stage one"
    assert reading.samples_per_s == pytest.approx(640 / step.seconds)
    assert reading.bytes_per_s == pytest.approx(reading.samples_per_s * PICTURE)
    assert reading.requests_per_s == pytest.approx(reading.bytes_per_s / (8 * 2**20))
    # Of pictures of 32 px a core decodes 16² times as many as of 512.
    assert reading.cores_per_gpu == pytest.approx(reading.samples_per_s / 4 / (rates.pictures_per_s * 16**2))
    # As in test_data, but three batches of 16 decoded pictures.
    held = 2 * 2 * (64 + 8) * 2**20 + 2 * 4 * 8 * 2**20 + 3 * 1000 * rates.shard_bytes_in_memory + 1000
    assert data.worker_memory_bytes == pytest.approx(held + 3 * 16 * 3 * 32**2)
    assert data.encoding is None
    assert "TMPDIR" not in render_data(data)


def test_pictures_wait_for_others_of_their_size() -> None:
    plain, grouped = (readings_of(**encode)[1] for encode in ({}, {"buckets": {"multiple_of": 8}}))
    # 24 × 40, 32 × 32 and 40 × 24; of groups of eight rows seven wait, in the worker's two streams.
    assert grouped.worker_memory_bytes - plain.worker_memory_bytes == pytest.approx(2 * 3 * 7 * 3 * 32**2)

"""A plan's figures on small recipes against numbers made by hand, and what it says of training that does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from fewstep.cli import main
from fewstep.data.latents import latent_sample
from fewstep.data.shards import write_shard
from fewstep.errors import FewstepError
from fewstep.plan import Plan, find_gpu, plan_recipe, render
from fewstep.plan.gpus import GIB, GPUS
from fewstep.plan.memory import RESERVE_BYTES, Memory, memory_of
from fewstep.plan.network import Network, forward_pass, sizes, training_pass, weights_of_parts
from fewstep.plan.switches import what_would_fit
from fewstep.plan.teacher import find_shape
from fewstep.plan.transfer import sample_bytes
from fewstep.plan.work import Training, work_of
from fewstep.recipe import Recipe, parse_recipe
from fewstep.storage import Storage

TRAIN = {"updates": 10, "global_batch_size": 64, "learning_rate": 1.0e-4, "precision": "bfloat16"}


def recipe_of(**changes: Any) -> Recipe:
    return parse_recipe(
        {
            "name": "small",
            "stages": ["prepare", "encode", "guidance", "progressive"],
            "teacher": "asset:emoji-teacher",
            "prepare": {"resolution": 32, "num_train": 5000},
            "guidance": {"embedding_dim": 256, "train": TRAIN},
            "progressive": {"ladder": [4, 2, 1], "updates": {1: 30}, "train": TRAIN},
            **changes,
        }
    )


def trainings(recipe: Recipe) -> dict[str, Training]:
    work = work_of(recipe, find_shape(recipe))
    return {each.name: each for each in work if isinstance(each, Training)}


SHAPE = find_shape(recipe_of())
TEACHER = Network.of(SHAPE)
STUDENT = TEACHER.with_weight(256)


def memory(training: Training, num_workers: int = 1, **settings: Any) -> Memory:
    return memory_of(training, training.settings.model_copy(update=settings), SHAPE, num_workers=num_workers)


def test_rows_at_once_are_those_of_one_shape() -> None:
    """With aspect-ratio buckets a micro-batch is a stream's group, where the recipe does not say less."""
    batch = TRAIN["global_batch_size"]
    plain = trainings(recipe_of(stream={"num_streams": 8}))["stage one"]
    grouped = trainings(recipe_of(stream={"num_streams": 8}, encode={"buckets": {}}))["stage one"]
    assert plain.settings.micro_batch_size is None
    assert grouped.settings.micro_batch_size == batch // 8
    assert memory(grouped) == memory(plain, micro_batch_size=batch // 8) != memory(plain)
    train = {**TRAIN, "global_batch_size": 96}
    of_twelve = recipe_of(
        stream={"num_streams": 8}, encode={"buckets": {}}, guidance={"embedding_dim": 256, "train": train}
    )
    training = trainings(of_twelve)["stage one"]
    enough = memory(training, micro_batch_size=8).total
    ways = what_would_fit(training, SHAPE, num_workers=1, memory_bytes=enough)
    sizes = [way.changes["micro_batch_size"] for way in ways if "micro_batch_size" in way.changes]
    assert sizes[0] == 6  # 8 would fit, but does not divide 12
    assert all(12 % size == 0 for size in sizes)
    said = recipe_of(encode={"buckets": {}}, guidance={"train": {**TRAIN, "micro_batch_size": 1}})
    assert trainings(said)["stage one"].settings.micro_batch_size == 1


def test_time_and_bytes_by_hand() -> None:
    plan = plan_recipe(recipe_of(), gpu="h100", mfu=0.5)
    assert [(step.stage, step.name) for step in plan.steps] == [
        ("encode", "encode"),
        ("guidance", "stage one"),
        ("progressive", "4 steps"),
        ("progressive", "2 steps"),
        ("progressive", "1 step"),
    ]
    encode, guidance, _, two, one = plan.steps
    update = training_pass(STUDENT, bfloat16=True, checkpointing=False).flops
    assert guidance.flops == update + 2 * forward_pass(TEACHER, bfloat16=True).flops
    assert two.flops == update + 2 * forward_pass(STUDENT, bfloat16=True).flops
    assert (guidance.samples, two.samples, one.samples) == (640, 640, 1920)
    assert guidance.gpu_seconds == pytest.approx(640 * guidance.flops / (0.5 * 989.4e12))
    assert guidance.seconds == guidance.gpu_seconds
    # Encoding is the driver's alone, in float32.
    vae, text = (
        forward_pass(Network.of(SHAPE, role), bfloat16=False).flops for role in ("vae_encoder", "text_encoders")
    )
    assert encode.gpu_seconds == pytest.approx(5000 * (vae + text) / (0.5 * 494.7e12))
    each = sample_bytes(SHAPE)
    assert encode.read_bytes == 5000 * each.picture
    assert encode.stored_bytes == encode.written_bytes == 5000 * each.latents
    # So few samples that they are kept after the first reading.
    assert guidance.read_bytes == 640 * each.latents
    assert plan_recipe(recipe_of(), num_samples=100).steps[1].read_bytes == 100 * each.latents
    assert guidance.stored_bytes == 4 * weights_of_parts(SHAPE)
    assert guidance.written_bytes == guidance.stored_bytes + 12 * sizes(STUDENT).weights
    assert guidance.checkpoint_bytes == 2 * 12 * sizes(STUDENT).weights
    assert plan.gpu_hours == pytest.approx(sum(step.gpu_seconds for step in plan.steps) / 3600)


def test_sources_that_are_mixed_are_planned_as_one_data_set() -> None:
    sources = [{"uri": "s3://b/laion", "weight": 3}, {"uri": "s3://b/own"}]
    named = {"stages": ["encode", "guidance"], "prepare": None, "progressive": None}
    mixed = plan_recipe(recipe_of(**named, data={"train": sources, "evaluate": "s3://b/held-out"}))
    one = plan_recipe(recipe_of(**named, data={"train": "s3://b/laion", "evaluate": "s3://b/held-out"}))
    assert (mixed.num_samples, mixed.steps) == (one.num_samples, one.steps)
    assert "stage one" in render(mixed)


def test_workers_share_the_time_of_trainings_and_of_encoding() -> None:
    alone, four = plan_recipe(recipe_of()), plan_recipe(recipe_of(), num_workers=4)
    assert four.gpu_hours == pytest.approx(alone.gpu_hours)
    assert four.steps[1].seconds == pytest.approx(alone.steps[1].seconds / 4)
    assert four.steps[0].seconds == pytest.approx(alone.steps[0].seconds / 4)
    here = plan_recipe(recipe_of(encode={"encoders": 1}), num_workers=4)
    assert here.steps[0].seconds == alone.steps[0].seconds


def test_latents_without_text_are_smaller_and_cost_the_text_encoder() -> None:
    with_text, without = plan_recipe(recipe_of()), plan_recipe(recipe_of(encode={"store_text": False}))
    each = sample_bytes(SHAPE)
    assert each.latents_alone == each.latents_without_text < each.latents
    for first, second in zip(with_text.trainings, without.trainings, strict=True):
        assert second.sample_bytes == each.latents_without_text
        text = forward_pass(Network.of(SHAPE, "text_encoders"), bfloat16=False).flops
        assert second.flops == first.flops + text
        assert second.memory.frozen == first.memory.frozen + 4 * sizes(Network.of(SHAPE, "text_encoders")).weights
    assert without.steps[0].stored_bytes == without.num_samples * each.latents_without_text
    faster = plan_recipe(recipe_of(encode={"precision": "bfloat16"}))
    assert faster.steps[0].seconds < with_text.steps[0].seconds


@pytest.mark.parametrize(
    ("settings", "calls"),
    [
        ({"ladder": [8, 4]}, {"8 steps": 2, "4 steps": 2}),
        ({"ladder": [8, 2]}, {"8 steps": 2, "2 steps": 4}),
        ({"ladder": [8, 4], "first_teacher_steps": 64}, {"8 steps": 8, "4 steps": 2}),
        ({"ladder": [2, 1], "kinds": ["stochastic"]}, {"stochastic-2 steps": 2, "stochastic-1 step": 1}),
        ({"ladder": [4, 2], "trajectory_inputs": True}, {"4 steps": 10, "2 steps": 6}),
    ],
    ids=lambda value: "",
)
def test_calls_of_the_teacher(settings: dict[str, Any], calls: dict[str, int]) -> None:
    found = trainings(recipe_of(progressive={"train": TRAIN, **settings}))
    assert {name: each.teacher_calls for name, each in found.items() if name != "stage one"} == calls


def test_ladders_of_guided_teachers() -> None:
    progressive = {"ladder": [4, 2], "kinds": ["naive", "single_w"], "single_w": [1.0], "train": TRAIN}
    found = trainings(recipe_of(progressive=progressive))
    rows = {name: (each.rows, each.teacher_rows) for name, each in found.items()}
    assert rows == {
        "stage one": (1, 2),
        "naive-4 steps": (2, 2),
        "naive-2 steps": (2, 2),
        "single_w-1-4 steps": (1, 2),
        "single_w-1-2 steps": (1, 1),
    }
    assert {each.network for name, each in found.items() if name != "stage one"} == {TEACHER}


def test_convert_and_teacher_stages() -> None:
    convert = {"prediction_type": "epsilon", "train": TRAIN}
    found = trainings(recipe_of(stages=["prepare", "encode", "convert", "guidance"], convert=convert))
    assert found["convert"].teacher is None
    plan = plan_recipe(
        parse_recipe(
            {
                "name": "small",
                "stages": ["prepare", "teacher"],
                "prepare": {"resolution": 32},
                "train_teacher": {"autoencoder_train": TRAIN, "train": TRAIN},
            }
        )
    )
    assert [step.name for step in plan.steps] == ["autoencoder", "encode for the teacher", "teacher"]
    assert plan.shape == "train_teacher"
    assert plan.steps[0].stored_bytes == 4 * sizes(Network.of(SHAPE, "autoencoder")).weights


def test_memory_of_one_worker_by_hand() -> None:
    training = trainings(recipe_of())["4 steps"]
    weights = sizes(STUDENT).weights
    found = memory(training)
    peak = training_pass(STUDENT, bfloat16=True, checkpointing=False).peak_bytes(64)
    assert (found.weights, found.gradients, found.moments) == (4 * weights, 4 * weights, 8 * weights)
    assert (found.frozen, found.average, found.gathered) == (4 * weights, 0, 0)
    assert found.activations == peak
    assert found.reserve == RESERVE_BYTES + round(0.08 * peak)
    sample = 2 * 2 * 4 * 8 * 8 + 2 * 24 * 160
    assert found.inputs == (64 + 64) * sample
    assert found.total == 20 * weights + peak + found.inputs + found.reserve


def test_settings_that_move_memory() -> None:
    training = trainings(recipe_of())["stage one"]
    weights, teacher = sizes(STUDENT).weights, sizes(TEACHER).weights
    usual = memory(training)
    assert usual.frozen == 4 * teacher
    assert memory(training, frozen_dtype="bfloat16").frozen == 2 * teacher
    assert memory(training, ema_decay=0.9).average == 4 * weights
    on_host = memory(training, ema_decay=0.9, ema_device="cpu")
    assert (on_host.average, on_host.host_average) == (0, 8 * weights)
    assert on_host.total == usual.total
    halves = memory(training, micro_batch_size=32)
    assert halves.activations == training_pass(STUDENT, bfloat16=True, checkpointing=False).peak_bytes(32)
    assert memory(training, num_workers=2).activations == halves.activations
    assert memory(training, gradient_checkpointing=True).activations < usual.activations
    assert memory(training, precision="float32").activations > usual.activations


def test_fsdp_shares_out_weights_and_gathers_units() -> None:
    training = trainings(recipe_of())["stage one"]
    whole, teacher = sizes(STUDENT), sizes(TEACHER)
    found = memory(training, num_workers=4, strategy="fsdp", ema_decay=0.9)
    assert (found.weights, found.moments, found.average) == (whole.weights, 2 * whole.weights, whole.weights)
    assert found.gradients == whole.weights
    assert found.frozen == 4 * teacher.weights
    assert found.gathered == 4 * (whole.outside + 2 * whole.around + 4 * whole.largest_unit)
    assert 0 < whole.outside < whole.largest_unit < whole.weights
    # Gradients are added up whole from micro-batch to micro-batch.
    summed = memory(training, num_workers=4, strategy="fsdp", micro_batch_size=8)
    assert summed.gradients == whole.weights + 4 * whole.weights
    assert memory(training, num_workers=4, strategy="fsdp", shard_frozen=True).frozen == teacher.weights
    assert memory(training, strategy="fsdp") == memory(training)  # one worker keeps all


def test_adapters_train_little_and_keep_the_base() -> None:
    lora = {"rank": 4, "target_modules": ["to_q", "to_k"]}
    recipe = recipe_of(progressive={"ladder": [4], "lora": lora, "train": TRAIN})
    training, usual = trainings(recipe)["4 steps"], trainings(recipe_of())["4 steps"]
    found, whole = memory(training), memory(usual)
    adapters = found.moments // 8
    assert 0 < adapters < 0.02 * sizes(STUDENT).weights
    assert found.gradients == 4 * adapters
    assert found.weights == whole.weights + 4 * adapters
    steps = {name: plan_recipe(r).steps[2].flops for name, r in (("lora", recipe), ("whole", recipe_of()))}
    assert steps["whole"] - steps["lora"] == pytest.approx(forward_pass(STUDENT, bfloat16=True).flops)


def test_features_of_the_teacher_cost_passes_of_its_encoder() -> None:
    recipe = recipe_of(progressive={"ladder": [4], "error": "features", "train": TRAIN})
    more = plan_recipe(recipe).steps[2].flops - plan_recipe(recipe_of()).steps[2].flops
    encoder = forward_pass(Network.of(SHAPE, "encoder"), bfloat16=True).flops
    assert more == pytest.approx(3 * encoder)
    assert 0.1 < encoder / forward_pass(TEACHER, bfloat16=True).flops < 0.6


def test_a_latent_sample_takes_what_is_written(storage: Storage, bucket_uri: str) -> None:
    condition = {"text": torch.zeros(24, 160)}
    zeros = torch.zeros(4, 8, 8)
    samples = [latent_sample(f"{n:09}", "a" * 64, zeros, zeros, condition) for n in range(200)]
    shard = write_shard(samples, f"{bucket_uri}/0.tar", storage=storage)
    # A tar ends with padding up to 10,240 bytes.
    assert 200 * sample_bytes(SHAPE).latents <= shard.size_bytes <= 200 * sample_bytes(SHAPE).latents + 10240 + 1024


def fitting(training: Training, num_workers: int, memory_bytes: int) -> list[dict[str, Any]]:
    found = what_would_fit(training, SHAPE, num_workers=num_workers, memory_bytes=memory_bytes)
    for each in found:  # what is said is true
        settings = training.settings.model_copy(update=each.changes)
        assert memory_of(training, settings, SHAPE, num_workers=num_workers).total <= memory_bytes
    return [each.changes for each in found]


def test_switches_that_make_it_fit_are_found_by_trying() -> None:
    training = trainings(recipe_of())["stage one"]
    need = memory(training).total
    half = memory(training, micro_batch_size=32).total
    assert fitting(training, 1, need - 1)[0] == {"micro_batch_size": 32}
    assert fitting(training, 1, half - 1)[0] == {"micro_batch_size": 16}
    # All rows at once, by computing activations again.
    assert {"gradient_checkpointing": True} in fitting(training, 1, need - 1)
    assert fitting(training, 1, RESERVE_BYTES) == []


def test_sharing_out_is_tried_where_there_are_workers() -> None:
    training = trainings(recipe_of())["stage one"]
    least = memory(training, num_workers=4, gradient_checkpointing=True, micro_batch_size=1).total
    assert fitting(training, 1, least - 2**20) == []
    ways = fitting(training, 4, least - 2**20)
    assert ways
    assert all(changes["strategy"] == "fsdp" for changes in ways)


def test_an_average_goes_to_main_memory_before_anything_is_computed_again() -> None:
    training = trainings(recipe_of(guidance={"train": {**TRAIN, "ema_decay": 0.9, "micro_batch_size": 1}}))["stage one"]
    assert fitting(training, 1, memory(training).total - 1)[0] == {"ema_device": "cpu"}


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["plan", *(str(argument) for argument in arguments)])


DEMO = "workflows/recipes/demo.yaml"


def test_the_command_prints_a_table_or_json() -> None:
    result = call(DEMO, "--gpu", "a100-80", "--workers", "2")
    assert result.exit_code == 0, result.output
    for words in (
        "demo: asset:emoji-teacher",
        "shape emoji-teacher",
        "2 × a100-80 (79 GiB, 312 TFLOP/s in bfloat16) at an MFU of 40%; 8,000 training samples (prepare.num_train)",
        "guidance, stage one",
        "progressive, 1 step",
        "everything fits the 79 GiB of a100-80",
        "of checkpoints at a time",
        "in short: 2 × a100-80",
        "nothing was run",
    ):
        assert words in result.output
    content = json.loads(call(DEMO, "--json").output)
    assert content["fits"] is True
    assert content["gpu"]["name"] == "h100"
    assert content["steps"][1]["memory"]["total"] > RESERVE_BYTES
    assert content["gpu_hours"] == plan_of_demo().gpu_hours


def plan_of_demo() -> Plan:
    from fewstep.recipe import load_recipe

    return plan_recipe(load_recipe(DEMO))


def test_what_does_not_fit_is_said_once_a_stage_with_the_way_out() -> None:
    rows = {**TRAIN, "global_batch_size": 400_000}
    recipe = recipe_of(guidance={"train": rows}, progressive={"ladder": [4, 2, 1], "train": rows})
    plan = plan_recipe(recipe, gpu="l4")
    assert not plan.fits
    text = render(plan)
    assert text.count("DOES NOT FIT") == 2
    assert "DOES NOT FIT: guidance, stage one needs" in text
    assert "It would with, under the stage's train key:\n  micro_batch_size: " in text
    tiny = plan_recipe(recipe_of(), gpu="l4")
    assert "everything fits" in render(tiny)


def test_memory_of_the_drivers_passes_by_hand() -> None:
    judged = {"num_prompts": 200, "batch_size": 50, "steps": [4]}
    recipe = recipe_of(evaluate=judged, stages=[*recipe_of().stages, "evaluate"])
    steps = {step.name: step for step in plan_recipe(recipe).steps}
    denoiser, decoder, encoder, text = (
        Network.of(SHAPE, role) for role in ("denoiser", "vae_decoder", "vae_encoder", "text_encoders")
    )

    def most(*passes: tuple[Network, int]) -> int:
        return max(forward_pass(network, bfloat16=False).peak_bytes(rows) for network, rows in passes)

    encode, evaluate = steps["encode"].memory, steps["evaluate"].memory
    assert encode.weights == 4 * weights_of_parts(SHAPE)
    assert encode.activations == most((encoder, 64), (text, 64))
    # Beside the teacher one student at a time; guidance doubles the rows.
    assert evaluate.weights == 4 * (weights_of_parts(SHAPE) + sizes(TEACHER).weights)
    assert evaluate.activations == most((denoiser, 100), (decoder, 50), (encoder, 50))
    assert evaluate.total == evaluate.weights + evaluate.activations + evaluate.reserve


def test_the_drivers_passes_that_do_not_fit_name_their_key() -> None:
    recipe = recipe_of(encode={"batch_size": 100_000})
    text = render(plan_recipe(recipe, gpu="l4"))
    assert "DOES NOT FIT: encode needs" in text
    assert "Take a smaller encode.batch_size, or a GPU with more memory for the driver" in text


def test_a_narrow_fit_is_called_one() -> None:
    training = trainings(recipe_of())["stage one"]
    rows = 64
    while memory_total(training, 2 * rows) < 21 * GIB:
        rows *= 2
    rows = int(rows * 20 * GIB / memory_total(training, rows)) // 8 * 8
    recipe = recipe_of(guidance={"train": {**TRAIN, "global_batch_size": rows}}, stages=["prepare", "guidance"])
    assert "by less than the estimate may be wrong" in render(plan_recipe(recipe, gpu="l4"))


def memory_total(training: Training, rows: int) -> int:
    return memory(training, global_batch_size=rows).total


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "h1000"], "--gpu h1000: no such GPU is known here; take one of h100, h100-pcie"),
        (["--mfu", "40"], "--mfu 40 is outside 0 … 1: it is a share of the GPU's peak"),
        (["--mfu", "0"], "--mfu 0 is outside 0 … 1"),
        (["--workers", "0"], "--workers 0 is below 1"),
        (["--samples", "-1"], "--samples -1 is below 1"),
        (["--workers", "7"], "global_batch_size=32 cannot be shared equally by 7 workers"),
        (["--shape", "sd16"], "--shape sd16: no such shape is shipped"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], words: str) -> None:
    result = call(DEMO, *arguments)
    assert result.exit_code == 2
    assert result.output.startswith("error: ")
    assert words in result.output


def test_a_micro_batch_that_does_not_divide_a_worker_s_rows() -> None:
    recipe = recipe_of(guidance={"train": {**TRAIN, "micro_batch_size": 32}})
    with pytest.raises(FewstepError, match="micro_batch_size=32 does not divide the 16 rows"):
        plan_recipe(recipe, num_workers=4)


def test_of_elastic_workers_the_most_give_the_time_and_the_fewest_the_memory() -> None:
    bounds = {"num_workers": {"min": 3, "max": 7}, "use_gpu": True, "cpus_per_worker": 1}
    # Of eight streams two and four share equally; a micro-batch may be more than a worker's rows.
    train = {**TRAIN, "micro_batch_size": 32}
    plan = plan_recipe(recipe_of(cluster=bounds, guidance={"train": train}))
    fixed = {number: plan_recipe(recipe_of(cluster={"num_workers": number})) for number in (2, 4)}
    assert (plan.fewest_workers, plan.num_workers) == (2, 4)
    rung = next(step for step in plan.steps if step.name == "4 steps")
    of = {number: next(step for step in each.steps if step.name == "4 steps") for number, each in fixed.items()}
    assert rung.seconds == of[4].seconds < of[2].seconds
    assert rung.memory == of[2].memory != of[4].memory
    assert "the number of workers may change: time is for 4, the memory of a GPU for 2" in render(plan)
    assert "may change" not in render(fixed[4])


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_has_a_peak(name: str) -> None:
    gpu = find_gpu(name)
    assert gpu.flops_per_second("bfloat16") >= gpu.flops_per_second("float32") > 1e13

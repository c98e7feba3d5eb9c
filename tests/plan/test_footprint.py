"""The bytes and FLOPs that are counted on meta tensors are those of real passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from fewstep.diffusion import NoiseSchedule
from fewstep.diffusion.samplers import Model
from fewstep.models import SCHEDULER_CONFIG, make_student
from fewstep.models.text_latent import text_denoiser
from fewstep.plan.autocast import CudaRules
from fewstep.plan.footprint import forward_footprint, update_footprint

SCHEDULE = NoiseSchedule.from_scheduler_config(SCHEDULER_CONFIG)
SMALL_UNET: dict[str, Any] = {
    "sample_size": 16,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}


@pytest.fixture(autouse=True)
def attention_of_torch() -> Iterator[None]:
    """Undo what loading a small model does to the whole process: the plan counts torch's own attention."""
    before = torch.backends.cuda.flash_sdp_enabled()
    torch.backends.cuda.enable_flash_sdp(True)
    yield
    torch.backends.cuda.enable_flash_sdp(before)


def small_unet(device: str) -> UNet2DConditionModel:
    with torch.device(device):
        return UNet2DConditionModel(**SMALL_UNET).train()


def calls_of(unet: UNet2DConditionModel, device: str) -> Callable[[int], Tensor]:
    def call(rows: int) -> Tensor:
        with torch.device(device):
            z, text = torch.zeros(rows, 4, 16, 16), torch.zeros(rows, 8, 32)
            index = torch.zeros(rows, dtype=torch.int64)
        output: Tensor = unet(z, index, text, return_dict=False)[0]
        return output

    return call


def peak_of(run: Callable[[], Any]) -> int:
    """Return the most bytes that torch's own allocator had given out at once during a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    live = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_of_a_real_training_pass(checkpointing: bool) -> None:
    unet = small_unet("cpu")
    if checkpointing:
        unet.enable_gradient_checkpointing()
    meta = small_unet("meta")
    footprint = update_footprint(calls_of(meta, "meta"), meta, bfloat16=False, checkpointing=checkpointing)
    # Many rows, so that the gradients, which the footprint leaves out, weigh little at the fullest moment.
    rows, gradients = 24, 4 * sum(p.numel() for p in unet.parameters())
    real = peak_of(lambda: calls_of(unet, "cpu")(rows).square().mean().backward())
    assert footprint.peak_bytes(rows) == pytest.approx(real, rel=0.01)
    assert real <= footprint.peak_bytes(rows) + gradients


def test_peak_of_a_real_forward_pass() -> None:
    unet, meta = small_unet("cpu"), small_unet("meta")
    footprint = forward_footprint(calls_of(meta, "meta"), meta, bfloat16=False)
    with torch.no_grad():
        real = peak_of(lambda: calls_of(unet, "cpu")(24))
    assert footprint.peak_bytes(24) == pytest.approx(real, rel=0.05)


def test_what_autograd_keeps_is_what_it_really_keeps() -> None:
    unet, meta = small_unet("cpu"), small_unet("meta")
    kept = [_kept_bytes(small, calls_of(small, device)) for small, device in ((unet, "cpu"), (meta, "meta"))]
    assert kept[0] == kept[1]


def _kept_bytes(network: nn.Module, call: Callable[[int], Tensor]) -> int:
    kept: dict[int, Any] = {}
    weights = [p.untyped_storage() for p in network.parameters()]

    def keep(tensor: Tensor) -> Tensor:
        kept[id(tensor.untyped_storage())] = tensor.untyped_storage()
        return tensor

    # On the CPU attention is torch's own.
    rules = CudaRules(bfloat16=False, count=lambda flops: None) if weights[0].device.type == "meta" else nullcontext()
    with saved_tensors_hooks(keep, lambda tensor: tensor), rules:
        output = call(4)
    del output
    return sum(storage.nbytes() for key, storage in kept.items() if key not in {id(weight) for weight in weights})


def test_flops_are_those_of_torch_s_own_counter() -> None:
    """Attention is one fused operation here and products of matrices there: the same operations."""
    meta = small_unet("meta")
    call = calls_of(meta, "meta")
    with FlopCounterMode(display=False) as counter:
        call(1).mean().backward()
    assert update_footprint(call, meta, bfloat16=True).flops == pytest.approx(counter.get_total_flops(), rel=1e-3)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call(1)
    assert forward_footprint(call, meta, bfloat16=False).flops == pytest.approx(counter.get_total_flops(), rel=1e-3)


def mlp(device: str) -> nn.Module:
    with torch.device(device):
        return nn.Sequential(nn.Linear(64, 128, bias=False), nn.SiLU(), nn.Linear(128, 32, bias=False))


def test_two_layers_by_hand() -> None:
    network = mlp("meta")

    def call(rows: int) -> Tensor:
        return network(torch.empty(rows, 64, device="meta"))

    footprint = update_footprint(call, network, bfloat16=False)
    first, second = 2 * 64 * 128, 2 * 128 * 32
    # Both forward; backward the weights of both, and of the second what goes into it.
    assert footprint.flops == (first + second) + (first + second) + second
    assert forward_footprint(call, network, bfloat16=False).flops == first + second
    # The fullest moment: input, hidden and its SiLU are kept, the gradients of output and SiLU and of the second weight
    # are there, and two scalars of the loss.
    assert footprint.moments[-1] == (4 * (128 * 32 + 2), 4 * (64 + 128 + 128 + 32 + 128))
    assert footprint.peak_bytes(100) == 4 * (128 * 32 + 2) + 100 * 4 * 480
    # With few rows it is the end, when the first weight's gradient is made of the input and the gradient of hidden.
    assert footprint.peak_bytes(1) == 4 * (64 * 128 + 2) + 4 * (64 + 128)


def test_bfloat16_keeps_casts_of_the_weights_once_whatever_the_rows() -> None:
    network = mlp("meta")
    footprint = update_footprint(lambda rows: network(torch.empty(rows, 64, device="meta")), network, bfloat16=True)
    casts = 2 * (64 * 128 + 128 * 32)
    assert casts <= max(fixed for fixed, _ in footprint.moments) <= 3.1 * casts
    assert footprint.peak_bytes(1000) > footprint.peak_bytes(10) >= casts


def test_bfloat16_against_a_real_autocast() -> None:
    """Linear layers and SiLU have the same rules on a CPU as under CUDA; what normalises has not."""
    network, meta = mlp("cpu"), mlp("meta")

    def run() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = network(torch.zeros(512, 64))
            loss = output.float().square().mean()
        loss.backward()

    run()  # the first one makes the gradients
    real = peak_of(run)
    footprint = update_footprint(lambda rows: meta(torch.empty(rows, 64, device="meta")), meta, bfloat16=True)
    assert footprint.peak_bytes(512) == pytest.approx(real, rel=0.05)


def test_checkpointing_computes_again_and_keeps_less() -> None:
    meta = small_unet("meta")
    call = calls_of(meta, "meta")
    usual, again = (update_footprint(call, meta, bfloat16=True, checkpointing=on) for on in (False, True))
    forward = forward_footprint(call, meta, bfloat16=True)
    assert 3 * forward.flops * 0.97 < usual.flops <= 3 * forward.flops
    assert usual.flops < again.flops <= usual.flops + forward.flops
    assert again.peak_bytes(100) < 0.6 * usual.peak_bytes(100)
    assert not meta.is_gradient_checkpointing


def test_a_student_needs_half_the_activations_of_the_guided_pair() -> None:
    """Claim 23: one evaluation of B rows in place of one of 2B, in a real pass and in what the plan counts."""
    unet, rows = small_unet("cpu").eval().requires_grad_(False), 24
    student = make_student(unet, embedding_dim=16).eval().requires_grad_(False)
    sample = {"latents": torch.zeros(rows, 4, 16, 16), "text": torch.zeros(rows, 8, 32)}
    null = torch.zeros(1, 8, 32)
    teacher = text_denoiser(unet, null_embedding=null, schedule=SCHEDULE, prediction_type="v_prediction")
    learned = text_denoiser(student, null_embedding=None, schedule=SCHEDULE, prediction_type="v_prediction")
    condition, time = {"text": sample["text"]}, torch.zeros(rows, dtype=torch.int64)

    def peak(model: Model) -> int:
        with torch.no_grad():
            return peak_of(lambda: model(sample["latents"], time))

    pair, alone = peak(teacher.guided(condition, 3.0)), peak(learned.conditional(condition, 3.0))
    assert alone == pytest.approx(pair / 2, rel=0.05)
    counted = forward_footprint(calls_of(small_unet("meta"), "meta"), small_unet("meta"), bfloat16=False)
    assert counted.peak_bytes(2 * rows) == pytest.approx(2 * counted.peak_bytes(rows), rel=0.05)

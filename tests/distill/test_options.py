"""Options from later work: what each adds to the loss, and that it is off by default."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from fewstep.diffusion import CosineSchedule, RowRandom
from fewstep.distill import GuidanceObjective, NaiveProgressiveObjective, ProgressiveObjective
from fewstep.distill.errors import as_large_as
from fewstep.distill.features import TeacherFeatures
from fewstep.distill.objective import Batch
from fewstep.distill.settings import GuidanceSettings, ProgressiveSettings
from fewstep.errors import ModelError
from fewstep.models import ClassArchitecture, ClassParts, Denoiser, TextToImageParts, make_student
from fewstep.models.lora import LoraSettings, lora_student


def _objective(teacher: TextToImageParts, w_teacher: Any, steps: int = 2, **changes: Any) -> ProgressiveObjective:
    model = teacher.denoiser().with_network(w_teacher)
    return ProgressiveObjective(model, num_inference_steps=steps, w_min=0.5, w_max=4.0, **changes)


def _naive(teacher: TextToImageParts, **changes: Any) -> NaiveProgressiveObjective:
    return NaiveProgressiveObjective(teacher.denoiser(), num_inference_steps=2, w_min=1.0, w_max=4.0, **changes)


def _random(rows: Any = range(4)) -> RowRandom:
    return RowRandom(seed=0, step=0, rows=list(rows))


def _gradient(objective: Any, batch: Batch) -> tuple[float, Tensor, dict[str, Tensor]]:
    """Loss, its gradient as one vector, and the figures."""
    objective.network.zero_grad()
    loss, figures = objective.loss(objective.network, batch, _random())
    loss.backward()
    weights = [p for p in objective.network.parameters() if p.grad is not None]
    return float(loss.detach()), torch.cat([p.grad.flatten() for p in weights]), figures


# Features of the teacher


def _states(count: int = 3) -> tuple[Tensor, Tensor]:
    a, b = torch.randn(2, count, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    return a, b


def test_the_distance_is_lpips_over_the_whole_networks_down_blocks(teacher: TextToImageParts, w_teacher: Any) -> None:
    w_teacher = w_teacher.eval()
    model = teacher.denoiser().with_network(w_teacher)
    condition, w = {"text": teacher.encode_prompts(["a", "b", "c"])}, torch.tensor([0.5, 2.0, 3.0])
    time = torch.tensor([-1, 400, 900])
    first, second = _states()

    def layers(z: Tensor) -> list[Tensor]:
        found: list[Tensor] = []
        hooks = [b.register_forward_hook(lambda m, a, out: found.extend(out[1])) for b in w_teacher.down_blocks]
        with torch.no_grad():
            model.conditional(condition, w)(z, time)
        for hook in hooks:
            hook.remove()
        return found

    a, b = layers(first), layers(second)
    assert len(a) >= 3
    each = [
        ((x / x.norm(dim=1, keepdim=True) - y / y.norm(dim=1, keepdim=True)) ** 2).sum(1).mean((1, 2))
        for x, y in zip(a, b, strict=True)
    ]
    expected = sum(each) / len(each)
    features = TeacherFeatures(model)
    with torch.no_grad():
        got = features.distance(first, second, time, condition, w)
        assert torch.equal(features.distance(first, first, time, condition, w), torch.zeros(3))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert float(got.min()) > 0.0
    assert float(got.max()) < 4.0


def test_gradients_of_the_distance_reach_the_students_state_alone(teacher: TextToImageParts) -> None:
    teacher.unet.requires_grad_(False)
    features, time = TeacherFeatures(teacher.denoiser()), torch.tensor([0, 400, 900])
    z, target = (state.requires_grad_(True) for state in _states())
    features.distance(z, target, time, {"text": teacher.encode_prompts(["a", "b", "c"])}).sum().backward()
    assert z.grad is not None
    assert bool((z.grad.flatten(1).norm(dim=1) > 0).all())
    assert target.grad is None
    assert all(weight.grad is None for weight in teacher.unet.parameters())


def _class_model(scheduler: dict[str, Any]) -> Denoiser:
    sizes = ClassArchitecture(
        num_classes=3, resolution=8, block_out_channels=(16, 16), attention_from_level=1, norm_num_groups=4
    )
    unet = make_student(sizes.build_unet(in_channels=3, sample_size=8), embedding_dim=16)
    return ClassParts(unet, scheduler).freeze().denoiser()


def test_the_distance_works_for_class_conditional_models_on_the_cosine_schedule() -> None:
    model = _class_model({"_class_name": CosineSchedule.scheduler_class_name, "prediction_type": "v_prediction"})
    batch = {"pixels": torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8), "label": torch.tensor([0, 1, 2, 0])}
    for kind in ("deterministic", "stochastic", "encoder"):
        objective = ProgressiveObjective(
            model, num_inference_steps=2, w_min=0.0, w_max=4.0, kind=kind, error="features"
        )
        loss, gradient, figures = _gradient(objective, batch)
        assert loss > 0
        assert float(figures["feature_distance"]) > 0
        assert bool(torch.isfinite(gradient).all())


def test_a_network_without_down_blocks_is_refused(teacher: TextToImageParts) -> None:
    with pytest.raises(ModelError, match="a Linear has none: take mse or pseudo_huber"):
        TeacherFeatures(teacher.denoiser().with_network(nn.Linear(2, 2)))


@pytest.mark.parametrize("steps", [1, 2])
def test_the_loss_is_the_mse_and_the_weighted_distance(
    teacher: TextToImageParts, w_teacher: Any, batch: Batch, steps: int
) -> None:
    plain, plain_gradient, _ = _gradient(_objective(teacher, w_teacher, steps), batch)
    found = {}
    for weight in (1.0, 3.0):
        objective = _objective(teacher, w_teacher, steps, error="features", feature_weight=weight)
        loss, gradient, figures = _gradient(objective, batch)
        assert loss == pytest.approx(plain + weight * float(figures["feature_distance"]), rel=1e-5)
        found[weight] = gradient - plain_gradient
    torch.testing.assert_close(found[3.0], 3 * found[1.0], rtol=1e-3, atol=1e-4 * float(found[3.0].abs().max()))
    assert float(found[1.0].norm()) > 0
    assert all(weight.grad is None for weight in w_teacher.parameters())


def test_updates_reduce_the_distance(
    teacher: TextToImageParts, w_teacher: Any, batch: Batch, loss_after: Callable[..., tuple[float, float]]
) -> None:
    objective = _objective(teacher, w_teacher, error="features", feature_weight=10.0)
    with torch.no_grad():
        before = float(objective.loss(objective.network, batch, _random())[1]["feature_distance"])
    loss_after(objective, batch, _random, updates=8, learning_rate=1e-3)
    with torch.no_grad():
        after = float(objective.loss(objective.network, batch, _random())[1]["feature_distance"])
    assert after < 0.8 * before


# SnapFusion's mixture


def test_scaled_errors_have_the_others_size_and_their_own_gradient() -> None:
    error = torch.tensor([2.0, 0.5, 0.0], requires_grad=True)
    scaled = as_large_as(error, torch.tensor([1.0, 1.0, 1.0]))
    assert scaled.tolist() == [1.0, 1.0, 0.0]
    scaled[:2].sum().backward()
    assert error.grad is not None
    assert error.grad.tolist() == [0.5, 2.0, 0.0]


@pytest.mark.parametrize("naive", [False, True])
def test_the_denoising_loss_is_added_at_the_size_of_the_steps_loss(
    teacher: TextToImageParts, w_teacher: Any, batch: Batch, naive: bool
) -> None:
    def make(weight: float) -> Any:
        changes = {"denoising_weight": weight}
        return _naive(teacher, **changes) if naive else _objective(teacher, w_teacher, **changes)

    plain, plain_gradient, figures = _gradient(make(0.0), batch)
    assert "denoising_loss" not in figures
    small, large = _gradient(make(0.2), batch), _gradient(make(0.4), batch)
    assert small[0] == pytest.approx(1.2 * plain, rel=1e-5)
    assert large[0] == pytest.approx(1.4 * plain, rel=1e-5)
    assert float(small[2]["denoising_loss"]) > 0
    added = small[1] - plain_gradient
    torch.testing.assert_close(large[1] - plain_gradient, 2 * added, rtol=1e-3, atol=1e-4 * float(added.abs().max()))
    assert float(added.norm()) > 0.01 * float(plain_gradient.norm())


def test_the_mixture_is_independent_of_how_rows_are_shared_out(
    teacher: TextToImageParts, w_teacher: Any, batch: Batch
) -> None:
    objective = _objective(teacher, w_teacher, denoising_weight=0.2, error="features")
    with torch.no_grad():
        whole, _ = objective.loss(objective.network, batch, _random())
        parts = [
            objective.loss(objective.network, {name: value[rows] for name, value in batch.items()}, _random(rows))[0]
            for rows in ([0, 2], [3, 1])
        ]
    torch.testing.assert_close(sum(parts) / 2, whole, rtol=1e-5, atol=0)


def test_rows_outside_the_guided_share_train_the_conditional_branch_alone(
    teacher: TextToImageParts, batch: Batch
) -> None:
    """In SnapFusion's vanilla part teacher and student are conditional only: w = 0, and ∅ has no gradient."""
    objective = _naive(teacher, guided_share=1e-9)
    seen: list[Tensor] = []
    hook = objective.network.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    loss, _ = objective.loss(objective.network, batch, _random())
    hook.remove()
    gradient = torch.autograd.grad(loss, seen[0])[0]
    assert float(gradient[:4].abs().min()) > 0
    assert torch.equal(gradient[4:], torch.zeros_like(gradient[4:]))


# Adapters


def test_adapters_learn_both_stages_and_leave_the_teacher_alone(
    teacher: TextToImageParts, w_teacher: Any, batch: Batch, loss_after: Callable[..., tuple[float, float]]
) -> None:
    pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = LoraSettings(rank=8)
    model = teacher.denoiser()
    before = {name: value.clone() for name, value in w_teacher.state_dict().items()}
    stage_one = GuidanceObjective(
        model, w_min=3.0, w_max=3.0, loss_weight="snr_plus_one", student=lora_student(teacher.unet, settings)
    )
    rung = _objective(teacher, w_teacher, student=lora_student(w_teacher, settings))
    for objective in (stage_one, rung):
        fixed = {n: v.clone() for n, v in objective.network.state_dict().items() if "lora_" not in n}
        first, last = loss_after(objective, batch, _random, updates=5, learning_rate=1e-2)
        assert last < 0.9 * first
        assert all(torch.equal(objective.network.state_dict()[name], value) for name, value in fixed.items())
    assert all(torch.equal(value, before[name]) for name, value in w_teacher.state_dict().items())


# Settings


def test_all_options_are_off_by_default() -> None:
    stage_one, ladder = GuidanceSettings(), ProgressiveSettings()
    assert (stage_one.error, stage_one.lora) == ("mse", None)
    assert (ladder.error, ladder.lora, ladder.denoising_weight, ladder.trajectory_inputs) == ("mse", None, 0.0, False)
    assert ladder.guided_share == 1.0


@pytest.mark.parametrize(
    ("settings", "values", "message"),
    [
        (GuidanceSettings, {"lora": {"rank": 4}}, "lora needs single_w in stage one: the input for w is a new layer"),
        (GuidanceSettings, {"error": "features"}, "Input should be 'mse' or 'pseudo_huber'"),
        (ProgressiveSettings, {"feature_weight": 2.0}, "feature_weight=2 has no effect with error=mse"),
        (ProgressiveSettings, {"error": "features", "kinds": ["naive"]}, "error=features is not for the naive ladder"),
        (ProgressiveSettings, {"lora": {}, "kinds": ["deterministic", "naive"]}, "lora is not for the naive ladder"),
        (
            ProgressiveSettings,
            {"prediction_type": {1: "sample"}, "kinds": ["deterministic", "naive"]},
            "prediction_type is not for the naive ladder",
        ),
        (
            ProgressiveSettings,
            {"prediction_type": {1: "sample"}, "kinds": ["deterministic", "encoder"]},
            "cannot be used for encoders, which output v_prediction",
        ),
        (ProgressiveSettings, {"guided_share": 0.1}, r"guided_share has no effect on the ladders \['deterministic'\]"),
        (ProgressiveSettings, {"pure_noise_at_end": True, "kinds": ["naive", "encoder"]}, "pure_noise_at_end has no"),
        (ProgressiveSettings, {"start_times": {16: 32}, "kinds": ["stochastic"]}, "start_times has no effect on"),
        (ProgressiveSettings, {"trajectory_inputs": True, "kinds": ["encoder"]}, "trajectory_inputs has no effect on"),
        (
            ProgressiveSettings,
            {"trajectory_inputs": True, "start_times": {2: 4, 1: 4}, "ladder": [4, 2, 1]},
            r"start_times\[2\]=4 cannot be used with trajectory_inputs",
        ),
        (
            ProgressiveSettings,
            {"kinds": ["single_w"], "single_w": [-1.0]},
            "weights must be 0 or more",
        ),
        (ProgressiveSettings, {"kinds": ["single_w"], "single_w": [1.0, 1.0]}, "each named once"),
        (
            ProgressiveSettings,
            {"kinds": ["single_w"], "single_w": [1.0], "ladder": [4], "start_times": {4: 6}},
            "start_times=6 is no multiple of the student's 4 steps",
        ),
        (
            GuidanceSettings,
            {"single_w": 2.0, "w_max": 3.0, "embedding_dim": 8},
            "embedding_dim and w_max has no effect",
        ),
        (ProgressiveSettings, {"lora": {"rank": 0}}, "greater than or equal to 1"),
        (ProgressiveSettings, {"lora": {"ranks": 4}}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        settings.model_validate(values)


def test_settings_that_work() -> None:
    single = {"kinds": ["single_w"], "single_w": [1.0]}
    ProgressiveSettings.model_validate({**single, "trajectory_inputs": True})
    ProgressiveSettings.model_validate({**single, "ladder": [4], "start_times": {4: 8}})
    ProgressiveSettings.model_validate({"guided_share": 0.1, "kinds": ["deterministic", "naive"]})
    assert GuidanceSettings.model_validate({"single_w": 3.0, "lora": {"rank": 4}}).lora == LoraSettings(rank=4)
    ladder = ProgressiveSettings.model_validate({"error": "features", "feature_weight": 2.0, "lora": {"alpha": 8}})
    assert ladder.lora is not None
    assert (ladder.lora.rank, ladder.lora.scale) == (64, 0.125)

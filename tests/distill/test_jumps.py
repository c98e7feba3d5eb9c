"""Which jumps each kind of student learns, and that a student which makes them exactly has no loss."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.fields import Oracle, field_denoiser, rows, walk
from fewstep.diffusion import RowRandom
from fewstep.diffusion.prediction import PredictionType
from fewstep.distill import NaiveProgressiveObjective, ProgressiveObjective, plan_jumps
from fewstep.distill.jumps import follow
from fewstep.distill.ladders import check_ladders
from fewstep.distill.settings import ProgressiveSettings
from fewstep.errors import ModelError, RecipeError

Paths = dict[int, list[int]]

#: (kind, N, teacher's steps, M) -> L and, for each start in units of 1/L, the times that the teacher visits.
CASES: dict[str, tuple[dict[str, Any], int, Paths]] = {
    "halving": (
        {"num_inference_steps": 4, "teacher_steps": 8},
        8,
        {8: [8, 7, 6], 6: [6, 5, 4], 4: [4, 3, 2], 2: [2, 1, 0]},
    ),
    "a third": ({"num_inference_steps": 2, "teacher_steps": 6}, 6, {6: [6, 5, 4, 3], 3: [3, 2, 1, 0]}),
    "a quarter": (
        {"num_inference_steps": 2, "teacher_steps": 8},
        8,
        {8: [8, 7, 6, 5, 4], 4: [4, 3, 2, 1, 0]},
    ),
    "one step with four starts": (
        {"num_inference_steps": 1, "teacher_steps": 4, "start_times": 4},
        4,
        {4: [4, 3, 2, 1, 0], 3: [3, 2, 1, 0], 2: [2, 1, 0], 1: [1, 0]},
    ),
    "two steps with four starts": (
        {"num_inference_steps": 2, "teacher_steps": 4, "start_times": 4},
        4,
        {4: [4, 3, 2], 3: [3, 2, 1], 2: [2, 1, 0], 1: [1, 0]},
    ),
    "one step with four starts from two steps": (
        {"num_inference_steps": 1, "teacher_steps": 2, "start_times": 4},
        4,
        {4: [4, 2, 0], 3: [3, 1, 0], 2: [2, 0], 1: [1, 0]},
    ),
    # At i >= 2 the jump 2/N in two teacher jumps of 2/(2N); at i = 1 the jump 1/N, one teacher jump.
    "stochastic halving": (
        {"kind": "stochastic", "num_inference_steps": 4, "teacher_steps": 8},
        8,
        {8: [8, 6, 4], 6: [6, 4, 2], 4: [4, 2, 0], 2: [2, 0]},
    ),
    "stochastic third": (
        {"kind": "stochastic", "num_inference_steps": 2, "teacher_steps": 6},
        6,
        {6: [6, 4, 2, 0], 3: [3, 1, 0]},
    ),
    "stochastic last rung": ({"kind": "stochastic", "num_inference_steps": 1, "teacher_steps": 2}, 2, {2: [2, 0]}),
    "encoder": (
        {"kind": "encoder", "num_inference_steps": 4, "teacher_steps": 8},
        8,
        {0: [0, 1, 2], 2: [2, 3, 4], 4: [4, 5, 6], 6: [6, 7, 8]},
    ),
    "encoder quarter": ({"kind": "encoder", "num_inference_steps": 1, "teacher_steps": 4}, 4, {0: [0, 1, 2, 3, 4]}),
    "naive": ({"kind": "naive", "num_inference_steps": 2, "teacher_steps": 4}, 4, {4: [4, 3, 2], 2: [2, 1, 0]}),
}


@pytest.mark.parametrize("name", CASES)
def test_jumps_written_out(name: str) -> None:
    settings, units, paths = CASES[name]
    jumps = plan_jumps(**{"kind": "deterministic", **settings})
    assert jumps.grid_steps == units
    assert dict(zip(jumps.starts, jumps.ends, strict=True)) == {start: path[-1] for start, path in paths.items()}
    assert dict(zip(jumps.starts, jumps.teacher_steps, strict=True)) == {s: len(path) - 1 for s, path in paths.items()}


@pytest.mark.parametrize("name", CASES)
def test_the_teacher_visits_the_times_written_out(name: str) -> None:
    """`follow` is asked for all starts at once, rows that arrive early among rows that do not."""
    settings, units, paths = CASES[name]
    jumps = plan_jumps(**{"kind": "deterministic", **settings})
    schedule = field_denoiser("cosine", "v_prediction").schedule
    times = schedule.times(units)
    seen: list[list[float]] = [[] for _ in jumps.starts]

    def model(z: Tensor, time: Tensor) -> Tensor:
        for row, t in enumerate(time.tolist()):
            seen[row].append(t * units)
        return torch.ones_like(z)

    starts, ends = jumps.draw(torch.arange(len(jumps.starts)))
    z = torch.zeros(len(starts), 1)
    end = follow(
        model,
        z,
        starts,
        ends,
        stride=jumps.stride,
        num_jumps=max(jumps.teacher_steps),
        together=len(set(jumps.teacher_steps)) == 1,
        times=times,
        schedule=schedule,
        prediction_type="v_prediction",
    )
    for row, start in enumerate(jumps.starts):
        path = paths[start]
        assert seen[row][: len(path) - 1] == pytest.approx(path[:-1])
        # z = 0 and v = 1 throughout: each jump turns by its angle, z -> cos z − sin.
        state, turn = 0.0, float(schedule.angle(times).diff()[0])
        for here, there in pairwise(path):
            angle = torch.tensor(turn * (here - there))
            state = float(angle.cos() * state - angle.sin())
        assert float(end[row]) == pytest.approx(state, abs=1e-6)


class _Branches(nn.Module):
    """The naive student for one known w: all of the guided output in the conditional branch, nothing in the other."""

    def __init__(self, oracle: Oracle, w: float) -> None:
        super().__init__()
        self.oracle, self.w = oracle, w

    def forward(self, z: Tensor, told: Tensor, label: Tensor, w_embedding: Tensor | None) -> Tensor:
        output = self.oracle(z, told, label, w_embedding) / (1 + self.w)
        return torch.where((label == -1)[:, None], torch.zeros_like(output), output)


def _loss(objective: Any, network: nn.Module, *, count: int = 24, seed: int = 0) -> float:
    return float(objective.loss(network, rows(count), RowRandom(seed=seed, step=0, rows=range(count)))[0])


@pytest.mark.parametrize("schedule", ["cosine", "zero terminal snr"])
@pytest.mark.parametrize("name", CASES)
def test_a_student_that_makes_the_jumps_has_no_loss(name: str, schedule: str) -> None:
    settings, units, paths = CASES[name]
    v: PredictionType = "v_prediction"
    if settings.get("kind") == "naive":
        teacher = field_denoiser(schedule, v)
        given = {key: value for key, value in settings.items() if key != "kind"}
        objective: Any = NaiveProgressiveObjective(teacher, w_min=2.0, w_max=2.0, **given)
        oracle: nn.Module = _Branches(
            Oracle(teacher.network, schedule, v, units=units, paths=paths, guided=True, given_w=2.0), 2.0
        )
    else:
        teacher = field_denoiser(schedule, v, w_input=True)
        objective = ProgressiveObjective(teacher, w_min=0.0, w_max=4.0, **settings)
        oracle = Oracle(teacher.network, schedule, v, units=units, paths=paths)
    assert _loss(objective, oracle) < 1e-10
    untrained = _loss(objective, objective.network)
    if name == "stochastic last rung":
        assert untrained < 1e-10, "it has only its teacher's own jump to learn"
    else:
        assert untrained > 1e-4


def test_every_start_is_drawn_alike() -> None:
    objective = ProgressiveObjective(
        field_denoiser("cosine", "v_prediction", w_input=True), num_inference_steps=4, w_min=0, w_max=1, start_times=8
    )
    told: list[float] = []

    class Listens(nn.Module):
        def forward(self, z: Tensor, time: Tensor, label: Tensor, w_embedding: Tensor) -> Tensor:
            told.extend(time.tolist())
            return z

    for seed in range(4):
        _loss(objective, Listens(), count=400, seed=seed)
    counts = torch.tensor(told).round().unique(return_counts=True)[1]
    assert len(counts) == 8
    assert int(counts.min()) > 150
    assert int(counts.max()) < 250


def test_a_single_w_student_may_learn_from_the_guided_pair_at_once() -> None:
    teacher = field_denoiser("cosine", "v_prediction")
    objective = ProgressiveObjective(teacher, num_inference_steps=4, w_min=3.0, w_max=3.0, guided_teacher=True)
    paths = {2 * i: [2 * i, 2 * i - 1, 2 * i - 2] for i in range(1, 5)}
    guided = Oracle(teacher.network, "cosine", "v_prediction", units=8, paths=paths, guided=True, given_w=3.0)
    plain = Oracle(teacher.network, "cosine", "v_prediction", units=8, paths=paths, given_w=3.0)
    assert _loss(objective, guided) < 1e-10
    assert _loss(objective, plain) > 1e-2


def test_what_two_guided_steps_do_is_no_longer_linear_in_w() -> None:
    """Why two networks under guidance cannot follow their guided teacher: (1 + w) o_c − w o_∅ is linear in w."""
    teacher = field_denoiser("cosine", "v_prediction").network

    def target(w: float, path: list[int]) -> Tensor:
        oracle = Oracle(teacher, "cosine", "v_prediction", units=2, paths={path[0]: path}, guided=True, given_w=w)
        z = torch.linspace(-2, 2, 6)[None]
        told = oracle.schedule.network_time(oracle.times[path[0]][None])
        return oracle(z, told, torch.ones(1), None)

    def bend(path: list[int]) -> float:
        low, middle, high = (target(w, path) for w in (0.0, 2.0, 4.0))
        return float((low - 2 * middle + high).abs().max())

    assert bend([2, 1]) < 1e-9, "one step is linear"
    assert bend([2, 1, 0]) > 0.1


@pytest.mark.parametrize("start", [8, 5, 2])
def test_states_of_the_teachers_own_sampler_are_what_the_student_is_shown(start: int) -> None:
    """With trajectory_inputs a row at t = start/8 is where the 8-step teacher has come to from pure noise."""
    teacher = field_denoiser("cosine", "v_prediction", w_input=True)
    objective = ProgressiveObjective(
        teacher, num_inference_steps=8, teacher_steps=16, w_min=1.0, w_max=1.0, trajectory_inputs=True
    )
    shown: dict[int, tuple[Tensor, Tensor]] = {}

    class Listens(nn.Module):
        def forward(self, z: Tensor, told: Tensor, label: Tensor, w_embedding: Tensor) -> Tensor:
            u = teacher.schedule.time_of_network(told) * 8
            for row, place in enumerate(u.round().int().tolist()):
                shown[place] = (z[row], torch.tensor(row))
            return z

    batch, random = rows(48), RowRandom(seed=0, step=0, rows=range(48))
    objective.loss(Listens(), batch, random)
    z, row = shown[start]
    random = RowRandom(seed=0, step=0, rows=[int(row)])
    random.normal(6)  # the posterior's draw
    eps = random.normal(6)[0]
    visited = [teacher.schedule.times(16)[j] for j in range(16, 2 * start - 1, -1)]
    oracle = Oracle(teacher.network, "cosine", "v_prediction", units=16, paths={})
    label = batch["label"][int(row)][None]
    expected = walk(oracle.velocity_at(label, torch.ones(1)), eps, visited, teacher.schedule)
    torch.testing.assert_close(z.double(), expected, rtol=0, atol=2e-5)


def test_the_denoising_term_is_that_of_the_same_rows() -> None:
    """v = (alpha z − x)/sigma is what the data say of z: a network that knows x has no denoising loss."""
    teacher = field_denoiser("cosine", "v_prediction", w_input=True)
    objective = ProgressiveObjective(teacher, num_inference_steps=2, w_min=0, w_max=4, denoising_weight=0.5)

    class KnowsTheData(nn.Module):
        def forward(self, z: Tensor, told: Tensor, label: Tensor, w_embedding: Tensor) -> Tensor:
            alpha, sigma = teacher.schedule.alpha_sigma(teacher.schedule.time_of_network(told), ndim=2)
            return (alpha * z - rows(24)["latent_mean"]) / sigma

    def denoising(network: nn.Module) -> float:
        _, figures = objective.loss(network, rows(24), RowRandom(seed=0, step=0, rows=range(24)))
        return float(figures["denoising_loss"])

    assert denoising(KnowsTheData()) < 1e-8
    assert denoising(objective.network) > 0.1
    plain = ProgressiveObjective(teacher, num_inference_steps=2, w_min=0, w_max=4)
    assert _loss(objective, objective.network) > 1.05 * _loss(plain, plain.network)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_inference_steps": 4, "teacher_steps": 4}, "a student of 4 steps cannot imitate a teacher of 4"),
    ({"num_inference_steps": 4, "teacher_steps": 6}, "a larger multiple, such as 8"),
    ({"num_inference_steps": 0, "teacher_steps": 2}, "a student of 0 steps .* such as 2"),
    (
        {"num_inference_steps": 2, "teacher_steps": 4, "start_times": 3},
        "start_times=3 is no multiple of the student's 2 steps: .*; take 4",
    ),
    (
        {"kind": "stochastic", "num_inference_steps": 2, "teacher_steps": 4, "start_times": 4},
        "start_times=4 is for deterministic students; this ladder is stochastic",
    ),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_jumps_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        plan_jumps(**{"kind": "deterministic", **settings})


@pytest.mark.parametrize("kind", ["epsilon", "sample"])
def test_encoders_of_other_types_than_v_are_refused(kind: PredictionType) -> None:
    with pytest.raises(ModelError, match=f"prediction_type={kind} cannot be used for an encoder"):
        ProgressiveObjective(
            field_denoiser("cosine", kind, w_input=True), num_inference_steps=4, w_min=0, w_max=4, kind="encoder"
        )


def test_inputs_from_the_teachers_sampler_are_refused_where_they_have_no_meaning() -> None:
    teacher = field_denoiser("cosine", "v_prediction", w_input=True)
    common: dict[str, Any] = {"num_inference_steps": 4, "w_min": 0, "w_max": 4, "trajectory_inputs": True}
    with pytest.raises(RecipeError, match="trajectory_inputs is for deterministic students; this ladder is encoder"):
        ProgressiveObjective(teacher, kind="encoder", **common)
    with pytest.raises(RecipeError, match=r"denoising_weight=0\.2 cannot be used with trajectory_inputs"):
        ProgressiveObjective(teacher, denoising_weight=0.2, **common)
    with pytest.raises(ValueError, match=r"denoising_weight=0\.2 cannot be used with trajectory_inputs"):
        ProgressiveSettings(trajectory_inputs=True, denoising_weight=0.2)


def test_ladders_that_a_teacher_cannot_be_taken_down_are_told_before_stage_one() -> None:
    teacher = field_denoiser("stable diffusion", "epsilon")
    check_ladders(ProgressiveSettings(), teacher)
    check_ladders(ProgressiveSettings(kinds=("encoder",)), teacher, prediction_type="v_prediction")
    with pytest.raises(RecipeError, match=r"must lie between 1 and 500 steps: its first student imitates 2048"):
        check_ladders(ProgressiveSettings(ladder=(1024, 512)), teacher)
    with pytest.raises(RecipeError, match=r"start_times\[64\]=1728 .* need a grid of 3456 times, .* trained on 1000"):
        check_ladders(ProgressiveSettings(ladder=(64,), start_times={64: 1728}), teacher)
    with pytest.raises(ModelError, match=r"a network that outputs epsilon: encoders need v_prediction"):
        check_ladders(ProgressiveSettings(kinds=("encoder",)), teacher)
    with pytest.raises(ModelError, match="error=features compares in the down blocks"):
        check_ladders(ProgressiveSettings(error="features"), teacher)
    for schedule, alpha in (("cosine", "4.5e-05"), ("zero terminal snr", "0")):
        with pytest.raises(ModelError, match=f"cannot be used on a schedule that ends at alpha = {alpha} "):
            check_ladders(ProgressiveSettings(prediction_type={1: "epsilon"}), field_denoiser(schedule, "v_prediction"))
    # Continuous times have room for any number.
    check_ladders(ProgressiveSettings(ladder=(1024, 512)), field_denoiser("cosine", "v_prediction"))


def test_a_rung_of_skip_level_is_taught_by_the_one_before_the_last() -> None:
    settings = ProgressiveSettings(ladder=(32, 8, 4, 2, 1), first_teacher_steps=128, skip_level=(2, 1))
    assert {n: settings.teacher_of(n) for n in settings.ladder} == {
        32: (None, 128),
        8: (32, 32),
        4: (8, 8),
        2: (8, 8),
        1: (4, 4),
    }
    assert ProgressiveSettings(ladder=(4, 2, 1)).teacher_of(4) == (None, 8)
    with pytest.raises(ValueError, match=r"skip_level names 4, the ladder's first: .* set first_teacher_steps=16"):
        ProgressiveSettings(ladder=(4, 2, 1), skip_level=(4,))


def test_extra_start_times_need_a_teacher_that_knows_them() -> None:
    """From t = 3/4 a 2-step teacher would jump from times that it never saw."""
    with pytest.raises(ValueError, match=r"start_times\[1\]=4: .* give it start_times too \(\{2: 4\}\)"):
        ProgressiveSettings(ladder=(4, 2, 1), start_times={1: 4})
    ProgressiveSettings(ladder=(4, 2, 1), start_times={1: 4, 2: 4})
    ProgressiveSettings(ladder=(4, 2, 1), start_times={1: 4}, skip_level=(1,))
    ProgressiveSettings(ladder=(2, 1), start_times={2: 16})  # stage one knows every time

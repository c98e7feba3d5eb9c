"""One run of the mixture experiment: its settings, its points, how it trains and what it measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from fewstep.bench.plane import NUM_CLASSES, Plane
from fewstep.diffusion import CosineSchedule, NoiseSchedule, RowRandom, ddim, stochastic
from fewstep.diffusion.grid import check_ladder
from fewstep.diffusion.samplers import Model
from fewstep.distill import NaiveProgressiveObjective, ProgressiveObjective, step_target
from fewstep.distill.jumps import follow
from fewstep.evaluate.classes.jackknife import make_groups
from fewstep.evaluate.classes.precision_recall import Manifold, make_manifold, precision_and_recall
from fewstep.evaluate.classes.sliced import sliced_wasserstein
from fewstep.models import SCHEDULER_CONFIG
from fewstep.models.denoiser import Denoiser
from fewstep.train.optimiser import clip_gradients, make_optimizer, set_learning_rate
from fewstep.train.settings import TrainSettings

_EXACT_STEPS = 1000
#: Steps at which precision and recall are taken.
PRECISION_STEPS = (1, 2, 4, 32)

LadderName = Literal["deterministic", "stochastic", "encoder", "naive", "single_w"]


class MixtureSettings(BaseModel):
    """What is trained, how long, and at which weights it is measured. The defaults take some ten minutes of a core."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schedule: Literal["cosine", "stable_diffusion"] = Field(
        "cosine", description="continuous times, or the 1000 of Stable Diffusion rescaled to zero terminal SNR"
    )
    w_max: float = Field(4.0, gt=0, description="largest guidance weight; the smallest is 0")
    weights: tuple[float, ...] = Field((0.0, 1.0, 4.0), description="guidance weights of the tables")
    held_out_weights: tuple[float, ...] = Field(
        (0.37, 1.13, 2.71, 3.9), description="guidance weights at which stage one's error is taken"
    )
    ladder: tuple[int, ...] = Field((32, 16, 8, 4, 2, 1), description="step counts of the students")
    first_teacher_steps: int = Field(64, description="steps of the first student's teacher")
    teacher_updates: int = Field(4000, gt=0, description="of the teacher")
    guidance_updates: int = Field(4000, gt=0, description="of stage one")
    rung_updates: int = Field(600, gt=0, description="of each rung above 2 steps")
    last_updates: int = Field(1800, gt=0, description="of the rungs of 2 steps and 1 step")
    last_rung_budgets: tuple[float, ...] = Field(
        (0.25, 4.0), description="shares of last_updates that the one-step student is trained for, besides 1"
    )
    batch_size: int = Field(512, gt=0, description="points an update")
    learning_rate: float = Field(4e-3, gt=0, description="at the start of each training; it falls to 0")
    embedding_dim: int = Field(64, ge=4, description="width of the w embedding")
    naive: tuple[int, ...] = Field(
        (32, 16, 8, 4, 2, 1), description="the ladder of the guided pair itself, without stage one; empty: none"
    )
    stochastic: bool = Field(True, description="the ladder for the stochastic sampler")
    encoder: int | None = Field(16, description="steps of the encoder students' last rung; null: none")
    single_w: tuple[float, ...] = Field((0.0, 1.0, 4.0), description="weights of ladders of a single w")
    num_points: int = Field(3000, gt=0, description="points of each measurement; a multiple of the 3 classes")
    teacher_steps: int = Field(1000, gt=0, description="guided steps of the teacher that students should equal")
    seed: int = Field(0, ge=0, description="seed of everything")

    @model_validator(mode="after")
    def _check(self) -> MixtureSettings:
        for ladder in (self.ladder, self.naive):
            if ladder:
                check_ladder(ladder, first_teacher_steps=self.first_teacher_steps)
        if len(self.ladder) < 2 or self.ladder[-1] != 1:
            raise ValueError(
                f"ladder {list(self.ladder)}: the last rung is trained with several budgets, so it must be of 1 step, "
                "below another"
            )
        if self.encoder is not None and self.encoder not in self.ladder:
            raise ValueError(f"encoder={self.encoder} is not in the ladder {list(self.ladder)}: its decoder is missing")
        if self.num_points % NUM_CLASSES:
            raise ValueError(f"num_points={self.num_points} is no multiple of the {NUM_CLASSES} classes")
        outside = [w for w in (*self.weights, *self.held_out_weights, *self.single_w) if not 0 <= w <= self.w_max]
        if outside:
            raise ValueError(f"the weights {outside} are outside 0 … w_max={self.w_max:g}")
        return self


#: A short form for tests and a first look: half a minute of one core.
QUICK: dict[str, Any] = {
    "ladder": (16, 4, 2, 1),
    "naive": (4, 2, 1),
    "teacher_updates": 500,
    "guidance_updates": 600,
    "rung_updates": 150,
    "last_updates": 250,
    "last_rung_budgets": (0.2,),
    "batch_size": 256,
    "stochastic": False,
    "encoder": None,
    "single_w": (),
    "num_points": 1200,
    "teacher_steps": 128,
}


class _PointRandom(RowRandom):
    """Draws for all rows from one generator: one for each row would cost more than the update of so small a network."""

    def __init__(self, *, seed: int, rows: int) -> None:
        super().__init__(seed=seed, step=0, rows=())
        self._generator, self._rows = torch.Generator().manual_seed(seed), rows

    def __len__(self) -> int:
        return self._rows

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self._rows, *shape, generator=self._generator)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(self._rows, generator=self._generator) * (high - low) + low

    def integers(self, low: int, high: int) -> Tensor:
        return torch.randint(low, high, (self._rows,), generator=self._generator)


@dataclass
class Experiment:
    """One run: the teacher's world, and the points that everything is measured on."""

    settings: MixtureSettings
    say: Callable[[str], None]
    plane: Plane = field(default_factory=Plane.make)
    rows: list[dict[str, Any]] = field(default_factory=list)
    _exact: dict[tuple[float, int | None], Tensor] = field(default_factory=dict)
    _of_teacher: dict[float, Tensor] = field(default_factory=dict)
    _real: Manifold | None = None

    def __post_init__(self) -> None:
        chosen = self.settings.schedule
        self.schedule: NoiseSchedule = (
            CosineSchedule() if chosen == "cosine" else NoiseSchedule.from_scheduler_config(SCHEDULER_CONFIG)
        )
        self.generator = torch.Generator().manual_seed(self.settings.seed + 1)
        self.labels = torch.arange(self.settings.num_points) % NUM_CLASSES
        self.condition = {"label": self.labels}
        self.noise = torch.randn(len(self.labels), 2, generator=self.generator)

    def batch(self, count: int) -> dict[str, Tensor]:
        """Return labelled points of the data."""
        labels = torch.randint(0, NUM_CLASSES, (count,), generator=self.generator)
        x = self.plane.draw(labels, self.generator)
        return {"latent_mean": x, "latent_std": torch.zeros_like(x), "label": labels}

    def train(self, objective: Any, updates: int) -> dict[str, float]:
        """Train an objective's network; return the mean figures of the last tenth."""
        given = self.settings
        train = TrainSettings(updates=updates, global_batch_size=given.batch_size, learning_rate=given.learning_rate)
        optimizer = make_optimizer(objective, train)
        weights = [p for p in objective.network.parameters() if p.requires_grad]
        sums: dict[str, Tensor] = {}
        last = max(updates // 10, 1)
        for update in range(updates):
            set_learning_rate(optimizer, train, update)
            random = _PointRandom(seed=int(torch.randint(2**62, (), generator=self.generator)), rows=given.batch_size)
            loss, figures = objective.loss(objective.network, self.batch(given.batch_size), random)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            clip_gradients(weights, train.grad_clip_norm)
            optimizer.step()
            if update >= updates - last:
                for name, value in figures.items():
                    sums[name] = sums.get(name, torch.zeros(())) + value / last
        objective.network.eval()
        return {name: float(value) for name, value in sums.items()}

    def sample(self, model: Model, steps: int, *, sampler: str = "ddim") -> Tensor:
        """Return where a sampler takes the noise of this run."""
        common: dict[str, Any] = {"schedule": self.schedule, "num_inference_steps": steps}
        if sampler == "ddim":
            return ddim(model, self.noise, prediction_type="v_prediction", **common)
        fresh = torch.Generator().manual_seed(self.settings.seed + 2)
        draw = torch.randn(steps, *self.noise.shape, generator=fresh)
        return stochastic(model, self.noise, prediction_type="v_prediction", noise=lambda i: draw[i], **common)

    def exact(self, w: float, *, stochastic_steps: int | None = None) -> Tensor:
        """Return where the exact guided flow takes the noise; with N the stochastic sampler of N exact jumps.

        Under guidance these differ: the guided pair is the denoiser of no distribution, so that going forward by its
        flow and back by noise leads elsewhere than the flow alone, and elsewhere for each N.
        """
        key = (w, stochastic_steps)
        if key not in self._exact:
            guided = self.plane.guided(self.labels, w, self.schedule)
            if stochastic_steps is None:
                self._exact[key] = self.sample(guided, _EXACT_STEPS)
            else:
                self._exact[key] = self.sample(
                    self._exact_jumps(guided, stochastic_steps), stochastic_steps, sampler="stochastic"
                )
        return self._exact[key]

    def _exact_jumps(self, model: Model, steps: int) -> Model:
        """Return the network whose jumps from t to t − 2/N are the flow of `model`."""
        schedule, parts = self.schedule, _EXACT_STEPS // steps
        times = schedule.times(steps * parts)

        def jump(z: Tensor, time: Tensor) -> Tensor:
            start = int((times - time[0]).abs().argmin())
            end = max(start - 2 * parts, 0)
            landed = follow(
                model,
                z,
                torch.full((len(z),), start),
                torch.full((len(z),), end),
                stride=1,
                num_jumps=start - end,
                together=True,
                times=times,
                schedule=schedule,
                prediction_type="v_prediction",
            )
            at_start, at_end = (schedule.alpha_sigma(times[[unit]], ndim=2) for unit in (start, end))
            return step_target(z, landed, *at_start, *at_end, "v_prediction")

        return jump

    def measure(
        self, method: str, denoiser: Denoiser, w: float, steps: int, *, guided: bool = False, sampler: str = "ddim"
    ) -> None:
        """Sample, and add a row."""
        calls: list[int] = []
        hook = denoiser.network.register_forward_hook(lambda _, args, __: calls.append(len(args[0])))
        model = denoiser.guided(self.condition, w) if guided else denoiser.conditional(self.condition, w)
        ends = self.sample(model, steps, sampler=sampler)
        hook.remove()
        if method == "teacher":
            self._of_teacher[w] = ends
        row = {
            "method": method,
            "w": w,
            "steps": steps,
            "evaluations": sum(calls) / len(self.labels),
            **self.figures(ends, self.exact(w, stochastic_steps=steps if sampler == "stochastic" else None)),
        }
        if sampler == "ddim":
            row["to_teacher"] = root_mean_square(ends - self._of_teacher[w])
        if method in ("student", "ddim") and steps in PRECISION_STEPS:
            row |= self._precision(ends)
        self.rows.append(row)

    def figures(self, ends: Tensor, exact: Tensor) -> dict[str, float]:
        """Return how far end points are from the exact ones of the same noise, and what they look like."""
        classes = [self.labels == c for c in range(NUM_CLASSES)]
        return {
            "sliced_wasserstein": sum(sliced_wasserstein(ends[own], exact[own]) for own in classes) / NUM_CLASSES,
            "own_class": float(self.plane.own_class(ends, self.labels).mean()),
            "spread": root_mean_square(torch.cat([ends[own] - ends[own].mean(0) for own in classes])),
            "to_exact": root_mean_square(ends - exact),
        }

    def _precision(self, ends: Tensor) -> dict[str, float]:
        groups = make_groups(len(ends), seed=0)
        # Classes far apart: a point is near those of its own class alone.
        aside = 100.0 * torch.nn.functional.one_hot(self.labels, NUM_CLASSES)
        if self._real is None:
            real = self.plane.draw(self.labels, self.generator)
            self._real = make_manifold(torch.cat([real, aside], dim=1), groups)
        precision, recall = precision_and_recall(make_manifold(torch.cat([ends, aside], dim=1), groups), self._real)
        assert precision.value is not None
        assert recall.value is not None
        return {"precision": precision.value, "recall": recall.value}

    def ladder(
        self,
        kind: LadderName,
        first: Denoiser,
        *,
        w: tuple[float, float],
        last: int = 1,
    ) -> dict[int, Denoiser]:
        """Train every rung of a ladder down to `last` steps; return the students."""
        given, teacher, before = self.settings, first, self.settings.first_teacher_steps
        students: dict[int, Denoiser] = {}
        for steps in [n for n in (given.naive if kind == "naive" else given.ladder) if n >= last]:
            common: dict[str, Any] = {"num_inference_steps": steps, "teacher_steps": before}
            objective = self.rung(kind, teacher, w=w, first=teacher is first, **common)
            figures = self.train(objective, given.last_updates if steps <= 2 else given.rung_updates)
            students[steps] = teacher = objective.of_student
            before = steps
            self.say(f"{kind}, {steps} steps: relative error {figures['relative_error']:.3f}")
        return students

    def rung(self, kind: LadderName, teacher: Denoiser, *, w: tuple[float, float], first: bool, **common: Any) -> Any:
        common |= {"w_min": w[0], "w_max": w[1]}
        if kind == "naive":
            return NaiveProgressiveObjective(teacher, **common)
        if kind == "single_w":
            return ProgressiveObjective(teacher, guided_teacher=first, **common)
        return ProgressiveObjective(teacher, kind=kind, **common)


def root_mean_square(difference: Tensor) -> float:
    return float(difference.double().square().sum(dim=1).mean().sqrt())

"""Which jumps in time a student of stage two learns, and how its teacher makes them in smaller ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.diffusion.prediction import PredictionType, ddim_step
from fewstep.diffusion.samplers import Model
from fewstep.diffusion.schedule import NoiseSchedule
from fewstep.errors import RecipeError
from fewstep.models.student import StudentKind


@dataclass(frozen=True)
class Jumps:
    """Jumps in units of a grid t = j/L that holds every time of student and teacher.

    Attributes:
        grid_steps: L.
        starts, ends: where each jump of the student begins and ends; drawn with equal probability.
        stride: length of the teacher's jumps, negative upwards; the last of a row is shorter where less is left.
    """

    grid_steps: int
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    stride: int
    _on_device: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def teacher_steps(self) -> tuple[int, ...]:
        """How many jumps the teacher makes for each of the student's."""
        return tuple(math.ceil((start - end) / self.stride) for start, end in zip(self.starts, self.ends, strict=True))

    def draw(self, number: Tensor) -> tuple[Tensor, Tensor]:
        """Return starts and ends of jumps by their numbers, (B,) each."""
        if number.device not in self._on_device:
            self._on_device[number.device] = (
                torch.tensor(self.starts, device=number.device),
                torch.tensor(self.ends, device=number.device),
            )
        starts, ends = self._on_device[number.device]
        return starts[number], ends[number]


def plan_jumps(
    kind: StudentKind, num_inference_steps: int, *, teacher_steps: int, start_times: int | None = None
) -> Jumps:
    """Return the jumps of an N-step student whose teacher takes `teacher_steps` steps.

    - deterministic (Algorithm 2): at t = i/N one jump of 1/N in place of teacher_steps/N jumps of 1/teacher_steps. With
      `start_times` = M the student also learns to start at j/M, one jump of 1/N (or to the clean end, where less is
      left): SDXL-Lightning's (§3.7) extra times of its 1- and 2-step students.
    - stochastic (Algorithm 3): jumps are twice as long, the teacher's too, as the sampler goes 2/N forward and 1/N
      back; at t = 1/N there is only 1/N left, and that is the jump.
    - encoder (Algorithm 4): upwards from t = (i − 1)/N to i/N.
    - naive: as deterministic.

    Raises:
        RecipeError: the teacher's steps are no multiple of the student's, or extra start times that do not fit.
    """
    N, of_teacher = num_inference_steps, teacher_steps
    if N < 1 or of_teacher <= N or of_teacher % N:
        raise RecipeError(
            f"a student of {N} steps cannot imitate a teacher of {of_teacher}: the teacher's number must be a larger "
            f"multiple, such as {2 * max(N, 1)}"
        )
    if start_times is not None and kind != "deterministic":
        raise RecipeError(f"start_times={start_times} is for deterministic students; this ladder is {kind}")
    if start_times is not None and start_times % N:
        raise RecipeError(
            f"start_times={start_times} is no multiple of the student's {N} steps: its own times must be among them; "
            f"take {N * max(1, round(start_times / N))}"
        )
    L = math.lcm(of_teacher, start_times or 1)
    each, stride = L // N, L // of_teacher
    if kind == "encoder":
        starts = [each * i for i in range(N)]
        return Jumps(L, tuple(starts), tuple(start + each for start in starts), -stride)
    if kind == "stochastic":
        starts = [each * i for i in range(1, N + 1)]
        return Jumps(L, tuple(starts), tuple(max(start - 2 * each, 0) for start in starts), 2 * stride)
    starts = [L // (start_times or N) * j for j in range(1, (start_times or N) + 1)]
    return Jumps(L, tuple(starts), tuple(max(start - each, 0) for start in starts), stride)


@torch.no_grad()
def follow(
    model: Model,
    z: Tensor,
    start: Tensor,
    end: Tensor,
    *,
    stride: int,
    num_jumps: int,
    together: bool,
    times: Tensor,
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
) -> Tensor:
    """Return where the teacher takes z: deterministic DDIM steps from start to end, float32.

    Args:
        model: the teacher as a function of (z, time).
        z: (B, …) at the times of `start`.
        start, end: (B,) in units of the grid, all rows in the same direction.
        stride: units of a jump, negative upwards; the last one of a row ends at its end.
        num_jumps: jumps until the last row has arrived.
        together: whether every row arrives with the last jump.
        times: the time of each unit of the grid, on z's device.
        schedule: alpha and sigma.
        prediction_type: what the model returns.
    """
    place = start
    for _ in range(num_jumps):
        after = torch.maximum(place - stride, end) if stride > 0 else torch.minimum(place - stride, end)
        time = times[place]
        at_place, at_after = (schedule.alpha_sigma(u, ndim=z.ndim) for u in (time, times[after]))
        stepped = ddim_step(model(z, time).float(), z, *at_place, *at_after, prediction_type)
        # A row that has arrived stays: at the clean end an x output has no step (0/0).
        z = stepped if together else torch.where((place == end).view(-1, *(1,) * (z.ndim - 1)), z, stepped)
        place = after
    return z

"""What must also hold on a GPU: the same draws, the same pictures in bfloat16, training that learns and resumes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fewstep.bench.batches import SyntheticBatches
from fewstep.bench.sample import bench_sample
from fewstep.bench.sd15 import sd15_train_workload
from fewstep.bench.settings import SampleBenchSettings, TrainBenchSettings, Tuning
from fewstep.bench.train import bench_workload, make_objective
from fewstep.diffusion.random import RowRandom
from fewstep.distill import GuidanceObjective
from fewstep.evaluate.baselines import RowSpec, Sampler
from fewstep.evaluate.compare import make_conditions
from fewstep.models import load_model, load_parts
from fewstep.serve.sample import sample_pixels
from fewstep.train.in_process import train_in_process
from fewstep.train.job import TrainJob
from fewstep.train.prepare import compile_network
from fewstep.train.settings import TrainSettings
from tiny import tiny_student_folder, tiny_teacher

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")


def draw(folder: Path, device: torch.device, dtype: torch.dtype) -> Tensor:
    parts = load_parts(folder, dtype=dtype).to(device)
    w = torch.tensor([1.0, 2.0, 3.0])
    return sample_pixels(parts, prompts=["a", "b", "c"], seeds=[1, 2, 3], num_inference_steps=4, w=w).cpu().float()


def test_student_draws_the_same_pictures(tmp_path: Path) -> None:
    folder = tiny_student_folder(tmp_path / "student")
    reference = draw(folder, torch.device("cpu"), torch.float32)
    full, half = draw(folder, DEVICE, torch.float32), draw(folder, DEVICE, torch.bfloat16)
    # TF32 convolutions and another order of sums; bfloat16 keeps 8 bits. Steps of 1/255.
    assert (full - reference).abs().mean() < 1
    assert (half - reference).abs().mean() < 4
    assert (full - reference).abs().max() < 10
    assert reference.std() > 1  # no grey picture, which anything equals


def test_a_student_in_main_memory_is_brought_to_the_gpu_while_it_is_judged(tmp_path: Path) -> None:
    teacher = tiny_teacher().to(DEVICE)
    student = load_model(tiny_student_folder(tmp_path / "student")).denoiser()
    conditions = make_conditions(teacher, ["a", "b"], [1, 2], batch_size=2)
    sampler = Sampler(teacher.denoiser(), {4: student}, teacher.scheduler_config, 3.0)
    here = sampler(RowSpec("student", 4), conditions, batch_size=2).latents
    assert {p.device.type for p in student.network.parameters()} == {"cpu"}
    student.network.to(DEVICE)
    assert torch.equal(sampler(RowSpec("student", 4), conditions, batch_size=2).latents, here)


def test_rows_draw_the_same_numbers() -> None:
    options = {"seed": 5, "step": 7, "rows": [0, 3, 9]}
    cpu, gpu = (RowRandom(**options, device=device) for device in ("cpu", DEVICE))  # type: ignore[arg-type]
    for name, arguments in (("normal", (4, 8, 8)), ("uniform", (0.0, 4.0)), ("integers", (0, 1000)), ("normal", (2,))):
        one, other = getattr(cpu, name)(*arguments), getattr(gpu, name)(*arguments)
        assert other.device.type == DEVICE.type
        assert torch.equal(one, other.cpu()), name


class Killed(BaseException):
    """The process's end."""


def train_tiny(folder: Path, *, kill_after: int | None = None) -> dict[int, float]:
    """Train stage one for 30 updates, or until it is killed, and return the losses by update."""
    losses: dict[int, float] = {}

    def note(done: int, figures: dict[str, float]) -> None:
        losses[done] = figures["loss"]
        if done == kill_after:
            raise Killed

    job = TrainJob(
        name="tiny",
        fingerprint="a" * 64,
        objective=_objective,
        batches=partial(SyntheticBatches, latent_shape=(4, 4, 4), text_shape=(16, 16), global_batch_size=16),
        export=_save_weights,
        settings=TrainSettings(
            updates=30,
            global_batch_size=16,
            learning_rate=3e-3,
            ema_decay=0.9,
            hand_over="ema",
            precision="bfloat16",
            checkpoint_every=10,
            log_every=1,
        ),
        seed=3,
    )
    train_in_process(job, device=DEVICE, folder=str(folder), on_log=note)
    return losses


def _objective(device: torch.device) -> GuidanceObjective:
    return GuidanceObjective(tiny_teacher().to(device).denoiser(), w_min=0.0, w_max=4.0, embedding_dim=16)


def test_compiled_networks_have_the_gradients_of_eager_ones() -> None:
    """torch 2.13 gets them wrong on a CPU, silently, with its default layouts."""
    gradients = []
    for compiled in (False, True):
        objective = _objective(DEVICE)
        if compiled:
            compile_network(objective.network, DEVICE)
        batch = next(
            iter(
                SyntheticBatches(rank=0, world_size=1, latent_shape=(4, 4, 4), text_shape=(16, 16), global_batch_size=4)
            )
        )
        data = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in batch.data.items()}
        random = RowRandom(seed=0, step=0, rows=batch.rows, device=DEVICE)
        objective.loss(objective.network, data, random)[0].backward()
        gradients.append({name: p.grad for name, p in objective.network.named_parameters() if p.grad is not None})
    eager, other = gradients
    assert eager.keys() == other.keys()
    for name, gradient in eager.items():
        scale = gradient.abs().max().clamp_min(1e-6)
        assert float((other[name] - gradient).abs().max() / scale) < 2e-2, name


def _save_weights(network: nn.Module, folder: str) -> None:
    torch.save(network.state_dict(), Path(folder, "weights.pt"))


def test_training_learns_and_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # cuDNN may otherwise take another convolution algorithm the second time, and attention sums in any order.
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        whole = train_tiny(tmp_path / "whole")
        with pytest.raises(Killed):
            train_tiny(tmp_path / "parts", kill_after=17)
        resumed = train_tiny(tmp_path / "parts")
    finally:
        torch.use_deterministic_algorithms(False)
    first, last = (sum(whole[update] for update in updates) for updates in (range(1, 6), range(26, 31)))
    assert last < 0.8 * first
    assert list(resumed) == list(range(11, 31))
    assert resumed == {update: loss for update, loss in whole.items() if update > 10}
    one, other = (torch.load(tmp_path / name / "export" / "weights.pt") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("tuning", [Tuning(), Tuning(channels_last=True, tf32=True, cudnn_benchmark=True)])
def test_benchmarks_measure_the_gpu(tmp_path: Path, tuning: Tuning) -> None:
    trained = bench_workload(
        sd15_train_workload(64),
        TrainBenchSettings(device="auto", batch_size=2, updates=2, rounds=1, tuning=tuning),
        device=DEVICE,
    )
    assert trained.environment.device == DEVICE.type
    assert trained.precision == "bfloat16"
    # 859.5 M weights in float32: teacher, student, its gradients, two moments and the average.
    assert trained.peak_memory_bytes > 6 * 4 * 859.5e6
    sampled = bench_sample(
        SampleBenchSettings(batch_size=2, rounds=1, teacher_steps=4, tuning=tuning),
        model=tiny_student_folder(tmp_path / "student"),
    )
    assert sampled.precision == "bfloat16"
    assert sampled.speedup is not None


def test_objective_of_the_benchmark_lies_on_the_gpu() -> None:
    objective = make_objective(sd15_train_workload(64), TrainBenchSettings(stage="progressive"), DEVICE)
    assert all(weight.device.type == DEVICE.type for weight in objective.network.parameters())

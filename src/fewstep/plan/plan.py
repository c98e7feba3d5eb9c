"""The plan of a recipe: what each stage would compute, read, keep and hold in memory, and how long it would take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from fewstep.errors import FewstepError
from fewstep.plan.gpus import Gpu, find_gpu
from fewstep.plan.memory import (
    MEMORY_ERROR,
    Memory,
    encoders_in_bfloat16,
    is_bfloat16,
    memory_of,
    memory_of_passes,
    rows_per_worker,
)
from fewstep.plan.network import Network, forward_pass, sizes, training_pass
from fewstep.plan.shapes import Shape
from fewstep.plan.switches import Switches, what_would_fit
from fewstep.plan.teacher import find_shape
from fewstep.plan.transfer import SampleBytes, checkpoint_bytes, checkpoints_written, export_bytes, sample_bytes
from fewstep.plan.work import Passes, Training, work_of
from fewstep.recipe import Recipe
from fewstep.train.settings import ElasticWorkers


@dataclass(frozen=True)
class Step:
    """One training, or the driver's own passes in a stage.

    Attributes:
        stage: the stage that it belongs to.
        name: what it is, in words.
        updates: optimiser updates; None for the driver's passes.
        samples: samples that go through, each time that they do.
        flops: of one sample.
        num_gpus: GPUs that work at it.
        gpu_seconds: their time at the plan's MFU, added up.
        read_bytes: from the store.
        written_bytes: to the store, checkpoints that are deleted later included.
        stored_bytes: what stays there.
        sample_bytes: of one that is read.
        reads_pictures: whether it decodes pictures, and does not read latents.
        checkpoint_bytes: what its checkpoints take there while it runs.
        memory: of one GPU.
        switches: settings with which a training fits; empty where it fits, or where nothing tried would.
        batch_key: of the driver's passes, the recipe's key for how many samples go through at once.
    """

    stage: str
    name: str
    updates: int | None
    samples: int
    flops: float
    num_gpus: int
    gpu_seconds: float
    read_bytes: int
    written_bytes: int
    stored_bytes: int
    memory: Memory
    sample_bytes: int = 0
    reads_pictures: bool = False
    checkpoint_bytes: int = 0
    switches: tuple[Switches, ...] = ()
    batch_key: str = ""

    @property
    def label(self) -> str:
        """Stage and name, as they are shown."""
        return self.name if self.name == self.stage else f"{self.stage}, {self.name}"

    @property
    def seconds(self) -> float:
        """Time on the clock."""
        return self.gpu_seconds / self.num_gpus


@dataclass(frozen=True)
class Plan:
    """A whole recipe.

    Attributes:
        recipe: its name.
        teacher: what the recipe says of it.
        shape: the shape that stands for the teacher.
        about: what that is, in words.
        weights: of the teacher's denoising network.
        forward_flops: of one pass of it, one sample.
        gpu: the kind of GPU.
        mfu: share of the GPU's peak that is taken to be reached.
        num_workers: GPUs that a training takes; of a number that may change, the most.
        fewest_workers: GPUs that it may have to do with, for which its memory is.
        num_samples: training samples.
        samples_from: where that number is from, in words.
        steps: in order.
    """

    recipe: str
    teacher: str
    shape: str
    about: str
    weights: int
    forward_flops: float
    gpu: Gpu
    mfu: float
    num_workers: int
    fewest_workers: int
    num_samples: int
    samples_from: str
    steps: tuple[Step, ...]

    @property
    def gpu_hours(self) -> float:
        """Of all steps."""
        return sum(step.gpu_seconds for step in self.steps) / 3600

    @property
    def hours(self) -> float:
        """On the clock, one step after the other."""
        return sum(step.seconds for step in self.steps) / 3600

    @property
    def trainings(self) -> tuple[Step, ...]:
        """The steps that are trainings."""
        return tuple(step for step in self.steps if step.updates is not None)

    @property
    def fullest(self) -> Step | None:
        """What needs most memory; None when nothing is computed."""
        return max(self.steps, key=lambda step: step.memory.total, default=None)

    @property
    def fits(self) -> bool:
        """Whether everything fits its GPUs."""
        return not self.too_large

    @property
    def too_large(self) -> tuple[Step, ...]:
        """What does not fit."""
        return tuple(step for step in self.steps if step.memory.total > self.gpu.memory_bytes)

    def total(self, name: str) -> int:
        """Return the sum of a number of bytes over all steps: read_bytes, written_bytes or stored_bytes."""
        return sum(getattr(step, name) for step in self.steps)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as a JSON object."""
        steps = [
            {
                **asdict(step),
                "memory": {**asdict(step.memory), "total": step.memory.total},
                "switches": [
                    {"changes": each.changes, "memory": {**asdict(each.memory), "total": each.memory.total}}
                    for each in step.switches
                ],
                "seconds": step.seconds,
            }
            for step in self.steps
        ]
        return {
            **asdict(self),
            "steps": steps,
            "gpu_hours": self.gpu_hours,
            "hours": self.hours,
            "fits": self.fits,
            **{name: self.total(name) for name in ("read_bytes", "written_bytes", "stored_bytes")},
        }


def plan_recipe(
    recipe: Recipe,
    *,
    gpu: str = "h100",
    mfu: float = 0.4,
    shape: str | None = None,
    num_workers: int | None = None,
    num_samples: int | None = None,
) -> Plan:
    """Return the plan of a recipe.

    Args:
        recipe: the recipe.
        gpu: kind of GPU, a name in `fewstep.plan.gpus`.
        mfu: share of its peak that is taken to be reached; recomputation counts as work.
        shape: a shipped shape, or a folder with configurations, to stand for the teacher; None: the teacher's own.
        num_workers: GPUs of a training; None: the recipe's, 1 where it says auto, and of {min, max} the most for the
            time and the fewest for the memory.
        num_samples: training samples; None: as many as the recipe or the data set says, or else as many as the longest
            training sees.

    Raises:
        FewstepError: no such GPU, a share that none can be, or an update that the workers cannot share.
        ModelError: the teacher's sizes are not known.
    """
    found = find_gpu(gpu)
    if not 0 < mfu <= 1:
        raise FewstepError(f"--mfu {mfu:g} is outside 0 … 1: it is a share of the GPU's peak; 0.3 to 0.5 are usual")
    for name, value in (("--workers", num_workers), ("--samples", num_samples)):
        if value is not None and value < 1:
            raise FewstepError(f"{name} {value} is below 1")
    sizes_of = find_shape(recipe, named=shape)
    work = work_of(recipe, sizes_of)
    fewest, workers = (num_workers, num_workers) if num_workers else _workers(recipe)
    samples, samples_from = _training_samples(recipe, sizes_of, work, num_samples)
    planner = _Planner(recipe, sizes_of, found, mfu, workers, fewest, samples, sample_bytes(sizes_of))
    network = Network.of(sizes_of)
    return Plan(
        recipe=recipe.name,
        teacher=recipe.teacher or "trained by the recipe",
        shape=sizes_of.name,
        about=sizes_of.about,
        weights=sizes(network).weights,
        forward_flops=forward_pass(network, bfloat16=True).flops,
        gpu=found,
        mfu=mfu,
        num_workers=workers,
        fewest_workers=fewest,
        num_samples=samples,
        samples_from=samples_from,
        steps=tuple(planner.step(each) for each in work),
    )


def _workers(recipe: Recipe) -> tuple[int, int]:
    """Return the fewest and the most workers of a recipe that share a batch equally, as an estimate takes them to."""
    asked = recipe.cluster.num_workers
    if not isinstance(asked, ElasticWorkers):
        return (1, 1) if asked == "auto" else (asked, asked)
    streams = recipe.stream.num_streams
    able = [number for number in range(1, asked.max + 1) if streams % number == 0]
    return max(number for number in able if number <= asked.min), able[-1]


def _training_samples(
    recipe: Recipe, shape: Shape, work: Iterable[Training | Passes], given: int | None
) -> tuple[int, str]:
    if given is not None:
        return given, "--samples"
    prepared = recipe.prepare or recipe.prepare_classes or recipe.prepare_metadata
    if prepared is not None and prepared.num_train is not None and recipe.data.train is None:
        return prepared.num_train, "prepare.num_train"
    if shape.num_train is not None:
        return shape.num_train, "the data set's"
    longest = max(
        (each.settings.updates * each.settings.global_batch_size for each in work if isinstance(each, Training)),
        default=1,
    )
    return longest, "assumed: as many as the longest training sees, so that it sees none twice"


@dataclass(frozen=True)
class _Planner:
    recipe: Recipe
    shape: Shape
    gpu: Gpu
    mfu: float
    num_workers: int
    fewest_workers: int
    num_samples: int
    sample_bytes: SampleBytes

    def step(self, work: Training | Passes) -> Step:
        return self._training(work) if isinstance(work, Training) else self._passes(work)

    def _training(self, training: Training) -> Step:
        settings = training.settings
        bfloat16 = is_bfloat16(settings)
        try:
            rows_per_worker(settings, self.fewest_workers)
        except FewstepError as error:
            raise FewstepError(f"{training.stage}, {training.name}: {error}") from None
        flops, of_encoders = update_flops(training), encoding_flops(training)
        seconds_each = (flops - of_encoders) / self._speed(bfloat16=bfloat16)
        seconds_each += of_encoders / self._speed(bfloat16=encoders_in_bfloat16(training, settings))
        samples = settings.updates * settings.global_batch_size
        memory = memory_of(training, settings, self.shape, num_workers=self.fewest_workers)
        switches: list[Switches] = []
        if memory.total > self.gpu.memory_bytes:
            # With the room that the estimate may be wrong by, if there is a way.
            for share in (1 - MEMORY_ERROR, 1.0):
                room = int(share * self.gpu.memory_bytes)
                switches = switches or what_would_fit(
                    training, self.shape, num_workers=self.fewest_workers, memory_bytes=room
                )
        exported = export_bytes(training, self.shape)
        kept = checkpoint_bytes(training) * settings.num_checkpoints_to_keep
        return Step(
            stage=training.stage,
            name=training.name,
            updates=settings.updates,
            samples=samples,
            flops=flops,
            num_gpus=self.num_workers,
            gpu_seconds=samples * seconds_each,
            read_bytes=self._read(samples, self.sample_bytes.read(training.reads)),
            written_bytes=checkpoint_bytes(training) * checkpoints_written(training) + exported,
            stored_bytes=exported + (kept if settings.keep_checkpoints_when_done else 0),
            sample_bytes=self.sample_bytes.read(training.reads),
            reads_pictures=training.reads == "pictures",
            checkpoint_bytes=kept,
            memory=memory,
            switches=tuple(switches),
        )

    def _passes(self, passes: Passes) -> Step:
        samples = self.num_samples if passes.samples is None else passes.samples
        flops = sum(forward_pass(network, bfloat16=False).flops * count for network, count in passes.each)
        stored = samples * self._stored_of_sample(passes)
        settings = self.recipe.encode
        encodes_on_gpu = passes.stage == "encode" and self.recipe.cluster.use_gpu is not False
        num_gpus = 1
        if encodes_on_gpu and passes.samples is None:
            num_gpus = self.num_workers if settings.encoders == "auto" else settings.encoders
        return Step(
            stage=passes.stage,
            name=passes.name,
            updates=None,
            samples=samples,
            flops=flops,
            num_gpus=num_gpus,
            gpu_seconds=samples * flops / self._speed(bfloat16=encodes_on_gpu and settings.precision == "bfloat16"),
            read_bytes=samples * self.sample_bytes.picture,
            sample_bytes=self.sample_bytes.picture,
            reads_pictures=True,
            written_bytes=stored,
            stored_bytes=stored,
            memory=memory_of_passes(passes),
            batch_key=passes.batch_key,
        )

    def _stored_of_sample(self, passes: Passes) -> int:
        if passes.stage == "evaluate":
            return 0
        if passes.stage == "teacher":
            return self.sample_bytes.latents_alone
        held_out = passes.samples is not None
        if held_out or self.recipe.encode.store_text:
            return self.sample_bytes.latents
        return self.sample_bytes.latents_without_text

    def _read(self, samples: int, each: int) -> int:
        all_bytes = self.num_samples * each
        cached = all_bytes / self.num_workers <= self.recipe.stream.cache_bytes
        return min(samples * each, all_bytes) if cached else samples * each

    def _speed(self, *, bfloat16: bool) -> float:
        return self.mfu * self.gpu.flops_per_second("bfloat16" if bfloat16 else "float32")


def update_flops(training: Training) -> float:
    """Return the FLOPs of one sample in an update: teacher's passes, student's forward and backward pass, with
    gradient checkpointing what is computed again, and what `encoding_flops` counts."""
    settings = training.settings
    bfloat16 = is_bfloat16(settings)
    trained = training_pass(training.network, bfloat16=bfloat16, checkpointing=settings.gradient_checkpointing).flops
    if training.adapters is not None:
        # Frozen weights need no gradient: a third of a pass and its backward pass less. The adapters' own are small.
        trained -= forward_pass(training.network, bfloat16=bfloat16).flops
    flops = trained * training.rows
    if training.teacher is not None:
        calls = training.teacher_calls * training.teacher_rows
        flops += calls * forward_pass(training.teacher, bfloat16=bfloat16).flops
    flops += encoding_flops(training)
    if training.features is not None:
        # Of the target; of the output; and back to it, but not to the frozen weights.
        flops += 3 * forward_pass(training.features, bfloat16=bfloat16).flops
    return flops


def encoding_flops(training: Training) -> float:
    """Return the FLOPs of one sample's forward passes of the frozen VAE and text encoders in an update, which compute
    in a precision of their own; 0 where shards hold latents and embeddings."""
    flops = 0.0
    if training.text is not None:
        flops += forward_pass(training.text, bfloat16=False).flops
    if training.vae is not None:
        flops += training.vae_pictures * forward_pass(training.vae, bfloat16=False).flops
    return flops

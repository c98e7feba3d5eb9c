"""How much memory one GPU needs in a training or for the driver's passes, and what of it lies where.

All but the reserve is counted, not measured on a GPU: weights and what goes with each, and the bytes that live during
a forward and a backward pass, followed on meta tensors under CUDA's rules of autocast (`footprint.py`). On a CPU in
float32 the count is the allocator's own to a per cent (`tests/plan/test_footprint.py`). Not counted: workspaces of
cuDNN and cuBLAS, NCCL's buffers, CUDA's context and what the allocator cannot use; `RESERVE_BYTES` and
`FRAGMENTATION` stand for these and are estimates, as is `MEMORY_ERROR`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod

from fewstep.errors import FewstepError
from fewstep.models.latent import pictures_at_once
from fewstep.plan.gpus import GIB
from fewstep.plan.network import Sizes, adapter_weights, forward_pass, sizes, training_pass
from fewstep.plan.shapes import WHOLE_NUMBERS, Shape
from fewstep.plan.work import Passes, Training
from fewstep.train.settings import TrainSettings, wrong_micro_batch

#: CUDA's context, workspaces and, with several workers, NCCL's buffers.
RESERVE_BYTES = 2 * GIB

#: Share of the bytes that come and go in every pass which the allocator cannot use.
FRAGMENTATION = 0.08


#: Share by which the whole is taken to be wrong at most, until it is held against a GPU.
MEMORY_ERROR = 0.15


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU at the fullest moment of an update or of a pass, and of the main memory beside it.

    Attributes:
        weights: of the trained network, and of adapters; of all networks that the driver has there.
        gradients: counted whole, although at the fullest moment of a single pass not all are there yet.
        moments: AdamW's two.
        average: the averaged weights, where they are kept on the GPU.
        frozen: the teacher's weights, those of its text encoders and VAE included where the training needs them.
        gathered: with FSDP, the units that are whole for a moment, and their gradients.
        activations: what lives in a forward and backward pass beside these, casts of weights included.
        inputs: the batch, and the latents and embeddings that are made of it.
        reserve: see the module.
        host_average: main memory of a worker for an average that is kept there, the pinned copy included.
    """

    weights: int
    gradients: int = 0
    moments: int = 0
    average: int = 0
    frozen: int = 0
    gathered: int = 0
    activations: int = 0
    inputs: int = 0
    reserve: int = 0
    host_average: int = 0

    @property
    def total(self) -> int:
        """Bytes of the GPU in all."""
        return sum(value for name, value in asdict(self).items() if name != "host_average")


def is_bfloat16(settings: TrainSettings) -> bool:
    """Return whether a training computes in bfloat16 on a GPU; all that a plan is made for can."""
    return settings.precision != "float32"


def rows_per_worker(settings: TrainSettings, num_workers: int) -> int:
    """Return the rows that one worker has of an update.

    Raises:
        FewstepError: they cannot be shared out equally, or the micro-batch does not divide them.
    """
    rows, rest = divmod(settings.global_batch_size, num_workers)
    if rest or rows == 0:
        raise FewstepError(
            f"global_batch_size={settings.global_batch_size} cannot be shared equally by {num_workers} workers; take "
            "a multiple, or another number of workers (cluster.num_workers, or --workers)"
        )
    if settings.micro_batch_size is not None and rows % settings.micro_batch_size:
        raise FewstepError(wrong_micro_batch(settings.micro_batch_size, rows))
    return rows


def trained_weights(training: Training) -> int:
    """Return the number of weights that are trained: the network's, or those of its adapters."""
    if training.adapters is None:
        return sizes(training.network).weights
    lora = training.adapters
    return adapter_weights(training.network, rank=lora.rank, target_modules=lora.target_modules)


def memory_of(training: Training, settings: TrainSettings, shape: Shape, *, num_workers: int) -> Memory:
    """Return the memory of a training.

    Args:
        training: what is trained.
        settings: its settings, or others to try.
        shape: of the model, for the batch.
        num_workers: GPUs that share an update.

    Raises:
        FewstepError: see `rows_per_worker`.
    """
    rows = rows_per_worker(settings, num_workers)
    at_once = settings.micro_batch_size or rows
    sharded = settings.strategy == "fsdp" and num_workers > 1
    share = num_workers if sharded else 1
    network, trained = sizes(training.network), trained_weights(training)
    adapters = 0 if training.adapters is None else trained

    gradients = 4 * trained // share
    if sharded and at_once < rows:
        gradients += 4 * trained  # added up whole until the last micro-batch, see `gradient_sync`
    gathered = _gathered(network, with_gradients=True) if sharded else 0
    frozen = 0
    if training.teacher is not None:
        teacher = sizes(training.teacher)
        each = 2 if settings.frozen_dtype == "bfloat16" else 4
        frozen = each * teacher.weights
        if sharded and settings.shard_frozen:
            frozen //= num_workers
            gathered = max(gathered, _gathered(teacher, with_gradients=False) * each // 4)
    for encoder in (training.text, training.vae):
        if encoder is not None:
            frozen += (2 if settings.frozen_dtype == "bfloat16" else 4) * sizes(encoder).weights
    averaged = 0 if settings.ema_decay is None else 4 * trained // share
    on_host = settings.ema_device == "cpu"
    activations = _activations(training, settings, at_once, shape)
    return Memory(
        weights=4 * (network.weights + adapters) // share,
        gradients=gradients,
        moments=8 * trained // share,
        average=0 if on_host else averaged,
        frozen=frozen,
        gathered=gathered,
        activations=activations,
        inputs=_input_bytes(shape, training.reads) * (rows + at_once) + _made_bytes(training, shape) * at_once,
        reserve=RESERVE_BYTES + round(FRAGMENTATION * (activations + gathered)),
        host_average=2 * averaged if on_host else 0,
    )


def memory_of_passes(passes: Passes) -> Memory:
    """Return the memory of the driver's passes, which are made in float32, the networks one after the other."""
    activations = max(forward_pass(network, bfloat16=False).peak_bytes(rows) for network, rows in passes.at_once)
    return Memory(
        weights=4 * sum(sizes(network).weights for network in passes.held),
        activations=activations,
        reserve=RESERVE_BYTES + round(FRAGMENTATION * activations),
    )


def _gathered(network: Sizes, *, with_gradients: bool) -> int:
    # What lies outside the units stays whole during the pass, and what lies around the transformer blocks of a block
    # as long as these are used, its gradients too; of the units, one is used and the next one on its way. Going back,
    # a unit's gradients are whole too until they are shared out, twice while they are.
    around, units = (2, 4) if with_gradients else (1, 2)
    return 4 * (network.outside + around * network.around + units * network.largest_unit)


def encoders_in_bfloat16(training: Training, settings: TrainSettings) -> bool:
    """Return whether the frozen VAE and text encoders of a training compute in bfloat16."""
    return training.bfloat16_encoders or settings.frozen_dtype == "bfloat16"


def _activations(training: Training, settings: TrainSettings, rows: int, shape: Shape) -> int:
    bfloat16 = is_bfloat16(settings)
    footprint = training_pass(training.network, bfloat16=bfloat16, checkpointing=settings.gradient_checkpointing)
    of_student = footprint.peak_bytes(rows * training.rows)
    if training.features is not None:  # its activations are there while the student's still are
        of_student += training_pass(training.features, bfloat16=bfloat16, checkpointing=False).peak_bytes(rows)
    # One after the other: latents of the micro-batch, a few pictures at a time, the teacher's targets, the student.
    of_vae = of_teacher = 0
    if training.vae is not None:
        pictures = min(rows, pictures_at_once(shape.resolution, shape.resolution))
        encoding = forward_pass(training.vae, bfloat16=encoders_in_bfloat16(training, settings))
        of_vae = encoding.peak_bytes(pictures)
    if training.teacher is not None:
        of_teacher = forward_pass(training.teacher, bfloat16=bfloat16).peak_bytes(rows * training.teacher_rows)
    return max(of_vae, of_teacher, of_student)


def _input_bytes(shape: Shape, reads: str) -> int:
    """Return the bytes of a sample as the device gets it."""
    if reads == "pictures":
        return shape.pixel_bytes
    told = {} if reads == "latents_alone" else shape.conditions
    conditions = sum(prod(size) * (8 if name in WHOLE_NUMBERS else 2) for name, size in told.items())
    return 2 * 2 * prod(shape.sample_shape) + conditions


def _made_bytes(training: Training, shape: Shape) -> int:
    """Return the bytes of what a training's own encoders make of a sample, float32: latents and condition."""
    if training.vae is None:
        return 0
    made = [size for name, size in shape.conditions.items() if name not in WHOLE_NUMBERS]
    return 4 * (2 * prod(shape.sample_shape) + sum(map(prod, made)))

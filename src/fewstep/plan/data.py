"""What the data path takes at a size: requests, bytes, cores and memory, from what one core was measured to do."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fewstep.data.buckets import Size, bucket_sizes
from fewstep.data.source import PASS_PIECE_BYTES
from fewstep.errors import FewstepError
from fewstep.plan.gpus import GIB
from fewstep.plan.plan import Plan, Step
from fewstep.plan.rates import Rates, read_rates, shipped_rates
from fewstep.plan.render import bytes_in_words, number
from fewstep.plan.shapes import Shape
from fewstep.plan.teacher import find_shape
from fewstep.plan.transfer import SampleBytes, sample_bytes
from fewstep.recipe import Recipe

#: GPUs, and so workers, of a machine; an assumption.
_GPUS_OF_A_NODE = 8
#: Of an entry in index.json.
_INDEX_BYTES_OF_A_SHARD = 190


@dataclass(frozen=True)
class Choosing:
    """Rows of metadata, in `fewstep prepare`.

    Attributes:
        rows: in the tables.
        kept_rows: that pass the filters, so many as the pictures need at the plan's share of successful downloads.
        core_hours: CPU time.
        read_bytes: of parquet.
        scratch_bytes: in the store until the choice is made.
        tasks: pieces of work of each step.
        requests: to the store.
        task_memory_bytes: of one task.
    """

    rows: int
    kept_rows: int
    core_hours: float
    read_bytes: float
    scratch_bytes: float
    tasks: int
    requests: float
    task_memory_bytes: float


@dataclass(frozen=True)
class Downloading:
    """Pictures from the web; `bytes_from_the_web` and `core_hours` by img2dataset's own figures."""

    attempted: int
    core_hours: float
    bytes_from_the_web: float
    stored_bytes: float


@dataclass(frozen=True)
class Reading:
    """A step that reads shards, at the pace of its GPUs.

    Attributes:
        label: of the step.
        samples_per_s, bytes_per_s, requests_per_s: of all workers together.
        cores_per_gpu: that reading and decoding keep busy.
    """

    label: str
    samples_per_s: float
    bytes_per_s: float
    requests_per_s: float
    cores_per_gpu: float


@dataclass(frozen=True)
class Encoding:
    """What the stage encode takes of each encoder's machine to make the training latents, for shards of one size.

    Attributes:
        encoders: that work at once.
        shard_samples: of a shard, the mean.
        disk_bytes: of the local disk (TMPDIR), by each encoder: a latent shard until it is uploaded.
        num_sizes: of pictures: the buckets, or the square alone.
        sorting_bytes: of main memory, by each encoder, with encode.buckets: the latents of a shard until they are
            sorted, and a batch of uint8 pictures of each size; 0 without. Beside what any encoder holds: the networks,
            pieces of the picture shard, and the batches made ahead.
    """

    encoders: int
    shard_samples: float
    disk_bytes: float
    num_sizes: int
    sorting_bytes: float


@dataclass(frozen=True)
class DataPlan:
    """The data path of a recipe.

    Attributes:
        samples, shards, workers: of a training.
        num_streams: canonical streams; the recipe's, or as many as the workers need.
        rates: of a core.
        success: share of addresses that still give a picture; an assumption.
        choosing, downloading: None where no rows of metadata are told.
        encoding: None where no training latents are made.
        readings: encode, where it makes training latents, and each training that reads faster than those before.
        index_bytes, list_bytes: the list of shards in the store, and in each worker's memory.
        worker_memory_bytes: of the stream in one worker, the list included and, with encode.buckets, what waits for
            others of its size.
        node_memory_bytes: of a machine with 8 GPUs.
    """

    samples: int
    shards: int
    workers: int
    num_streams: int
    recipe_streams: int
    rates: Rates
    success: float
    choosing: Choosing | None
    downloading: Downloading | None
    encoding: Encoding | None
    readings: tuple[Reading, ...]
    index_bytes: float
    list_bytes: float
    worker_memory_bytes: float
    node_memory_bytes: float

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return asdict(self)


def plan_data_of(
    plan: Plan,
    recipe: Recipe,
    *,
    shape: str | None = None,
    rows: int | None = None,
    shards: int | None = None,
    success: float = 0.7,
    rates: Path | None = None,
) -> DataPlan:
    """Return what the data path of a plan takes.

    Args:
        plan: of the recipe.
        recipe: the recipe.
        shape: as for `plan_recipe`.
        rows: of metadata; None: the pictures are there.
        shards: None: one for 10,000 samples.
        success: share of addresses that give a picture.
        rates: file with the figures of a benchmark; None: the shipped ones.

    Raises:
        FewstepError: a share that none can be, more pictures than rows could give, a file without figures, or
            buckets that the model's pictures cannot have.
    """
    found = find_shape(recipe, named=shape)
    of_a_core = shipped_rates() if rates is None else read_rates(rates)
    return _plan_data(plan, recipe, sample_bytes(found), found, of_a_core, rows, shards, success)


def _plan_data(
    plan: Plan,
    recipe: Recipe,
    bytes_: SampleBytes,
    shape: Shape,
    rates: Rates,
    rows: int | None,
    shards: int | None,
    success: float,
) -> DataPlan:
    for name, value in (("--rows", rows), ("--shards", shards)):
        if value is not None and value < 1:
            raise FewstepError(f"{name} {value} is below 1")
    if not 0 < success <= 1:
        raise FewstepError(f"--success {success:g} is outside 0 … 1: it is the share of addresses that give a picture")
    samples, workers = plan.num_samples, plan.num_workers
    shards = shards or max(1, -(-samples // 10_000))
    attempted = round(samples / success)
    if rows is not None and rows < attempted:
        raise FewstepError(
            f"--rows {rows} is less than the {attempted} that {samples} pictures need, where {success:g} of the "
            "addresses give one (--success): take fewer --samples"
        )
    settings = recipe.stream
    streams = max(1, round(settings.num_streams / workers)) * workers if settings.num_streams % workers else (
        settings.num_streams
    )  # fmt: skip
    encode = next((step for step in plan.steps if step.stage == "encode" and recipe.encode.store_latents), None)
    readings = _readings(plan, encode, recipe, bytes_, shape.resolution, rates)
    list_bytes = shards * rates.shard_bytes_in_memory
    own = streams // workers
    processes = max(1, settings.loader_processes)
    batch = max((step.samples / (step.updates or 1) for step in plan.trainings), default=0) / workers
    in_batch = max((_held_bytes(step, shape, in_batch=True) for step in plan.trainings), default=0)
    worker = (
        own * 2 * (settings.shuffle_bytes + settings.piece_bytes)
        + processes * settings.connections * settings.piece_bytes
        + (settings.prefetch_batches + 1) * batch * in_batch
        + own * max((_waiting_bytes(step, recipe, shape) for step in plan.trainings), default=0)
        + settings.cache_bytes
        + (1 + settings.loader_processes) * list_bytes
    )
    return DataPlan(
        samples=samples,
        shards=shards,
        workers=workers,
        num_streams=streams,
        recipe_streams=settings.num_streams,
        rates=rates,
        success=success,
        choosing=None if rows is None else _choosing(rows, attempted, recipe, rates),
        downloading=None if rows is None else _downloading(attempted, samples, bytes_, rates),
        encoding=None if encode is None else _encoding(encode, recipe, shape, shards),
        readings=readings,
        index_bytes=shards * _INDEX_BYTES_OF_A_SHARD,
        list_bytes=list_bytes,
        worker_memory_bytes=worker,
        node_memory_bytes=worker * min(workers, _GPUS_OF_A_NODE),
    )


def _choosing(rows: int, kept: int, recipe: Recipe, rates: Rates) -> Choosing:
    per_task = recipe.prepare_metadata.rows_per_task if recipe.prepare_metadata is not None else 4_000_000
    tasks = max(1, -(-rows // per_task))
    # Each task of a bucket reads from what every task of the step before left: addresses, captions, the draw's two.
    spans = min(tasks * tasks, kept)
    return Choosing(
        rows=rows,
        kept_rows=kept,
        core_hours=(rows * rates.row_read_s + kept * rates.row_kept_s) / 3600,
        read_bytes=rows * rates.row_bytes,
        scratch_bytes=kept * rates.row_kept_bytes,
        tasks=tasks,
        requests=4.0 * spans + 8.0 * tasks,
        task_memory_bytes=600.0 * per_task * kept / rows + 0.5 * GIB,
    )


def _downloading(attempted: int, samples: int, bytes_: SampleBytes, rates: Rates) -> Downloading:
    return Downloading(
        attempted=attempted,
        core_hours=attempted / rates.downloads_per_s / 3600,
        bytes_from_the_web=samples * rates.download_bytes,
        stored_bytes=float(samples * bytes_.picture),
    )


def _sizes(recipe: Recipe, shape: Shape) -> tuple[Size, ...]:
    """Return width and height of the pictures of latent models: the buckets, or the square."""
    if recipe.encode.buckets is None or shape.vae is None:
        return ((shape.resolution, shape.resolution),)
    return bucket_sizes(shape.resolution, recipe.encode.buckets)


def _encoding(step: Step, recipe: Recipe, shape: Shape, shards: int) -> Encoding:
    sizes = _sizes(recipe, shape)
    shard_bytes = step.stored_bytes / shards
    pictures = recipe.encode.batch_size * sum(3 * width * height for width, height in sizes)
    return Encoding(
        encoders=step.num_gpus,
        shard_samples=step.samples / shards,
        disk_bytes=shard_bytes,
        num_sizes=len(sizes),
        sorting_bytes=0 if recipe.encode.buckets is None else shard_bytes + pictures,
    )


def _held_bytes(step: Step, shape: Shape, *, in_batch: bool) -> int:
    """Return the bytes of a decoded sample in main memory."""
    if step.reads_pictures:
        return shape.pixel_bytes
    return step.sample_bytes * (2 if in_batch else 1)  # float16 in the shards, float32 in a batch


def _waiting_bytes(step: Step, recipe: Recipe, shape: Shape) -> int:
    """Return the bytes of samples that wait in a stream, at most: of each size a group less one."""
    sizes = _sizes(recipe, shape)
    if len(sizes) == 1 or step.stage == "teacher":
        return 0
    group = step.samples // (step.updates or 1) // recipe.stream.num_streams
    return len(sizes) * max(0, group - 1) * _held_bytes(step, shape, in_batch=False)


def _readings(
    plan: Plan, encode: Step | None, recipe: Recipe, bytes_: SampleBytes, resolution: int, rates: Rates
) -> tuple[Reading, ...]:
    found: list[Reading] = []
    if encode is not None:
        found.append(_reading(encode, bytes_.picture, plan.num_workers, recipe, resolution, rates))
    for step in plan.trainings:
        reading = _reading(step, step.sample_bytes, plan.num_workers, recipe, resolution, rates)
        trainings = [each for each in found if not each.label.startswith("encode")]
        if all(reading.bytes_per_s > 1.01 * each.bytes_per_s for each in trainings):
            found.append(reading)
    return tuple(found)


def _reading(step: Step, each: int, workers: int, recipe: Recipe, resolution: int, rates: Rates) -> Reading:
    # What the driver does on one GPU is done by as many as there are workers.
    samples_per_s = step.samples / (step.gpu_seconds / workers)
    piece_bytes = PASS_PIECE_BYTES if step.stage == "encode" else recipe.stream.piece_bytes
    if step.reads_pictures:
        of_a_core = rates.pictures_per_s * (rates.pictures_px / resolution) ** 2
    else:
        of_a_core = rates.latent_bytes_per_s / each
    return Reading(
        label=step.label,
        samples_per_s=samples_per_s,
        bytes_per_s=samples_per_s * each,
        requests_per_s=samples_per_s * each / piece_bytes,
        cores_per_gpu=samples_per_s / workers / of_a_core,
    )


def render_data(plan: DataPlan) -> str:
    """Return the plan of the data path as text for a terminal."""
    lines = [
        f"data: {number(plan.samples)} samples in {plan.shards:,} shards, {plan.workers} workers; rates of "
        f"{plan.rates.about}",
        "",
    ]
    if plan.choosing is not None and plan.downloading is not None:
        each = plan.choosing
        lines += [
            f"choose rows   {number(each.rows)} rows, {number(each.kept_rows)} pass and are drawn: "
            f"{plan.success:.0%} of addresses are assumed to give a picture",
            f"              {number(each.core_hours)} core-hours in {each.tasks:,} tasks of "
            f"{each.task_memory_bytes / GIB:.1f} GiB; {bytes_in_words(each.read_bytes)} of parquet read, "
            f"{bytes_in_words(each.scratch_bytes)} kept meanwhile, {number(each.requests)} requests",
            f"download      {number(plan.downloading.attempted)} addresses, "
            f"{number(plan.downloading.core_hours)} core-hours; {bytes_in_words(plan.downloading.bytes_from_the_web)} "
            f"from the web, {bytes_in_words(plan.downloading.stored_bytes)} stored",
        ]
    for reading in plan.readings:
        lines += [
            f"{reading.label}, at the pace of its GPUs",
            f"              {number(reading.samples_per_s)} samples/s, {bytes_in_words(reading.bytes_per_s)}/s, "
            f"{number(reading.requests_per_s)} requests/s; {number(reading.cores_per_gpu)} cores a GPU",
        ]
    if plan.encoding is not None:
        lines += _encoding_in_words(plan.encoding)
    lines += [
        f"memory        {bytes_in_words(plan.worker_memory_bytes)} a worker for its "
        f"{plan.num_streams // plan.workers} of {plan.num_streams} streams, "
        f"{bytes_in_words(plan.node_memory_bytes)} a machine of {min(plan.workers, _GPUS_OF_A_NODE)} GPUs; the list of "
        f"shards is {bytes_in_words(plan.list_bytes)} of it in each process",
        f"before the first batch each worker reads the list: {bytes_in_words(plan.index_bytes)} in one request, or "
        f"{-(-plan.shards // 1000):,} requests of listing, and {plan.shards:,} small ones where img2dataset left a "
        "_stats.json beside each shard, where they have no index.json",
    ]
    if plan.num_streams != plan.recipe_streams:
        lines.append(
            f"stream.num_streams={plan.recipe_streams} cannot be shared by {plan.workers} workers; counted with "
            f"{plan.num_streams}"
        )
    return "\n".join(lines)


def _encoding_in_words(encoding: Encoding) -> list[str]:
    near = min(encoding.encoders, _GPUS_OF_A_NODE)

    def held(size: float) -> str:
        of_machine = "" if near == 1 else f", {bytes_in_words(near * size)} on a machine of {near} GPUs"
        return f"{bytes_in_words(size)} {{}} on each encoder{of_machine}"

    disk = held(encoding.disk_bytes).format("of the local disk (TMPDIR)")
    lines = [f"encode holds {disk}: a shard of {number(encoding.shard_samples)} latents until it is uploaded"]
    if encoding.sorting_bytes:
        memory = held(encoding.sorting_bytes).format("of memory")
        lines.append(
            f"encode holds {memory}: the latents of a shard until they are sorted, and a batch of pictures of each of "
            f"{encoding.num_sizes} sizes"
        )
    return lines

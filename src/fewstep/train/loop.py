"""The one training loop, for every objective. Read `train` from top to bottom."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion.random import RowRandom
from fewstep.errors import DataError, FewstepError
from fewstep.train.checkpoint import TrainState, add_counts, check_belongs, merge_streams
from fewstep.train.ema import Ema
from fewstep.train.host import Host
from fewstep.train.job import TrainJob
from fewstep.train.meters import Meters, first_not_finite
from fewstep.train.optimiser import make_optimizer, set_learning_rate
from fewstep.train.precision import resolve_precision
from fewstep.train.settings import TrainSettings


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What the loop ends with: the network carrying the weights to hand over, and how it went."""

    network: nn.Module
    meters: Meters
    figures: dict[str, float]
    resumed_from: int | None


def train(job: TrainJob, host: Host) -> Trained:
    """Run a training to its end, from its newest checkpoint if there is one.

    A resumed run does what an uninterrupted one would have done: data position, schedule and random numbers are
    functions of the update index, and network, average and optimiser come from the checkpoint. The network stays in
    float32; `bfloat16` means autocast around the objective.

    Raises:
        CheckpointError: the checkpoint is damaged or of another recipe.
        DataError: the data ended, or a batch has the wrong number of rows.
        FewstepError: the loss or the gradient stopped being a finite number; the last good checkpoint stays.
    """
    settings = job.settings
    device = host.device
    rows_per_worker = _rows_per_worker(settings, host)

    torch.manual_seed(job.seed)
    objective = job.objective(device)
    network = objective.network.to(device).train()
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = make_optimizer(objective, settings)
    ema = Ema(network, settings.ema_decay) if settings.ema_decay is not None else None
    source = job.batches(rank=host.rank, world_size=host.world_size)

    # Asked once, of one worker: a training that goes on elsewhere, or on unlike machines, keeps to one type.
    precision = host.gather(resolve_precision(settings.precision, device))[0]
    first, earlier_s, waited_s = 0, 0.0, 0.0
    skipped_before: dict[str, int] = {}
    means: dict[str, float] = {}
    state = host.load()
    if state is not None:
        check_belongs(state, job, uri=host.checkpoint_uri)
        network.load_state_dict(state.network)
        optimizer.load_state_dict(state.optimizer)
        if ema is not None and state.ema is not None:
            ema.load_state_dict(state.ema)
        source.load_state(state.streams)
        first, earlier_s, waited_s, skipped_before = state.update, state.seconds, state.waited_s, state.skipped
        means, precision = state.figures, state.precision
    resumed_from = first if state is not None else None
    del state

    model = host.parallel(network)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")
    stream = iter(source)
    meters = Meters(samples_per_update=settings.global_batch_size, seconds=earlier_s, waited_s=waited_s)
    host.ticked(first)

    for update in range(first, settings.updates):
        with meters.waiting():
            batch = next(stream, None)
        if batch is None or len(batch.rows) != rows_per_worker:
            raise DataError(_wrong_batch(job, update, rows_per_worker, None if batch is None else len(batch.rows)))

        # Anything that draws without RowRandom (dropout) depends on the update and the rank, never on the process.
        torch.manual_seed(((job.seed * 1_000_003 + update) * 4_099 + host.rank) % 2**63)
        set_learning_rate(optimizer, settings, update)
        random = RowRandom(seed=job.seed, step=update, rows=batch.rows, device=device)
        with autocast:
            loss, figures = objective.loss(model, _to_device(batch.data, device), random)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(parameters, settings.grad_clip_norm)
        optimizer.step()
        if ema is not None:
            ema.step(update)
        meters.add({**figures, "loss": loss, "grad_norm": grad_norm})

        done = update + 1
        host.ticked(done)
        save_now = done % settings.checkpoint_every == 0 or done == settings.updates
        if save_now or done % settings.log_every == 0:  # the only places where the host waits for the device
            means, each = meters.read(host.mean)
            _stop_unless_finite(job, each, done=done, checkpoint_uri=host.checkpoint_uri)
            means["learning_rate"] = optimizer.param_groups[0]["lr"]
            if save_now:
                _stop_unless_weights_finite(job, parameters, done=done, checkpoint_uri=host.checkpoint_uri)
                positions = host.gather((batch.state, batch.counts))
                skipped = add_counts([skipped_before, *(counts for _, counts in positions)])
                means |= {f"skipped/{reason}": float(count) for reason, count in skipped.items()}
                host.save(
                    TrainState(
                        fingerprint=job.fingerprint,
                        settings=settings.of_the_weights(),
                        update=done,
                        network=network.state_dict(),
                        ema=ema.state_dict() if ema is not None else None,
                        optimizer=optimizer.state_dict(),
                        streams=merge_streams([state for state, _ in positions]),
                        skipped=skipped,
                        figures=means,
                        seconds=meters.seconds,
                        waited_s=meters.waited_s,
                        precision=precision,
                    )
                    if host.rank == 0
                    else None,
                    update=done,
                    last=done == settings.updates,
                )
            host.logged(means, updates_done=done)

    if isinstance(stream, Generator):
        stream.close()  # ends its reading ahead
    if settings.hand_over == "ema" and ema is not None:
        ema.copy_to(network)
    return Trained(network=network, meters=meters, figures=means, resumed_from=resumed_from)


def _rows_per_worker(settings: TrainSettings, host: Host) -> int:
    rows, rest = divmod(settings.global_batch_size, host.world_size)
    if rest:
        raise DataError(
            f"global_batch_size={settings.global_batch_size} cannot be shared equally by {host.world_size} workers; "
            f"take a multiple of {host.world_size}, or another num_workers"
        )
    return rows


def _to_device(data: dict[str, Any], device: torch.device) -> dict[str, Any]:
    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        # From pinned memory the copy runs beside the computation; from pageable memory it would wait for it.
        pinned = value.pin_memory() if device.type == "cuda" and not value.is_cuda else value
        return pinned.to(device, non_blocking=True)

    return {name: move(value) for name, value in data.items()}


def _wrong_batch(job: TrainJob, update: int, wanted: int, got: int | None) -> str:
    if got is None:
        return (
            f"{job.name}: the data ended before update {update + 1} of {job.settings.updates}; "
            "a batch source must go on for ever, so look whether its shard list is empty"
        )
    return (
        f"{job.name}: the batch of update {update + 1} has {got} rows where this worker's share of "
        f"global_batch_size={job.settings.global_batch_size} is {wanted}; give the data the same batch size"
    )


def _stop_unless_finite(job: TrainJob, figures: dict[str, list[float]], *, done: int, checkpoint_uri: str) -> None:
    bad = first_not_finite(figures)
    if bad is not None:
        index, name, value = bad
        update = done - len(figures["loss"]) + index + 1
        raise FewstepError(_diverged(job, f"the {name} became {value}", update, checkpoint_uri))


@torch.no_grad()
def _stop_unless_weights_finite(job: TrainJob, weights: list[nn.Parameter], *, done: int, checkpoint_uri: str) -> None:
    norm = torch.stack(torch._foreach_norm([*weights])).sum().item()
    if not math.isfinite(norm):
        raise FewstepError(_diverged(job, f"the weights became {norm}", done, checkpoint_uri))


def _diverged(job: TrainJob, what: str, update: int, checkpoint_uri: str) -> str:
    settings = job.settings
    return (
        f"{job.name}: {what} at update {update} of {settings.updates}. Nothing of it was saved: the last good "
        f"checkpoint is still in {checkpoint_uri}. Usual ways out: a lower learning_rate (now "
        f"{settings.learning_rate:g}), a smaller grad_clip_norm (now {settings.grad_clip_norm:g}), more "
        f"warmup_updates (now {settings.warmup_updates}), or precision: float32 (the recipe says {settings.precision})"
    )

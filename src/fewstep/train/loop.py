"""The one training loop, for every objective. Read `train` from top to bottom."""

from __future__ import annotations

import re
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion.random import RowRandom
from fewstep.errors import DataError
from fewstep.train.checkpoint import TrainState, add_counts, check_belongs, merge_streams
from fewstep.train.ema import Ema
from fewstep.train.finite import FiniteCheck
from fewstep.train.host import Host
from fewstep.train.job import TrainJob
from fewstep.train.meters import Meters
from fewstep.train.optimiser import clip_gradients, make_optimizer, set_learning_rate
from fewstep.train.parallel import gathered, gradient_sync, load_network, load_optimizer
from fewstep.train.precision import resolve_precision
from fewstep.train.prepare import compile_network, prepare_frozen, prepare_network
from fewstep.train.share import share_of


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What the loop ends with: the network carrying the weights to hand over (whole on rank 0), and how it went."""

    network: nn.Module
    meters: Meters
    figures: dict[str, float]
    resumed_from: int | None


def train(job: TrainJob, host: Host) -> Trained:
    """Run a training to its end, from its newest checkpoint if there is one.

    A resumed run does what an uninterrupted one would have done: data position, schedule and random numbers are
    functions of the update index, and network, average and optimiser come from the checkpoint. The network stays in
    float32; `bfloat16` means autocast around the objective. The checkpoint holds whole tensors, so that it does not
    matter how many workers wrote it, or whether in shards.

    Raises:
        CheckpointError: the checkpoint is damaged or of another recipe.
        DataError: the data ended, or a batch has the wrong number of rows.
        FewstepError: the loss or the gradient stopped being a finite number; the last good checkpoint stays. Or a
            setting has no effect on this objective.
    """
    settings = job.settings
    device = host.device
    share = share_of(job, rank=host.rank, world_size=host.world_size)

    torch.manual_seed(job.seed)
    objective = job.objective(device)
    network = objective.network.to(device).train()
    prepare_network(network, settings)
    model = host.parallel(network, strategy=settings.strategy)  # with fsdp the weights are shards from here on
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = make_optimizer(objective, settings)
    ema = None
    if settings.ema_decay is not None:
        ema = Ema(network, settings.ema_decay, every=settings.ema_every, device=settings.ema_device)
    source = job.batches(rank=host.rank, world_size=host.world_size)

    # Asked once, of one worker: a training that goes on elsewhere, or on unlike machines, keeps to one type.
    precision = host.gather(resolve_precision(settings.precision, device))[0]
    first, earlier_s, waited_s = 0, 0.0, 0.0
    skipped_before: dict[str, int] = {}
    means: dict[str, float] = {}
    state = host.load()
    if state is not None:
        check_belongs(state, job, uri=host.checkpoint_uri)
        load_network(network, state.network)
        load_optimizer(optimizer, state.optimizer)
        if ema is not None and state.ema is not None:
            ema.load_state_dict(state.ema)
        source.load_state(state.streams)
        first, earlier_s, waited_s, skipped_before = state.update, state.seconds, state.waited_s, state.skipped
        means, precision = state.figures, state.precision
    resumed_from = first if state is not None else None
    del state

    frozen = prepare_frozen(objective, settings, precision)
    for other in frozen if settings.shard_frozen else ():
        host.shard_frozen(other)
    for each in (network, *frozen) if settings.compile else ():
        compile_network(each, device)

    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")
    stream = iter(source)
    meters = Meters(samples_per_update=settings.global_batch_size, seconds=earlier_s, waited_s=waited_s)
    finite = FiniteCheck(job, host)
    host.ticked(first)

    for update in range(first, settings.updates):
        with meters.waiting():
            batch = next(stream, None)
        if batch is None or len(batch.rows) != share.rows:
            raise DataError(_wrong_batch(job, update, share.rows, None if batch is None else len(batch.rows)))
        finite.note(batch)

        # Anything that draws without RowRandom (dropout) depends on the update and the rank, never on the process.
        torch.manual_seed(((job.seed * 1_000_003 + update) * 4_099 + host.rank) % 2**63)
        set_learning_rate(optimizer, settings, update)
        optimizer.zero_grad(set_to_none=True)
        data = _to_device(batch.data, device)
        readings = []
        for number, part in enumerate(share.passes, start=1):
            random = RowRandom(seed=job.seed, step=update, rows=batch.rows[part.rows], device=device)
            with gradient_sync(model, on=number == len(share.passes)):
                with autocast:
                    taken = _take(data, part.rows, of=share.rows, device=device)
                    loss, figures = objective.loss(model, taken, random)
                (loss / part.divisor).backward()  # so that the average over the workers is the mean over all rows
            readings.append({**figures, "loss": loss.detach()})
        grad_norm = clip_gradients(parameters, settings.grad_clip_norm)
        optimizer.step()
        if ema is not None:
            ema.step(update)
        meters.add({**share.mean(readings), "grad_norm": grad_norm})

        done = update + 1
        host.ticked(done)
        early = host.must_save(done)
        save_now = early or done % settings.checkpoint_every == 0 or done == settings.updates
        if save_now or done % settings.log_every == 0:  # the only places where the host waits for the device
            means, each_update = meters.read(host.mean)
            finite.check(each_update, own_losses=meters.own_losses, done=done)
            means["learning_rate"] = optimizer.param_groups[0]["lr"]
            means["workers"] = float(host.world_size)
            if save_now:
                finite.check_weights(parameters, done=done)
                positions = host.gather((batch.state, batch.counts, batch.drawn))
                skipped = add_counts([skipped_before, *(counts for _, counts, _ in positions)])
                means |= {_figure_name(reason): float(count) for reason, count in skipped.items()}
                drawn = add_counts([each for _, _, each in positions])
                means |= {f"drawn/{source}": float(count) for source, count in drawn.items()}
                on_rank_0 = host.rank == 0
                state = TrainState(
                    fingerprint=job.fingerprint,
                    settings=settings.of_the_weights(),
                    update=done,
                    network=gathered(network.state_dict(), keep=on_rank_0),
                    ema=gathered(ema.state_dict(), keep=on_rank_0) if ema is not None else None,
                    optimizer=gathered(optimizer.state_dict(), keep=on_rank_0),
                    streams=merge_streams([state for state, _, _ in positions]),
                    skipped=skipped,
                    figures=means,
                    seconds=meters.seconds,
                    waited_s=meters.waited_s,
                    precision=precision,
                )
                host.save(state if on_rank_0 else None, update=done, last=done == settings.updates)
                del state
            host.logged(means, updates_done=done)

    if isinstance(stream, Generator):
        stream.close()  # ends its reading ahead
    if settings.hand_over == "ema" and ema is not None:
        ema.copy_to(network)
    return Trained(network=host.whole(network), meters=meters, figures=means, resumed_from=resumed_from)


def _figure_name(reason: str) -> str:
    """Return what the number of samples skipped or filtered for a reason is called, in letters that MLflow takes."""
    rest = reason.removeprefix("filtered, ")
    # MLflow takes names for paths, and refuses one with //.
    said = re.sub(r"[^A-Za-z0-9_.:/ -]", "_", rest).replace("//", "__").rstrip("/")
    return f"{'skipped' if rest == reason else 'filtered'}/{said}"[:200]


def _take(data: dict[str, Any], rows: slice, *, of: int, device: torch.device) -> dict[str, Any]:
    """Return the named rows of a batch, stacked on the device where groups of them have unlike shapes; what is not one
    entry for each row belongs to every micro-batch."""

    def take(value: Any) -> Any:
        by_row = (isinstance(value, Tensor) and value.dim() > 0) or isinstance(value, list)
        if not by_row or len(value) != of:
            return value
        taken = value[rows]
        return _move(torch.stack(taken), device) if isinstance(taken, list) and isinstance(taken[0], Tensor) else taken

    return {name: take(value) for name, value in data.items()}


def _to_device(data: dict[str, Any], device: torch.device) -> dict[str, Any]:
    # Lists of tensors are moved by `_take`, a copy for each micro-batch instead of one for each row.
    return {name: _move(value, device) if isinstance(value, Tensor) else value for name, value in data.items()}


def _move(value: Tensor, device: torch.device) -> Tensor:
    # From pinned memory the copy runs beside the computation; from pageable memory it would wait for it.
    pinned = value.pin_memory() if device.type == "cuda" and not value.is_cuda else value
    return pinned.to(device, non_blocking=True)


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

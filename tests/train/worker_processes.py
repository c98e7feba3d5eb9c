"""Two processes of a gloo group that train, then three; what they found out lies in a folder for `test_workers`."""

from __future__ import annotations

import json
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from real_training import Kind, real_job
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from toy_training import toy_job
from unet_training import FollowObjective, curve, unet_job

from fewstep.errors import FewstepError
from fewstep.train.in_process import train_in_process
from fewstep.train.job import TrainJob
from fewstep.train.parallel import Workers, gradient_sync

WORLD_SIZE = 2
STAGES: tuple[Kind, ...] = ("denoising", "guidance", "progressive")
DDP = {"micro_batch_size": 2}
FSDP = {"strategy": "fsdp", "shard_frozen": True, "gradient_checkpointing": True, "micro_batch_size": 2}


def run_workers(folder: Path) -> None:
    """Do everything below in two processes, and `UNEVEN` in three; `folder/alone` and `folder/fsdp after alone, uneven`
    hold a training that one process began and left, and `folder/teacher` and `folder/student` hold models."""
    mp.spawn(_work, (str(folder),), nprocs=WORLD_SIZE + 1)


#: Of four streams the first of three workers has two, and the others one each.
UNEVEN: dict[str, dict[str, Any]] = {
    "ddp, uneven": {},
    "ddp, idle passes": {"micro_batch_size": 1},
    "fsdp, idle passes": {"strategy": "fsdp", "shard_frozen": True, "micro_batch_size": 2},
    "fsdp after alone, uneven": {"strategy": "fsdp"},
}


def stage_job(kind: Kind, folder: Path) -> TrainJob:
    """Return a short training of a stage, whose model lies in `folder`."""
    return real_job(kind, folder / ("student" if kind == "progressive" else "teacher"), updates=10)


def begin_again(whole: Path, folder: Path) -> None:
    """Leave in `folder` what a training had left when it was half done."""
    shutil.copytree(whole / "checkpoints" / "update-00000002", folder / "checkpoints" / "update-00000002")


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")  # compiling blocks would take a minute; that they can be is what counts
    here = Path(folder)
    if rank < WORLD_SIZE:
        _work_as_two(rank, here)
    _meet(here, "three", rank, world_size=WORLD_SIZE + 1)
    found = {name: curve(unet_job(**settings), here / name) for name, settings in UNEVEN.items()}
    if rank == 0:
        (here / "found-uneven.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _meet(here: Path, name: str, rank: int, *, world_size: int) -> None:
    wait = timedelta(minutes=30)  # the third waits for all that two do
    dist.init_process_group("gloo", init_method=f"file://{here}/{name}", rank=rank, world_size=world_size, timeout=wait)


def _work_as_two(rank: int, here: Path) -> None:
    _meet(here, "two", rank, world_size=WORLD_SIZE)
    found = {
        "ddp": curve(unet_job(**DDP), here / "ddp"),
        "fsdp": _fsdp(here / "fsdp"),
        "fsdp after alone": curve(unet_job(**FSDP, compile=True, ema_device="cpu"), here / "alone"),
    }
    if rank == 0:
        begin_again(here / "fsdp", here / "ddp after fsdp")
    dist.barrier()
    found |= {
        "ddp after fsdp": curve(unet_job(**DDP), here / "ddp after fsdp"),
        "nan": _error(unet_job(nan_at=(3, 5))),
        "toy": _error(toy_job(updates=1, strategy="fsdp", gradient_checkpointing=True)),
        "passes": _passes(),
    }
    for kind in STAGES:
        found[kind] = curve(stage_job(kind, here), here / kind)
    (here / f"found-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _fsdp(folder: Path) -> dict[str, Any]:
    """Train in shards; return the curve, what share of the weights this worker held in the end, and of which kinds the
    parts are that it gathers one by one."""
    made: list[FollowObjective] = []

    def objective(device: torch.device) -> FollowObjective:
        made.append(FollowObjective(device))
        return made[-1]

    found = curve(unet_job(objective=objective, **FSDP), folder)
    return {
        "curve": found,
        "shares": [_share(made[0].network), _share(made[0].frozen[0])],
        "units": sorted(_kind(part) for part in made[0].network.modules() if isinstance(part, FSDPModule)),
    }


def _share(network: nn.Module) -> float:
    weights = list(network.parameters())
    assert all(isinstance(weight, DTensor) for weight in weights)
    own = sum(weight.to_local().numel() for weight in weights if isinstance(weight, DTensor))
    return own / sum(weight.numel() for weight in weights)


def _kind(part: nn.Module) -> str:
    return type(part).__name__.removeprefix("FSDP")


def _error(job: Any) -> str:
    try:
        train_in_process(job)
    except FewstepError as error:
        return str(error)
    return "no error"


def _passes() -> list[bool]:
    """Return whether the gradients of two workers agree after a pass without and one with their exchange, under DDP."""
    workers = Workers(torch.device("cpu"))
    model = workers.parallel(nn.Linear(2, 2), strategy="ddp")
    agree = []
    for on in (False, True):
        with gradient_sync(model, on=on):
            model(torch.full((1, 2), 1.0 + workers.rank)).sum().backward()
        gradients = workers.gather([p.grad.tolist() for p in model.parameters() if p.grad is not None])
        agree.append(gradients[0] == gradients[1])
    return agree

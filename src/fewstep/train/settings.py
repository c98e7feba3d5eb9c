"""What a recipe may say about one training and about the Ray cluster that it runs on."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

#: Settings that only say how a training is watched and saved.
ONLY_WATCHING = frozenset({"checkpoint_every", "num_checkpoints_to_keep", "keep_checkpoints_when_done", "log_every"})

#: Settings that only say how the same sums are carried out: they change no weight by more than rounding (without
#: dropout, whose draws follow the forward passes), so a training may go on with others, on the machines at hand.
ONLY_ROUNDING = frozenset(
    {
        "micro_batch_size",
        "gradient_checkpointing",
        "strategy",
        "shard_frozen",
        "channels_last",
        "compile",
        "ema_device",
    }
)

#: Later than the first checkpoints. Left out at their default, which is what those were trained with.
_ADDED = ("ema_every", "frozen_dtype")


class TrainSettings(BaseModel):
    """One training: how many updates of what size, the optimiser, and how often to look and to save."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    updates: int = Field(gt=0, description="optimiser updates in all")
    global_batch_size: int = Field(gt=0, description="samples per update, over all workers")
    learning_rate: float = Field(gt=0, description="peak learning rate of AdamW")
    warmup_updates: int = Field(default=0, ge=0, description="updates in which the rate rises linearly from 0")
    decay: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="how the rate falls after the warm-up; linear and cosine reach 0 at `updates`"
    )
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="AdamW's decay rates of the two moments")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled weight decay")
    grad_clip_norm: float = Field(default=1.0, gt=0, description="largest global gradient norm; longer ones are scaled")
    ema_decay: float | None = Field(
        default=None, gt=0, lt=1, description="decay of the averaged weights per update; null keeps no average"
    )
    ema_every: int = Field(
        default=1,
        gt=0,
        description="updates between two steps of the average; a step takes in the weights of that moment with the "
        "decays of all updates since the last one multiplied, as if they had stood still; updates after the last "
        "multiple are not taken in",
    )
    ema_device: Literal["network", "cpu"] = Field(
        default="network",
        description="where the average is kept; cpu frees 4 bytes a weight on the GPU: each step queues a copy of the "
        "weights into pinned memory behind the update, and a thread averages beside the next updates; a step waits for "
        "the one before it, so take ema_every=10 or so where that is slower than the updates",
    )
    hand_over: Literal["raw", "ema"] = Field(default="raw", description="which weights the training hands over")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="float32",
        description="autocast type of the network; weights, targets and losses stay float32; auto: bfloat16 where the "
        "device computes in it",
    )
    micro_batch_size: int | None = Field(
        default=None,
        gt=0,
        description="rows of one worker in one forward and backward pass, whose gradients are added up to the update; "
        "it must divide the global batch and, where their number is fixed, a worker's rows; null: all at once. With "
        "encode.buckets it must divide the rows of one size of picture, global_batch_size / stream.num_streams; null: "
        "those",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="compute activations again in the backward pass instead of keeping them: less memory, more time; "
        "for diffusers' networks",
    )
    strategy: Literal["ddp", "fsdp"] = Field(
        default="ddp",
        description="how several workers train: ddp, each keeps all; fsdp, each keeps a shard of weights, "
        "gradients, average and optimiser state (FSDP2), and weights are gathered block by block",
    )
    shard_frozen: bool = Field(
        default=False, description="with fsdp: share out the frozen networks (the teacher) too, gathered block by block"
    )
    frozen_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="type of the frozen networks' weights; bfloat16 halves their memory and needs a bfloat16 precision",
    )
    channels_last: bool = Field(
        default=False, description="keep the weights and activations of convolutions as NHWC; not with fsdp"
    )
    compile: bool = Field(
        default=False, description="torch.compile the networks, frozen ones too: whole, or with fsdp block by block"
    )
    checkpoint_every: int = Field(default=200, gt=0, description="updates between checkpoints")
    num_checkpoints_to_keep: int = Field(default=2, gt=0, description="checkpoints kept in the store")
    keep_checkpoints_when_done: bool = Field(
        default=False, description="keep them after the export is stored (optimiser and average: 4 times the weights)"
    )
    log_every: int = Field(default=10, gt=0, description="updates between readings of loss, speed and memory")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.warmup_updates > self.updates:
            raise ValueError(
                f"warmup_updates={self.warmup_updates} is more than updates={self.updates}: "
                f"the rate would never be reached; set it to at most {self.updates}"
            )
        if self.hand_over == "ema" and self.ema_decay is None:
            raise ValueError("hand_over=ema needs averaged weights; set ema_decay (for example 0.999) or hand_over=raw")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas} must both lie in [0, 1); the usual ones are [0.9, 0.999]")
        if self.ema_decay is None and (self.ema_every != 1 or self.ema_device != "network"):
            raise ValueError(
                f"ema_every={self.ema_every} and ema_device={self.ema_device} have no effect without averaged weights; "
                "set ema_decay (for example 0.999) or leave them out"
            )
        self._check_size()
        return self

    def _check_size(self) -> None:
        if self.micro_batch_size is not None and self.global_batch_size % self.micro_batch_size:
            raise ValueError(wrong_micro_batch(self.micro_batch_size, self.global_batch_size))
        if self.shard_frozen and self.strategy != "fsdp":
            raise ValueError(
                f"shard_frozen=true needs strategy=fsdp, and strategy is {self.strategy}; set strategy: fsdp, or "
                "shard_frozen: false"
            )
        if self.channels_last and self.strategy == "fsdp":
            raise ValueError(
                "channels_last=true cannot be kept with strategy=fsdp, which gathers weights from contiguous shards; "
                "set channels_last: false, or strategy: ddp"
            )
        if self.frozen_dtype == "bfloat16" and self.precision == "float32":
            raise ValueError(
                "frozen_dtype=bfloat16 needs autocast, and precision=float32 has none: the frozen networks' outputs "
                "would not fit the trained one; set precision: bfloat16, or frozen_dtype: float32"
            )

    def of_the_weights(self) -> dict[str, object]:
        """Return the settings that a weight depends on; the others may change between a checkpoint and its resuming."""
        unchanged = {name for name in _ADDED if getattr(self, name) == type(self).model_fields[name].default}
        return self.model_dump(mode="json", exclude={*ONLY_WATCHING, *ONLY_ROUNDING, *unchanged})


def wrong_micro_batch(micro_batch_size: int, rows: int) -> str:
    """Return the message for a micro-batch that does not divide the rows of an update, or of a worker's share."""
    possible = ", ".join(str(size) for size in range(1, rows + 1) if rows % size == 0)
    return (
        f"micro_batch_size={micro_batch_size} does not divide the {rows} rows that are to be shared out equally; "
        f"sizes that do: {possible}"
    )


def wrong_group(micro_batch_size: int, group: int, global_batch_size: int) -> str:
    """Return the message for a micro-batch that does not divide the rows of one shape in a batch."""
    possible = ", ".join(str(size) for size in range(1, group + 1) if group % size == 0)
    return (
        f"micro_batch_size={micro_batch_size} does not divide the {group} rows of one shape that each of the "
        f"{global_batch_size // group} streams gives to global_batch_size={global_batch_size} where latents are in "
        f"buckets: take {possible} or null, or another stream.num_streams"
    )


class ElasticWorkers(BaseModel):
    """As many workers as the cluster has room for, between two bounds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min: int = Field(gt=0, description="fewest workers; a training waits until there is room for them")
    max: int = Field(
        gt=0, description="most workers, asked for where nodes start on demand; at most stream.num_streams"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min={self.min} is above max={self.max}; swap them, or take a number instead of both")
        return self

    def __str__(self) -> str:
        return f"{self.min}…{self.max}"


def _kind_of_workers(value: object) -> str:
    if isinstance(value, (dict, ElasticWorkers)):
        return "bounds"
    return "auto" if isinstance(value, str) and not value.strip().isdigit() else "number"


class ClusterSettings(BaseModel):
    """The Ray cluster: where it is, and how many workers of what size a training takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_workers: Annotated[
        Annotated[Literal["auto"], Tag("auto")]
        | Annotated[int, Field(gt=0), Tag("number")]
        | Annotated[ElasticWorkers, Tag("bounds")],
        Discriminator(_kind_of_workers),  # so that an error is about what was meant
    ] = Field(
        default=1,
        description="training workers; each takes its share of the global batch; auto: one for each GPU that the "
        "cluster has now, or on CPUs one for each core, at least 16 samples each; {min, max}: as many as there is room "
        "for, more or fewer as nodes come and go, with the same global batch",
    )
    use_gpu: Literal["auto"] | bool = Field(
        default="auto",
        description="one GPU for each worker; auto: if the cluster has any now (say true or false where nodes start on "
        "demand, and with {min, max} workers)",
    )
    cpus_per_worker: int | None = Field(
        default=None,
        gt=0,
        description="CPU cores of a worker; null: the cluster's CPUs shared out; {min, max} workers need a number",
    )
    resize_every_s: float = Field(
        default=300.0,
        gt=0,
        description="with {min, max} workers: seconds between two looks whether more fit. A change of their number "
        "begins again from the last checkpoint (train.checkpoint_every), so let them not be too frequent",
    )
    collective_timeout_s: int = Field(
        default=1800,
        gt=0,
        description="seconds that workers wait for one another before the run counts as failed; some wait while others "
        "fetch the teacher or a checkpoint, or while the store takes one in",
    )
    max_failures: int = Field(
        default=3,
        ge=0,
        description="worker deaths that one run recovers from by itself; those by a node of which Ray was told that it "
        "is taken away (preemption) do not count",
    )
    address: str | None = Field(
        default=None, description="address of a running Ray; null: $RAY_ADDRESS, or else a Ray started on this machine"
    )
    num_cpus: int | None = Field(
        default=None, gt=0, description="CPUs of the Ray started on this machine; null: those that the machine has"
    )
    object_store_bytes: int = Field(
        default=256 * 2**20, ge=80 * 2**20, description="shared memory of the Ray started on this machine"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not isinstance(self.num_workers, ElasticWorkers):
            return self
        if self.use_gpu == "auto":
            raise ValueError(
                f"num_workers={self.num_workers} with use_gpu=auto: a cluster that grows may have no GPU yet, and the "
                "training would begin without; say use_gpu: true, or false"
            )
        if self.cpus_per_worker is None:
            raise ValueError(
                f"num_workers={self.num_workers} without cpus_per_worker: how many cores each gets cannot be told from "
                "a cluster that grows and shrinks; set cpus_per_worker (cores of a node / workers on it, less one for "
                "Ray)"
            )
        return self

    @property
    def most_workers(self) -> int | None:
        """The most workers that a training may have; None: what the cluster has decides."""
        if self.num_workers == "auto":
            return None
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers.max

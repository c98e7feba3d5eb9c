"""What a recipe may say about one training and about the Ray cluster that it runs on."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


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
    hand_over: Literal["raw", "ema"] = Field(default="raw", description="which weights the training hands over")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="float32",
        description="autocast type of the network; weights, targets and losses stay float32; auto: bfloat16 where the "
        "device computes in it",
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
        return self

    def of_the_weights(self) -> dict[str, object]:
        """Return the settings that a weight depends on; the others may change between a checkpoint and its resuming."""
        only_watching = {"checkpoint_every", "num_checkpoints_to_keep", "keep_checkpoints_when_done", "log_every"}
        return self.model_dump(mode="json", exclude=only_watching)


class ClusterSettings(BaseModel):
    """The Ray cluster: where it is, and how many workers of what size a training takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_workers: Literal["auto"] | Annotated[int, Field(gt=0)] = Field(
        default=1,
        description="training workers; each takes its share of the global batch; auto: one for each GPU that the "
        "cluster has now, or on CPUs one for each core, at least 16 samples each",
    )
    use_gpu: Literal["auto"] | bool = Field(
        default="auto",
        description="one GPU for each worker; auto: if the cluster has any now (say true where nodes start on demand)",
    )
    cpus_per_worker: int | None = Field(
        default=None, gt=0, description="CPU cores of a worker; null: the cluster's CPUs shared among the workers"
    )
    max_failures: int = Field(default=3, ge=0, description="worker deaths that one run recovers from by itself")
    address: str | None = Field(
        default=None, description="address of a running Ray; null: $RAY_ADDRESS, or else a Ray started on this machine"
    )
    num_cpus: int | None = Field(
        default=None, gt=0, description="CPUs of the Ray started on this machine; null: those that the machine has"
    )
    object_store_bytes: int = Field(
        default=256 * 2**20, ge=80 * 2**20, description="shared memory of the Ray started on this machine"
    )

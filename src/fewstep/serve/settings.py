"""What can be set about the HTTP service."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

#: OpenAI's limit on `n`, the pictures of one request.
MAX_IMAGES_PER_REQUEST = 10


class AutoscalingSettings(BaseModel):
    """How many copies of the engine run, by how much is asked of them (Ray Serve's own autoscaling)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_replicas: int = Field(default=1, ge=1, description="Copies that always run.")
    max_replicas: int = Field(ge=1, description="Most copies.")
    target_ongoing_requests: float | None = Field(
        default=None,
        gt=0,
        description="Pictures that each copy should have, waiting ones too; more start another. Unset: max_batch_size.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas={self.max_replicas} is below min_replicas={self.min_replicas}: raise it, or lower that"
            )
        return self


class ServeSettings(BaseModel):
    """The service: which students, where it listens, how it batches, what each replica takes.

    The same fields are the arguments of `fewstep.serve.app:build` in a RayService's serveConfigV2.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: tuple[str, ...] = Field(
        default=("models:/fewstep@champion",),
        min_length=1,
        description="Model URIs (models:/NAME@ALIAS, a folder, s3://…, a hub id, asset:NAME). The first is the default "
        "for requests that name neither a model nor a step count.",
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on. Keys are not checked yet: keep loopback.")
    port: int = Field(default=8000, ge=0, le=65535, description="TCP port; 0 takes a free one.")
    route_prefix: str = Field(default="/", pattern=r"^/", description="Path under which the API is mounted.")
    max_batch_size: int = Field(default=8, ge=1, description="Most pictures that run as one batch on a replica.")
    batch_wait_timeout_s: float = Field(
        default=0.01, ge=0, description="How long a picture waits for others to fill its batch, in seconds."
    )
    pad_batches: bool = Field(
        default=False,
        description="Fill every batch to max_batch_size, so that not even the last bit of a picture depends on what is "
        "drawn beside it; every request then costs a full batch.",
    )
    max_queued_images: int = Field(
        default=64,
        ge=MAX_IMAGES_PER_REQUEST,
        description="Pictures that may wait or run at once per HTTP replica; a request beyond that is answered 429.",
    )
    request_timeout_s: float = Field(
        default=120.0, gt=0, description="A request that takes longer, waiting included, is answered 504."
    )
    num_replicas: int = Field(default=1, ge=1, description="Copies of the engine, each with the models in memory.")
    autoscaling: AutoscalingSettings | None = Field(
        default=None, description="In place of num_replicas: as many copies of the engine as the load needs."
    )
    num_cpus: float = Field(default=1.0, ge=0, description="CPUs that Ray reserves for each engine replica.")
    num_gpus: float = Field(default=0.0, ge=0, description="GPUs that Ray reserves for each engine replica.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="Precision of the networks; auto is bfloat16 on a GPU and float32 on a CPU."
    )
    num_threads: int | None = Field(
        default=None, ge=1, description="CPU threads of torch in each engine replica; unset leaves torch's own choice."
    )
    load_attempts: int = Field(
        default=1,
        ge=1,
        description="How often a replica tries to load its models before the deployment is given up. "
        "More than 1 helps where the store may be away for a moment.",
    )
    reload_every_s: float = Field(
        default=10.0,
        ge=0,
        description="How often each engine replica looks where the aliases of models:/NAME@ALIAS point, in seconds. A "
        "version that an alias has moved to is loaded beside the running one and takes over between two batches. 0: "
        "never, the versions found at the start stay.",
    )
    wait_for_models: bool = Field(
        default=False,
        description="Start though models:/NAME@ALIAS names no version yet, or the registry does not answer yet: "
        "requests are answered 503 until the first version is promoted. Otherwise that is an error at the start.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_queued_images < self.max_batch_size:
            raise ValueError(
                f"max_queued_images={self.max_queued_images} is below max_batch_size={self.max_batch_size}: "
                "batches could never fill; raise max_queued_images"
            )
        if len(set(self.models)) != len(self.models):
            raise ValueError(f"models={list(self.models)} names a model twice: name each once")
        if self.autoscaling is not None and "num_replicas" in self.model_fields_set:
            raise ValueError(
                f"num_replicas={self.num_replicas} and autoscaling are both set: leave num_replicas out, or autoscaling"
            )
        if self.wait_for_models and self.reload_every_s == 0:
            raise ValueError(
                "wait_for_models needs reload_every_s above 0: the registry is where the first version is noticed"
            )
        return self

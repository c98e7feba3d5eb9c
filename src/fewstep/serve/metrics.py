"""The service's figures for Prometheus, on Ray's metrics port (docs/metrics.md), beside those of Serve itself."""

from __future__ import annotations

from ray.serve.metrics import Counter, Gauge, Histogram

from fewstep.serve.catalog import StudentCard
from fewstep.serve.watch import EngineWatch, RequestWatch

_SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0]
_IMAGES = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]


class EngineMetrics(EngineWatch):
    """An engine replica's figures. Only for use within a replica: Serve adds its name to each."""

    def __init__(self) -> None:
        self._draw_seconds = Histogram(
            "fewstep_serve_draw_seconds",
            description="Seconds that one batch of one model took, from prompts to pixels.",
            boundaries=_SECONDS,
            tag_keys=("model",),
        )
        self._batch_size = Histogram(
            "fewstep_serve_batch_size",
            description="Pictures that went through a model's network as one batch.",
            boundaries=_IMAGES,
            tag_keys=("model",),
        )
        self._model_version = Gauge(
            "fewstep_serve_model_version",
            description="Version in the registry that is served; 0 while there is none.",
            tag_keys=("model", "uri"),  # type: ignore[arg-type]  # Ray's annotation allows one only
        )
        self._reloads = Counter(
            "fewstep_serve_reloads",
            description="Versions that took over after an alias had moved.",
            tag_keys=("model",),
        )
        self._reload_failures = Counter(
            "fewstep_serve_reload_failures",
            description="Attempts at a version named by an alias that could not be loaded or failed its smoke picture.",
            tag_keys=("model",),
        )

    def drew(self, card: StudentCard, *, batch_size: int, seconds: float) -> None:
        self._draw_seconds.observe(seconds, tags={"model": card.id})
        self._batch_size.observe(batch_size, tags={"model": card.id})

    def serves(self, uri: str, *, model: str, version: int) -> None:
        self._model_version.set(version, tags={"model": model, "uri": uri})

    def reloaded(self, model: str) -> None:
        self._reloads.inc(tags={"model": model})

    def refused(self, model: str) -> None:
        self._reload_failures.inc(tags={"model": model})


class RequestMetrics(RequestWatch):
    """An HTTP replica's figures. Only for use within a replica: Serve adds its name to each."""

    def __init__(self) -> None:
        self._request_seconds = Histogram(
            "fewstep_serve_request_seconds",
            description="Seconds from a request for pictures to its answer, by model and HTTP status.",
            boundaries=_SECONDS,
            tag_keys=("model", "code"),  # type: ignore[arg-type]
        )
        self._queued_images = Gauge(
            "fewstep_serve_queued_images", description="Pictures that wait or run; max_queued_images is the limit."
        )

    def answered(self, *, model: str, code: str, seconds: float) -> None:
        self._request_seconds.observe(seconds, tags={"model": model, "code": code})

    def queued(self, images: int) -> None:
        self._queued_images.set(images)

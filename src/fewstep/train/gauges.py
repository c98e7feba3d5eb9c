"""The figures of a training for Prometheus: gauges that Ray's metrics agent of the node shows (docs/metrics.md)."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from ray.util.metrics import Gauge

logger = logging.getLogger(__name__)

#: Figure of the loop -> (gauge, what it is). Ray puts `ray_` before the name.
_OF_FIGURES = {
    "loss": ("fewstep_train_loss", "Loss, the mean since the last reading."),
    "images_per_second": ("fewstep_train_images_per_second", "Samples a second over all workers since the last one."),
    "data_wait_share": ("fewstep_train_data_wait_share", "Share of the time in which the first worker had no batch."),
    "workers": ("fewstep_train_workers", "Workers that the training has now."),
}
_UPDATE = ("fewstep_train_update", "Updates done.")
_MFU = ("fewstep_train_mfu", "FLOPs of the training, as counted for its networks, over the GPUs' dense peak.")


class TrainingGauges:
    """Sets the gauges at each reading. Nothing of it ends a training: an error is logged, once.

    Args:
        tags: which training it is: recipe, stage and training.
        flops_of_peak: FLOPs of one sample over FLOP/s at one GPU's peak, in seconds; None: not known, and no MFU.
    """

    def __init__(self, tags: Mapping[str, str], *, flops_of_peak: float | None) -> None:
        self._tags, self._flops_of_peak = dict(tags), flops_of_peak
        self._gauges: dict[str, Gauge] = {}
        self._failed = False

    def show(self, figures: Mapping[str, float], *, updates_done: int) -> None:
        """Show a reading: an assignment for each gauge; Ray exports them from a thread of its own."""
        if self._failed:
            return
        try:
            self._set(_UPDATE, float(updates_done))
            for figure, gauge in _OF_FIGURES.items():
                if figure in figures:
                    self._set(gauge, figures[figure])
            if self._flops_of_peak is not None:
                each_gpu = figures["images_per_second"] / figures["workers"]
                self._set(_MFU, each_gpu * self._flops_of_peak)
        except Exception as error:  # watching must not end a training
            self._failed = True
            logger.warning("figures for Prometheus are no longer set: %s: %s", type(error).__name__, error)

    def _set(self, gauge: tuple[str, str], value: float) -> None:
        name, description = gauge
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, description=description, tag_keys=tuple(self._tags))
            self._gauges[name].set_default_tags(self._tags)
        self._gauges[name].set(value)

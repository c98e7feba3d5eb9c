"""LoRA students for those who read models with MLflow: its own `diffusers` flavour beside our files."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fewstep.errors import TrackingError


def add_flavor(folder: Path, *, adapters: Path, base: str, num_inference_steps: int, guidance_scale: float) -> None:
    """Add to a student's folder what makes it a model of MLflow's flavour `diffusers` too: MLmodel, requirements, and
    the adapters once more.

    Once the folder is registered, `mlflow.diffusers.load_model("models:/NAME/1").load_pipeline(base_model=…)` gives a
    stock pipeline over the base; `base_model` must be said unless the base is on the hub or a path. MLflow loads no
    scheduler with adapters: give the pipeline the student's own, from `scheduler/` in the same version, unless the
    base is sampled by trailing DDIM too. No network is needed.

    Args:
        folder: the student's, before it is registered.
        adapters: a file of safetensors, as diffusers' `load_lora_weights` reads it.
        base: URI of the model that they belong on.
        num_inference_steps: N, the default in the model's signature.
        guidance_scale: what a stock pipeline must be given, 1 for a student of one weight; the default likewise.

    Raises:
        TrackingError: the package peft, which MLflow asks for, is not installed.
    """
    import mlflow.diffusers
    from mlflow.exceptions import MlflowException
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    signature = ModelSignature(
        inputs=Schema([ColSpec(type=DataType.string, name="prompt")]),
        outputs=Schema([ColSpec(type=DataType.binary, name="image")]),
        # The defaults of MLflow, 30 steps of scale 7.5 at 512 pixels, fit no student.
        params=ParamSchema(
            [
                ParamSpec("num_inference_steps", DataType.integer, num_inference_steps),
                ParamSpec("guidance_scale", DataType.double, float(guidance_scale)),
            ]
        ),
    )
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        flavor = Path(scratch, "flavor")
        try:
            mlflow.diffusers.save_model(
                str(adapters),
                str(flavor),
                base_model=base,
                signature=signature,
                metadata={"scheduler": "scheduler/scheduler_config.json"},
            )
        except MlflowException as error:
            raise TrackingError(
                f"the adapters in {adapters} cannot be described for MLflow ({error}): pip install 'fewstep[lora]' "
                "where the register stage runs"
            ) from error
        shutil.copytree(flavor, folder, dirs_exist_ok=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out MLflow's warnings that a base off the hub has no commit, and that torch's +cpu is not in the index."""
    loggers = [logging.getLogger(name) for name in ("mlflow.diffusers", "mlflow.utils.requirements_utils")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

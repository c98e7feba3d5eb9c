"""A version of adapters in the registry: our files and MLflow's flavour in one place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fewstep.tracking.adapters import add_flavor
from fewstep.tracking.registry import Registry
from fewstep.tracking.tracker import Tracker

pytest.importorskip("peft")


def test_a_registered_student_of_adapters_is_a_model_of_mlflows_flavour(tracker: Tracker, tmp_path: Path) -> None:
    import mlflow

    student = tmp_path / "student"
    student.mkdir()
    (student / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    file = student / "pytorch_lora_weights.safetensors"
    save_file({"unet.mid_block.to_q.lora_A.weight": torch.ones(2, 4)}, file)
    add_flavor(student, adapters=file, base="asset:emoji-teacher", num_inference_steps=4, guidance_scale=1.0)
    tags = {"num_inference_steps": "4", "teacher": "t", "data_digest": "d", "fingerprint": "f"}
    registry = Registry(tracker)
    with tracker.run("register", key="register") as run:
        registry.log_student(run, student, name="lora", params={}, tags=tags, metrics={})
    folder = registry.download_model("models:/lora/1")
    assert (folder / file.name).read_bytes() == file.read_bytes()
    model = mlflow.diffusers.load_model(str(folder))
    assert (folder / "model_index.json").is_file()
    assert (model.base_model, model.adapter_type) == ("asset:emoji-teacher", "lora")
    assert (Path(model.adapter_path) / file.name).read_bytes() == file.read_bytes()

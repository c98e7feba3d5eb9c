"""Copying a model folder out, whole or without the parts that another one has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fewstep.errors import ModelError

#: What a student shares with its teacher.
_SHARED = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "model_index.json")


def export_model(source: Path, folder: Path, *, half: bool = False, base: str | None = None) -> None:
    """Copy a diffusers folder.

    Args:
        source: the model's folder.
        folder: new or empty.
        half: store the weights as float16; loading brings them back to the precision that is asked for.
        base: name of a packaged model whose VAE, text encoders and tokenizers this one shares; they are left out, and
            `compose.json` says where they are.

    Raises:
        ModelError: the folder holds something already.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ModelError(f"{folder} is not empty: name a new folder, so that nothing in it is mixed up or lost")
    left_out = shutil.ignore_patterns(*_SHARED) if base is not None else None
    shutil.copytree(source, folder, dirs_exist_ok=True, ignore=left_out)
    if base is not None:
        (folder / "compose.json").write_text(json.dumps({"base": base}) + "\n", encoding="utf-8")
    if half:
        for file in folder.rglob("*.safetensors"):
            _halve(file)


def _halve(file: Path) -> None:
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata=metadata)
    file.chmod(0o644)  # safetensors makes it private

"""`bench train --variants`: the same training in several ways, in turns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from tiny_bench import CPU, settings, tiny_workload

from fewstep.bench import variants as module
from fewstep.bench.page import BEGIN, END, read_result, write_benchmarks_table
from fewstep.bench.train import LoopRun, run_loop
from fewstep.bench.variants import compare_variants
from fewstep.train.job import TrainJob


def test_variants_take_turns_and_are_held_against_eager(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs: list[tuple[bool, bool]] = []
    networks: set[int] = set()

    def noted(job: TrainJob, device: torch.device) -> LoopRun:
        runs.append((job.settings.channels_last, job.settings.gradient_checkpointing))
        result = run_loop(job, device)
        objective = job.objective(device)
        (teacher,) = objective.frozen
        networks.update((id(teacher), id(objective.network)))
        for network in (teacher, objective.network):
            in_place = network.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
            assert in_place == job.settings.channels_last
        assert objective.network.is_gradient_checkpointing == job.settings.gradient_checkpointing
        return result

    monkeypatch.setattr(module, "run_loop", noted)
    # The recipe's own switches are those of no variant.
    result = compare_variants(
        tiny_workload(gradient_checkpointing=True, strategy="fsdp"),
        settings(variants=("checkpoint", "channels_last+checkpoint")),
        device=CPU,
        command="fewstep bench train --variants checkpoint,channels_last+checkpoint",
    )
    assert runs == [(False, False), (False, True), (True, True)] * 2
    assert len(networks) == 2 * 3  # what is switched on for one is not for the others
    assert [variant.name for variant in result.variants] == ["eager", "checkpoint", "channels_last+checkpoint"]
    eager = result.variants[0]
    assert eager.against_eager_by_round == [1.0, 1.0]
    for variant in result.variants:
        ratios = [
            ours / theirs
            for ours, theirs in zip(variant.images_per_second_by_round, eager.images_per_second_by_round, strict=True)
        ]
        assert variant.against_eager_by_round == pytest.approx(ratios)
        assert min(ratios) <= variant.against_eager <= max(ratios)
        assert variant.tflops == pytest.approx(variant.images_per_second * result.gflop_per_image / 1e3)
        assert variant.peak_memory_bytes is None  # on a CPU it cannot be told apart
        assert f"{variant.images_per_second:.4g} images/s" in result.table()

    file, page = tmp_path / "variants.json", tmp_path / "page.md"
    file.write_text(json.dumps(result.to_json()))
    assert read_result(file) == result
    page.write_text(f"{BEGIN}\n{END}\n")
    write_benchmarks_table([result], page)
    text = page.read_text()
    assert "| tiny, stage guidance: eager | 4 | float32 |" in text
    assert "× (" in text
    assert "| tiny, stage guidance: channels_last+checkpoint | 4 |" in text
    assert result.environment.command in text


def test_variants_must_be_known_and_need_no_other_switch() -> None:
    assert settings().variants == ()
    assert settings(variants=("compile", "eager", "compile")).variants == ("eager", "compile")
    with pytest.raises(
        ValidationError, match="fast is no variant; there are eager, channels_last, compile, checkpoint"
    ):
        settings(variants=("compile+fast",))
    with pytest.raises(ValidationError, match="channels_last is a variant of its own: name it in variants"):
        settings(variants=("compile",), tuning={"channels_last": True})

"""`fewstep inspect`: what it says of a data set is what is in it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from fewstep.cli import main
from fewstep.data.shards import write_shards
from fewstep.inspection import inspect_data
from fewstep.storage import Storage, StorageSettings

LOCAL = Storage(StorageSettings())


def _samples(count: int) -> Iterator[dict[str, Any]]:
    for number in range(count):
        size = (64, 32) if number % 4 == 0 else (32, 32)
        file = io.BytesIO()
        kind = "jpg" if number % 2 else "png"
        Image.new("RGB", size, (number, 90, 30)).save(file, "JPEG" if kind == "jpg" else "PNG")
        record = {"width": size[0], "LANGUAGE": "en" if number % 3 else "de", "url": f"https://a/{number}"}
        yield {
            "__key__": f"{number:05d}", kind: file.getvalue(), "txt": f"picture of {number // 2}".encode(),
            "json": json.dumps(record | ({"score": number} if number < 10 else {})).encode(),
        }  # fmt: skip


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """40 samples in 4 shards, of which one has no caption, one is broken, and the last shard is cut."""
    samples = list(_samples(40))
    del samples[3]["txt"]
    samples[5]["jpg"] = b"broken"
    write_shards(samples, str(tmp_path / "shards"), samples_per_shard=10, storage=LOCAL)
    last = tmp_path / "shards" / "00003.tar"
    last.write_bytes(last.read_bytes()[:8192])
    return tmp_path / "shards"


def test_everything_that_is_there_is_said(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(main, ["inspect", str(shards), "--out", str(out), "--show", "12"])
    assert result.exit_code == 0, result.output
    facts = json.loads((out / "inspect.json").read_text())
    cut = facts["skipped"]["shard cut short"]
    assert facts["skipped"] == {"no caption": 1, "broken picture": 1, "shard cut short": cut}
    assert facts["usable"] == 38 - cut
    assert (facts["shards"], facts["samples"], facts["seen"]) == (4, 40, 40)
    assert facts["kinds"]["png RGB"] + facts["kinds"]["jpg RGB"] == facts["usable"]
    assert set(facts["worst_shards"]) == {f"{shards}/00000.tar", f"{shards}/00003.tar"}
    assert facts["aspects"]["2"] + facts["aspects"]["1"] == facts["usable"]
    assert facts["width"]["0"] == 32
    assert facts["width"]["100"] == 64
    assert facts["caption_words"]["50"] == 3
    assert 10 <= facts["captions_seen_before"] <= 19
    assert facts["keys_seen_before"] == 0
    assert facts["fields"]["LANGUAGE"]["share"] == 1
    assert set(facts["fields"]["LANGUAGE"]["values"]) == {"en", "de"}
    assert len(facts["fields"]["url"]["values"]) == 1
    assert facts["fields"]["score"]["share"] == pytest.approx(8 / facts["usable"])
    assert facts["fields"]["score"]["percentiles"]["100"] == 9
    sheet = Image.open(out / "contact.png")
    assert sheet.width == 8 * 140 + 12
    assert sheet.height > 2 * 128
    page = (out / "inspect.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "LANGUAGE" in page
    assert "http://" not in page
    assert "looked at 40 samples in 4 shards" in result.output
    assert "1 × broken picture, 1 × no caption" in result.output


def test_shards_in_s3_are_told_as_those_on_disk(
    shards: Path, storage: Storage, bucket_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.upload_folder(shards, bucket_uri)
    monkeypatch.setattr("fewstep.inspection.open_storage", lambda settings: nullcontext(storage))
    found = []
    for name, uri in (("disk", str(shards)), ("s3", bucket_uri)):
        inspect_data(uri, tmp_path / name)
        facts = json.loads((tmp_path / name / "inspect.json").read_text())
        worst = {shard.removeprefix(f"{uri}/"): count for shard, count in facts.pop("worst_shards").items()}
        found.append((worst, {key: value for key, value in facts.items() if key != "uri"}))
    assert found[1] == found[0]
    pictures = [(tmp_path / name / "contact.png").read_bytes() for name in ("disk", "s3")]
    assert pictures[1] == pictures[0]


def test_filters_of_the_recipe_are_applied_and_counted(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "{name: look, stages: [encode], teacher: t, data: {train: a, evaluate: b,"
        ' filters: [{field: width, min: 60}], captions: [{template: "in {LANGUAGE}"}]}}'
    )
    out = tmp_path / "out"
    arguments = ["inspect", str(shards), "--out", str(out), "--recipe", str(tmp_path / "recipe.yaml")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    facts = json.loads((out / "inspect.json").read_text())
    assert facts["filtered"]["width below 60"] > 20
    assert facts["width"]["0"] == 64
    assert facts["caption_words"]["100"] == 2
    assert "filtered: " in result.output


def test_only_as_many_as_asked_for_are_looked_at(shards: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(shards), "--out", str(tmp_path), "--max-samples", "11"])
    assert json.loads((tmp_path / "inspect.json").read_text())["inspected_shards"] == 2
    assert result.exit_code == 0


def test_shards_of_something_else_are_said(tmp_path: Path) -> None:
    write_shards([{"__key__": "a", "npy": b"1"}], str(tmp_path), samples_per_shard=1, storage=LOCAL)
    result = CliRunner().invoke(main, ["inspect", str(tmp_path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "Of 1 samples in 1 shards not one can be used: 1 × no caption" in result.output
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "nowhere")])
    assert result.exit_code == 2
    assert "There are no shards (*.tar)" in result.output

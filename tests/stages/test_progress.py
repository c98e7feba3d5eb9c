"""What a person sees of a stage: a bar in a terminal, lines in a log; what was done before is not in the rate."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import sys
import termios
import time
from typing import Any

import pytest
from PIL import Image

from fewstep.data.shards import write_shards
from fewstep.stages import progress as stages_progress
from fewstep.stages.encode_shards import Encoding, encode_shards
from fewstep.stages.progress import Progress
from fewstep.storage import Storage, join
from tiny import tiny_teacher


@pytest.fixture
def a_line_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages_progress, "_LINE_EVERY_S", 0.0)


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def figures(line: str) -> tuple[float, float]:
    """Return rate and seconds left of a line."""
    found = re.fullmatch(r".* · ([\d.]+) images/s · (\d+) s left", line)
    assert found, line
    return float(found[1]), float(found[2])


@pytest.mark.usefixtures("a_line_for_each")
def test_a_log_gets_position_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("encode", 50, "images") as progress:
        time.sleep(0.1)
        progress.advance(5)
    (line,) = lines(capsys)
    assert line.startswith("encode  5/50 images · ")
    rate, left_s = figures(line)
    assert 0 < rate <= 50
    assert left_s == pytest.approx(45 / rate, rel=0.1, abs=0.6)


def test_a_log_gets_a_line_only_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("encode", 50, "images") as progress:
        for _ in range(50):
            progress.advance()
    assert lines(capsys) == []


@pytest.mark.usefixtures("a_line_for_each")
def test_nobody_knows_how_many_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("read", None, "images") as progress:
        progress.advance(5)
    (line,) = lines(capsys)
    assert re.fullmatch(r"read  5 images · [\d.]+ images/s", line)


@pytest.mark.usefixtures("a_line_for_each")
def test_what_an_earlier_run_has_done_is_not_in_the_rate(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("encode", 1000, "images", done=900) as progress:
        time.sleep(0.1)
        progress.advance(10)
    (line,) = lines(capsys)
    assert line.startswith("encode  910/1000 images · ")
    rate, left_s = figures(line)
    assert 0 < rate <= 100
    assert left_s >= 1  # 90 images are left


def test_a_terminal_gets_a_bar_with_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (24, 120))
    with os.fdopen(child, "w") as out:
        monkeypatch.setattr(sys, "stderr", out)
        with Progress("encode", 1000, "images", done=900) as progress:
            time.sleep(0.2)
            progress.advance(2)
        text = ""
        while select.select([parent], [], [], 0.1)[0]:
            text += os.read(parent, 4096).decode(errors="replace")
    os.close(parent)
    assert re.search(r"encode .* 900/1000 images · 00:00<\?", text)
    found = re.search(r"902/1000 images · \d\d:\d\d<(\d\d):(\d\d) · +([\d.]+) images/s", text)
    assert found, text
    assert 0 < float(found[3]) <= 10
    assert int(found[1]) * 60 + int(found[2]) >= 9  # 98 images are left


@pytest.mark.usefixtures("a_line_for_each")
def test_shards_that_were_encoded_before_count_from_the_start(
    storage: Storage, bucket_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def sample(number: int) -> dict[str, Any]:
        file = io.BytesIO()
        Image.new("RGB", (16, 16), (number * 20, 90, 30)).save(file, format="PNG")
        return {"__key__": f"{number:04d}", "png": file.getvalue(), "txt": f"picture {number}".encode()}

    samples = [sample(number) for number in range(8)]
    samples[6]["png"] = b"broken"
    source, target = join(bucket_uri, "pictures"), join(bucket_uri, "latents")
    write_shards(samples, source, samples_per_shard=4, storage=storage)
    settings: dict[str, Any] = {"encoding": Encoding(batch_size=2), "max_bad_share": 0.5, "label": "encode"}
    encode_shards(source, target, parts=tiny_teacher(), storage=storage, **settings)
    storage.delete(join(target, "records", "00001.json"))  # as if the run had been killed there
    capsys.readouterr()
    encode_shards(source, target, parts=tiny_teacher(), storage=storage, **settings)
    assert [line.split(" · ")[0] for line in lines(capsys)] == [
        "encode  6/8 images",
        "encode  7/8 images",
        "encode  8/8 images",  # with the broken one
    ]

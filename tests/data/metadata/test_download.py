"""Downloading: settings, addresses, and an img2dataset that is missing or does not do its work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError

from fewstep.data.metadata.download import DownloadSettings, check_columns, download, requested_address
from fewstep.data.metadata.img2dataset import VARIABLE, find_command
from fewstep.errors import DataError

ROWS = pa.table({"key": ["00"], "url": ["http://127.0.0.1:9/picture.jpg"], "caption": ["a picture"]})

Fake = Callable[[str], DownloadSettings]


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    """Settings with a Python program of the given body in place of img2dataset; it is given up after a second."""

    def make(body: str) -> DownloadSettings:
        path = tmp_path / "img2dataset-fake"
        path.write_text(f"#!{sys.executable}\n{body}\n")
        path.chmod(0o755)
        return DownloadSettings(
            command=str(path), threads=100, timeout_s=0.2, answer_timeout_s=0.2, retries=0, stall_timeout_s=1.0
        )

    return make


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, made the current one, from which no img2dataset is to be found."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    return tmp_path


def executable(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def gone(pid: int, *, within_s: float) -> bool:
    """Whether the process ends; one that nobody waited for yet (Z) has ended."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def wait_for(path: Path, *, within_s: float = 20.0) -> str:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if path.exists() and path.read_text().endswith("\n"):
            return path.read_text()
        time.sleep(0.05)
    raise AssertionError(f"{path.name} did not come")


# A program with a child, as img2dataset has, that says which processes they are and then does nothing.
HANGS = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open("pids", "w") as file:
    file.write(f"{os.getpid()} {child.pid}\\n")
print("going to sleep", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("http://a.example/x.jpg?w=1&h=%20", "http://a.example/x.jpg?w=1&h=%20"),
        ("  HTTPS://a.example/x.jpg ", "HTTPS://a.example/x.jpg"),
        ("https://a.example/größe ä%20.png?q=ü&r=a/b", "https://a.example/gr%C3%B6%C3%9Fe%20%C3%A4%20.png?q=%C3%BC&r=a/b"),
        ("https://bücher.example:8080/x", "https://xn--bcher-kva.example:8080/x"),
        ("file:///etc/passwd", None),
        ("ftp://a.example/x.jpg", None),
        ("data:image/png;base64,AA==", None),
        ("http:///x.jpg", None),
        ("http://a.example:port/x.jpg", None),
        ("http://[::1/x.jpg", None),
        ("a.example/x.jpg", None),
        ("", None),
        (None, None),
    ],
)  # fmt: skip
def test_only_addresses_of_the_web_are_asked_for_and_in_ascii(url: str | None, asked: str | None) -> None:
    assert requested_address(url) == asked


def test_rows_without_an_address_of_the_web_need_no_img2dataset_to_fail(fake: Fake, tmp_path: Path) -> None:
    rows = pa.table({"key": ["00", "01"], "url": ["file:///etc/passwd", None], "caption": ["a", "b"]})
    done = download(rows, tmp_path / "work", settings=fake("raise SystemExit(1)"))
    assert (done.attempted, done.succeeded, done.failures) == (2, 0, {"bad address": 2})
    assert list(done.samples()) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"threads": 8, "stall_timeout_s": 600}, "writes nothing for 2080 s"),
        ({"resize_mode": "stretch"}, "resize_mode"),
        ({"user_agent_token": "two words"}, "user_agent_token"),
        ({"encode_quality": 0}, "encode_quality"),
        ({"max_aspect_ratio": 0.5}, "max_aspect_ratio"),
        ({"thread_count": 8}, "thread_count"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        DownloadSettings(**changes)


def test_every_setting_is_described() -> None:
    assert [name for name, info in DownloadSettings.model_fields.items() if not info.description] == []


@pytest.mark.parametrize(
    ("names", "says"),
    [(["key", "url"], "lack caption"), (["key", "url", "caption", "width"], "such as claimed_width")],
)
def test_columns_that_do_not_fit_are_refused(names: list[str], says: str) -> None:
    with pytest.raises(DataError, match=says):
        check_columns(names)


def test_a_missing_executable_is_an_error_with_its_mending(nowhere: Path) -> None:
    with pytest.raises(DataError, match=rf"make img2dataset.*download\.command or \${VARIABLE}"):
        download(ROWS, nowhere / "work", settings=DownloadSettings())


def test_the_executable_is_looked_for_in_setting_variable_folder_and_path(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_path = executable(nowhere / "img2dataset")
    assert find_command(None) == on_path
    beside = executable(nowhere / ".venv-img2dataset/bin/img2dataset")
    assert find_command(None) == beside
    in_variable = executable(nowhere / "elsewhere/img2dataset")
    monkeypatch.setenv(VARIABLE, str(in_variable))
    assert find_command(None) == in_variable
    assert find_command("img2dataset") == on_path


@pytest.mark.parametrize("by", ["setting", "variable"])
def test_a_wrong_path_is_an_error_that_says_where_it_was_given(
    by: str, nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "/no/such/program")
    where = rf"\${VARIABLE}" if by == "variable" else r"download\.command"
    with pytest.raises(DataError, match=f"{where} is /no/such/program"):
        find_command("/no/such/program" if by == "setting" else None)


def test_an_img2dataset_that_dies_is_an_error_with_code_and_last_words(fake: Fake, tmp_path: Path) -> None:
    body = "import sys\nfor n in range(99): print('line', n)\nprint('ModuleNotFoundError: cv2')\nsys.exit(7)"
    with pytest.raises(
        DataError, match=r"(?s)exit code 7.*make img2dataset.*line 98\nModuleNotFoundError: cv2"
    ) as error:
        download(ROWS, tmp_path / "work", settings=fake(body))
    assert "line 80" not in str(error.value)


def test_an_img2dataset_that_is_killed_is_an_error_that_names_the_signal(fake: Fake, tmp_path: Path) -> None:
    settings = fake("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(DataError, match=r"(?s)killed by SIGKILL \(exit code -9\).*threads.*\(nothing\)"):
        download(ROWS, tmp_path / "work", settings=settings)


def test_an_img2dataset_that_writes_nothing_is_an_error(fake: Fake, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)exit code 0 and did not finish 1 of 1 tars.*shard 0 failed"):
        download(ROWS, tmp_path / "work", settings=fake("print('shard 0 failed')"))


def test_a_damaged_tar_is_an_error(fake: Fake, tmp_path: Path) -> None:
    body = "import pathlib\nfolder = pathlib.Path('pictures')\nfolder.mkdir()\n"
    body += "(folder / '00000.tar').write_bytes(b'x' * 700)\n(folder / '00000_stats.json').write_text('{}')"
    with pytest.raises(DataError, match=r"00000\.tar of img2dataset is damaged.*disk"):
        download(ROWS, tmp_path / "work", settings=fake(body))


def test_rows_that_vanish_and_texts_without_a_name_are_counted(
    fake: Fake, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    body = "import json, pathlib, tarfile\nfolder = pathlib.Path('pictures')\nfolder.mkdir()\n"
    body += "tarfile.open(folder / '00000.tar', 'w').close()\nprint('Sample 0 failed to download: no room')\n"
    body += "stats = {'status_dict': {'success': 1, 'a new text': 1, 'HTTP Error 404: Gone': 1}}\n"
    body += "(folder / '00000_stats.json').write_text(json.dumps(stats))"
    caplog.set_level("INFO")
    done = download(pa.concat_tables([ROWS] * 3), tmp_path / "work", settings=fake(body))
    assert (done.attempted, done.succeeded) == (3, 0)
    assert done.failures == {"other error": 1, "HTTP 404": 1, "lost by img2dataset": 1}
    assert "1 × 'a new text'" in caplog.text
    assert "lost 1 of 3 rows without a reason" in caplog.text
    assert "no room" in caplog.text


def test_an_executable_that_does_not_take_the_bounds_is_an_error(tmp_path: Path) -> None:
    settings = DownloadSettings(command=str(executable(tmp_path / "img2dataset")))
    with pytest.raises(DataError, match="ignores PYTHONPATH"):
        download(ROWS, tmp_path / "work", settings=settings)


def test_an_executable_that_cannot_be_started_is_an_error(tmp_path: Path) -> None:
    path = executable(tmp_path / "img2dataset")
    path.write_text("#!/no/such/python\n")
    with pytest.raises(DataError, match=r"cannot be started.*make img2dataset"):
        download(ROWS, tmp_path / "work", settings=DownloadSettings(command=str(path)))


def test_it_gets_little_of_our_environment(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/of/ours")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    with pytest.raises(DataError) as error:
        download(ROWS, tmp_path / "work", settings=fake("import os, sys\nsys.exit('\\n'.join(map('='.join, os.environ.items())))"))  # noqa: E501  # fmt: skip
    assert "HTTPS_PROXY=http://proxy.example:3128" in str(error.value)
    assert "NO_ALBUMENTATIONS_UPDATE=1" in str(error.value)
    hooks = tmp_path / "work" / "img2dataset" / "hooks"
    assert f"PYTHONPATH={hooks}\n" in f"{error.value}\n"
    assert "secret" not in str(error.value)


def test_one_that_hangs_is_killed_with_its_children(fake: Fake, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)no progress for 1 s and was killed.*going to sleep"):
        download(ROWS, tmp_path / "work", settings=fake(HANGS))
    pids = (tmp_path / "work/img2dataset/pids").read_text().split()
    assert all(gone(int(pid), within_s=5) for pid in pids)


def test_one_that_goes_on_writing_is_not_given_up(fake: Fake, tmp_path: Path) -> None:
    body = "import pathlib, sys, time\nfolder = pathlib.Path('pictures')\nfolder.mkdir()\n"
    body += "for n in range(8):\n    (folder / '00000.tar').write_bytes(b'x' * n)\n    time.sleep(0.3)\nsys.exit(5)"
    with pytest.raises(DataError, match="exit code 5"):
        download(ROWS, tmp_path / "work", settings=fake(body))


def test_an_interrupt_kills_it_with_its_children(fake: Fake, tmp_path: Path) -> None:
    # A shell starts what runs in its background with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    path = tmp_path / "work/img2dataset/pids"

    def interrupt() -> None:
        wait_for(path)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    settings = fake(HANGS).model_copy(update={"stall_timeout_s": 60.0})
    try:
        with pytest.raises(KeyboardInterrupt):
            download(ROWS, tmp_path / "work", settings=settings)
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    assert all(gone(int(pid), within_s=5) for pid in path.read_text().split())


def test_it_ends_with_the_process_that_started_it(fake: Fake, tmp_path: Path) -> None:
    settings = fake(HANGS).model_copy(update={"stall_timeout_s": 60.0})
    program = (
        "import sys, pathlib, pyarrow as pa\n"
        "from fewstep.data.metadata.download import DownloadSettings, download\n"
        "rows = pa.table({'key': ['00'], 'url': ['http://127.0.0.1:9/'], 'caption': ['a']})\n"
        "download(rows, pathlib.Path(sys.argv[1]), settings=DownloadSettings.model_validate_json(sys.argv[2]))\n"
    )
    ours = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "work"), settings.model_dump_json()])
    try:
        pids = wait_for(tmp_path / "work/img2dataset/pids").split()
    finally:
        ours.kill()
        ours.wait()
    assert all(gone(int(pid), within_s=10) for pid in pids)

"""Runs img2dataset, which needs older libraries than fewstep, as a process of an environment of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.data.metadata import inside_img2dataset
from fewstep.errors import DataError

#: Names the executable where no setting does.
VARIABLE = "FEWSTEP_IMG2DATASET"
_BESIDE = Path(".venv-img2dataset/bin/img2dataset")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
#: What it gets of our environment: how to find libraries, the disk, and the way to the web.
_PASSED_ON = (
    "PATH", "LD_LIBRARY_PATH", "TMPDIR", "SSL_CERT_FILE", "SSL_CERT_DIR", *_PROXIES, *map(str.upper, _PROXIES)
)  # fmt: skip
_LAST_LINES = 15


def find_command(command: str | None) -> Path:
    """Return the absolute path of the img2dataset executable.

    Args:
        command: path, or name on PATH; None: that in $FEWSTEP_IMG2DATASET, or else the one that ``make img2dataset``
            makes below the current folder, or else ``img2dataset`` on PATH.

    Raises:
        DataError: there is none.
    """
    for named, by in ((command, "prepare_metadata.download.command"), (os.environ.get(VARIABLE), f"${VARIABLE}")):
        if named:
            found = shutil.which(os.path.expanduser(named))
            if found is None:
                raise DataError(
                    f"{by} is {named}, where there is no executable: name the img2dataset executable there, or leave "
                    "it out and run make img2dataset"
                )
            return Path(found).absolute()
    found = shutil.which(_BESIDE.absolute()) or shutil.which("img2dataset")
    if found is None:
        raise DataError(
            "pictures named by metadata are downloaded by img2dataset, which is not here: run make img2dataset in "
            f"fewstep's folder, or name its executable in prepare_metadata.download.command or ${VARIABLE}"
        )
    return Path(found).absolute()


def run_img2dataset(
    program: Path,
    options: Mapping[str, Any],
    *,
    folder: Path,
    output: Path,
    answer_timeout_s: float,
    max_bytes: int,
    max_image_area: int,
    private_addresses: bool,
    requests_per_s: float | None,
    longest_pause_s: float,
    stall_timeout_s: float,
) -> None:
    """Run img2dataset to its end, in `folder`; none of its processes is left, whatever happens.

    Args:
        program: its executable.
        options: by name; values are Python's.
        folder: its home and current folder; its words go to the file img2dataset.log there.
        output: folder that grows while it makes progress.
        answer_timeout_s: bound of one HTTP answer as a whole, in seconds.
        max_bytes: the same in bytes.
        max_image_area: pixels of a picture above which it is not decoded.
        private_addresses: whether it may connect to addresses that are not public.
        requests_per_s: of each of its processes; None: no limit.
        longest_pause_s: bound of what is waited where a server is busy; an address for which it asks more is given up.
        stall_timeout_s: seconds without progress after which it is killed.

    Raises:
        DataError: it cannot be started, ended with an error, or stalled.
    """
    hooks, log_path = folder / "hooks", folder / "img2dataset.log"
    calls = (
        f"bound_answers(seconds={answer_timeout_s!r}, max_bytes={max_bytes!r})",
        f"ask_in_turn(per_s={requests_per_s!r}, longest_pause_s={longest_pause_s!r})",
        *(() if private_addresses else ("refuse_private()",)),
    )
    in_effect = _write_hooks(hooks, calls)
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ} | {
        "HOME": str(folder),
        "LANG": "C.UTF-8",
        "PYTHONPATH": str(hooks),
        "PYTHONUNBUFFERED": "1",
        "NO_ALBUMENTATIONS_UPDATE": "1",  # it would ask PyPI for its newest version
        "WANDB_MODE": "disabled",
        "WANDB_ERROR_REPORTING": "false",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "OPENCV_LOG_LEVEL": "ERROR",
        # img2dataset decodes before it looks at the size; OpenCV can refuse by the head of the file.
        "OPENCV_IO_MAX_IMAGE_PIXELS": str(max_image_area),
    }
    # It reads values as Python's, so that a bare 1e5 would be a number.
    arguments = [f"--{name}={value!r}" for name, value in options.items()]
    with open(log_path, "wb") as log:
        try:
            process = subprocess.Popen(
                [str(program), *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder,
                env=environment, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise DataError(f"img2dataset at {program} cannot be started ({error}): {_ANEW}") from error
    try:
        code = _wait(process, output, stall_timeout_s)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if code is None:
        raise DataError(
            f"img2dataset made no progress for {stall_timeout_s:g} s and was killed. One of its processes may have "
            "been out of memory: lower prepare_metadata.download.threads or max_bytes. If the network stood still, run "
            f"prepare again. {last_words(folder)}"
        )
    if code:
        raise DataError(f"{_how_it_ended(code)}. {last_words(folder)}")
    if not in_effect.exists():
        raise DataError(
            f"img2dataset at {program} runs with an interpreter that ignores PYTHONPATH (-I or -E in its first line?), "
            f"so the bounds of answer_timeout_s and max_bytes have no effect: {_ANEW}"
        )


def last_words(folder: Path) -> str:
    """Return the last lines that img2dataset printed in a run in `folder`."""
    text = (folder / "img2dataset.log").read_bytes()[-20_000:].decode(errors="replace").replace("\r", "\n")
    lines = [line for line in text.splitlines() if line.strip()]
    return "The last that it printed:\n" + ("\n".join(lines[-_LAST_LINES:]) or "(nothing)")


_ANEW = "make its environment anew (delete .venv-img2dataset, then make img2dataset), or name another executable"


def _write_hooks(folder: Path, calls: Sequence[str]) -> Path:
    """Write the sitecustomize of its interpreters; return the path of a file that is there once that has run."""
    folder.mkdir()
    in_effect = folder / "in-effect"
    calls = (*calls, "decode_as_seen()", f"end_with({os.getpid()})", f"open({str(in_effect)!r}, 'w').close()")
    source = Path(inside_img2dataset.__file__).read_text(encoding="utf-8")
    (folder / "sitecustomize.py").write_text("\n".join((source, *calls, "")), encoding="utf-8")
    return in_effect


def _wait(process: subprocess.Popen[bytes], output: Path, stall_timeout_s: float) -> int | None:
    """Return the exit code; None: it still runs, and has written nothing for so long."""
    seen, since = _sizes(output), time.monotonic()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(min(1.0, stall_timeout_s / 4))
        now = _sizes(output)
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > stall_timeout_s:
            return None


def _sizes(folder: Path) -> dict[str, int]:
    sizes = {}
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            sizes[path.name] = path.stat().st_size
    return sizes


def _how_it_ended(code: int) -> str:
    if code > 0:
        return f"img2dataset ended with exit code {code}. If a package is missing there, {_ANEW}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "a signal"
    return (
        f"img2dataset was killed by {name} (exit code {code}). If it was out of memory, lower "
        "prepare_metadata.download.threads, processes or max_bytes; then run prepare again"
    )

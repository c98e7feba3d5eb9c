"""A program that trains the toy on a Ray of several nodes, of which one is taken away and another comes later:
`elastic_driver.py STORAGE.pickle URI JOB.pickle TRACKER_FILE NOTES.json`.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "1"
os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "15"  # until Ray tries with fewer; a minute by default

import ray
import ray.cloudpickle
import toy_training
from ray.cluster_utils import Cluster

from fewstep.train.cluster import local_ray
from fewstep.train.run import run_training
from fewstep.train.settings import ClusterSettings, ElasticWorkers

NOTICE_S = 20


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 400
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.1)


class Lines(logging.Handler):
    """Keeps what the training says."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())
        print(f"{time.monotonic():.1f}", record.getMessage(), file=sys.stderr, flush=True)


def take_away_and_bring(cluster: Cluster, nodes: list, lines: Lines, tracker: toy_training.FileTracker) -> None:
    """Take a node away as a cloud does, with notice; when the training has gone on without it, bring another."""

    def latest() -> int:
        return json.loads(Path(tracker.path).read_text().splitlines()[-1])["step"]

    def has_said(*words: str) -> Callable[[], bool]:
        return lambda: any(all(word in line for word in words) for line in lines.said)

    wait_for(lambda: Path(tracker.path).exists() and latest() >= 5, "two workers train")
    # As under KubeRay: what the driver needs lies on a node that stays.
    gone = next(node for node in nodes if node.node_id != ray.get_runtime_context().get_node_id())
    ray_program = str(Path(sys.executable).with_name("ray"))
    subprocess.run(
        [
            ray_program, "drain-node", "--address", cluster.address, "--node-id", gone.node_id,
            "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test",
            "--deadline-remaining-seconds", str(NOTICE_S),
        ],
        check=True,
    )  # fmt: skip
    time.sleep(NOTICE_S + 1)
    cluster.remove_node(gone, allow_graceful=False)
    wait_for(has_said("goes on from update", "with 1 of 1…2 workers"), "one worker goes on")
    begun = latest()
    wait_for(lambda: latest() != begun, "it trains")
    cluster._shutdown_at_exit = False  # a thread that is not the first must set no signal handlers
    cluster.add_node(num_cpus=1)
    wait_for(has_said("goes on from update", "with 2 of 1…2 workers"), "two workers go on")


def main() -> None:
    storage_file, uri, job_file, tracker_file, notes_file = sys.argv[1:]
    ray.cloudpickle.register_pickle_by_value(toy_training)
    tracker = toy_training.FileTracker(tracker_file)
    lines = Lines()
    logging.getLogger("fewstep").addHandler(lines)
    logging.getLogger("fewstep").setLevel(logging.INFO)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    settings = ClusterSettings(
        address=cluster.address,
        num_workers=ElasticWorkers(min=1, max=2),
        use_gpu=False,
        cpus_per_worker=1,
        max_failures=0,  # what is taken away is no failure
        resize_every_s=5.0,
    )
    with local_ray(settings):
        watched = os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"]
        errors: list[BaseException] = []

        def mischief() -> None:
            try:
                take_away_and_bring(cluster, nodes, lines, tracker)
            except BaseException as error:
                errors.append(error)
                raise

        thread = threading.Thread(target=mischief, daemon=True)
        thread.start()
        result = run_training(
            pickle.loads(Path(job_file).read_bytes()),
            cluster=settings,
            storage=pickle.loads(Path(storage_file).read_bytes()),
            uri=uri,
            tracker=tracker,
        )
    notes = {"said": lines.said, "resumed_from": result.resumed_from, "watched": watched, "errors": repr(errors)}
    Path(notes_file).write_text(json.dumps(notes))
    cluster.shutdown()


if __name__ == "__main__":
    main()

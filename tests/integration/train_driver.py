"""A program that trains the toy in a Ray of its own: `train_driver.py STORAGE.pickle URI JOB.pickle TRACKER_FILE`."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

import ray.cloudpickle
import toy_training

from fewstep.train.run import run_training
from fewstep.train.settings import ClusterSettings

if __name__ == "__main__":
    ray.cloudpickle.register_pickle_by_value(toy_training)
    storage_file, uri, job_file, tracker_file = sys.argv[1:]
    run_training(
        pickle.loads(Path(job_file).read_bytes()),
        cluster=ClusterSettings(num_cpus=1),
        storage=pickle.loads(Path(storage_file).read_bytes()),
        uri=uri,
        tracker=toy_training.FileTracker(tracker_file),
    )

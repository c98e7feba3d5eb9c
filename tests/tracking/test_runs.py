import contextlib
import logging

import pytest
from PIL import Image
from pydantic import BaseModel

from fewstep.errors import TrackingError
from fewstep.tracking.settings import TrackingSettings
from fewstep.tracking.tracker import Tracker, flatten


def test_flatten_nests_with_dots_and_keeps_lists_as_json():
    class Inner(BaseModel):
        rate: float = 0.1

    flat = flatten({"a": {"b": 1, "c": None}, "steps": [4, 2], "inner": Inner(), "empty": {}, "odd[0]": "x"})
    assert flat == {"a.b": "1", "a.c": "None", "steps": "[4, 2]", "inner.rate": "0.1", "empty": "{}", "odd_0_": "x"}
    assert flatten(Inner()) == {"rate": "0.1"}


def test_flatten_cuts_long_values_and_tells_them_apart():
    one, other = flatten({"v": "x" * 9000})["v"], flatten({"v": "x" * 9001})["v"]
    assert len(one) == 6000
    assert one != other


def test_same_key_goes_on_in_the_same_run(tracker):
    with contextlib.suppress(RuntimeError), tracker.run("stage", key="k1") as first:
        first.log_params({"updates": 10, "rate": 0.1})
        raise RuntimeError("killed")
    assert tracker.client.get_run(first.id).info.status == "FAILED"
    with tracker.run("stage", key="k1", tags={"attempt": "2"}) as second:
        assert second.id == first.id
        assert tracker.client.get_run(first.id).info.status == "RUNNING"
        second.log_params({"updates": 10, "rate": 0.2, "new": 1})
    data = tracker.client.get_run(first.id)
    assert data.info.status == "FINISHED"
    assert data.data.params == {"updates": "10", "rate": "0.1", "new": "1"}
    assert data.data.tags["fewstep.changed.rate"] == "0.2"
    assert data.data.tags["attempt"] == "2"
    with tracker.run("stage", key="k2") as other:
        assert other.id != first.id


def test_resumed_run_keeps_the_code_that_began_it(tracker, monkeypatch):
    monkeypatch.setenv("FEWSTEP_GIT_COMMIT", "a")
    for _ in range(2):
        with tracker.run("stage", key="lineage") as run:
            pass
    first = tracker.client.get_run(run.id).data.tags
    assert not any(name.startswith("fewstep.resumed.") for name in first)
    monkeypatch.setenv("FEWSTEP_GIT_COMMIT", "b")
    with tracker.run("stage", key="lineage", tags={"attempt": "2"}):
        pass
    tags = tracker.client.get_run(run.id).data.tags
    assert tags == {**first, "attempt": "2", "fewstep.resumed.git_commit": "b"}
    assert tags["fewstep.git_commit"] == tags["mlflow.source.git.commit"] == "a"


def test_resumed_run_that_knew_no_commit_does_not_claim_a_later_one(tracker, monkeypatch):
    monkeypatch.setenv("FEWSTEP_GIT_COMMIT", "b")
    with tracker.run("stage", key="no-commit") as run:
        pass
    for tag in ("fewstep.git_commit", "mlflow.source.git.commit"):  # as an installed package leaves it
        tracker.client.delete_tag(run.id, tag)
    with tracker.run("stage", key="no-commit"):
        pass
    tags = tracker.client.get_run(run.id).data.tags
    assert "fewstep.git_commit" not in tags
    assert "mlflow.source.git.commit" not in tags
    assert tags["fewstep.resumed.git_commit"] == "b"


def test_another_experiment_has_runs_of_its_own(tracker):
    with tracker.run("stage", key="shared") as run:
        pass
    other = Tracker.open(tracker.settings.model_copy(update={"experiment": f"{tracker.settings.experiment}-b"}))
    assert other.find_run("shared") is None
    assert tracker.find_run("shared") == run.id


def test_children_hang_below_their_parent_and_carry_lineage(tracker):
    with tracker.run("workflow", key="p") as parent, tracker.run("guidance", key="c", parent=parent.id) as child:
        child.log_metrics({"loss": 0.5}, step=3)
    tags = tracker.client.get_run(child.id).data.tags
    assert tags["mlflow.parentRunId"] == parent.id
    assert tags["fewstep.torch"]
    assert tags["fewstep.python"].startswith("3.")
    assert tracker.client.get_run(child.id).data.metrics == {"loss": 0.5}


def test_keyboard_interrupt_is_recorded_as_killed(tracker):
    with pytest.raises(KeyboardInterrupt), tracker.run("stage", key="ctrl-c") as run:
        raise KeyboardInterrupt
    assert tracker.client.get_run(run.id).info.status == "KILLED"


def test_pictures_and_files_without_an_object_store(tracker, tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text("{}")
    (tmp_path / "note.txt").write_text("hello")
    with tracker.run("stage", key="files") as run:
        run.log_image(Image.new("RGB", (32, 32), "red"), "grid/n4", 4)
        run.log_artifact(tmp_path / "report")
        run.log_artifact(tmp_path / "note.txt", "notes")
        with pytest.raises(TrackingError, match="there is no such file"):
            run.log_artifact(tmp_path / "missing.txt")
    assert run.lost == 0
    names = {info.path for info in tracker.client.list_artifacts(run.id, "images")}
    assert {name.rsplit(".", 1)[-1] for name in names} == {"png", "webp"}
    assert all(name.startswith("images/grid~n4+step+4+") for name in names)
    assert [info.path for info in tracker.client.list_artifacts(run.id, "report")] == ["report/report.json"]
    assert [info.path for info in tracker.client.list_artifacts(run.id, "notes")] == ["notes/note.txt"]


def test_more_parameters_than_one_request_takes(tracker):
    with tracker.run("stage", key="many") as run:
        run.log_params({f"p{i}": i for i in range(250)})
        run.set_tags({f"t{i}": str(i) for i in range(150)})
    data = tracker.client.get_run(run.id).data
    assert sum(name.startswith("p") for name in data.params) == 250
    assert data.tags["t149"] == "149"


def test_unreachable_server_is_said_before_the_work(caplog):
    settings = TrackingSettings(uri="http://127.0.0.1:9", retries=0, timeout_s=1)
    with pytest.raises(TrackingError, match=r"open experiment 'fewstep'.*Is MLflow running at http://127\.0\.0\.1:9\?"):
        Tracker.open(settings)


def test_database_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackingError, match="Check that the file can be written"):
        Tracker.open(TrackingSettings(uri=f"sqlite:///{tmp_path}/file/m.db"))


def test_file_that_is_no_database_is_said_at_once(tmp_path):
    (tmp_path / "m.db").write_text("not a database " * 100)
    with pytest.raises(TrackingError, match="file is not a database"):
        Tracker.open(TrackingSettings(uri=f"sqlite:///{tmp_path}/m.db"))


def test_deleted_experiment_is_said(tracker):
    tracker.client.delete_experiment(tracker.experiment_id)
    with pytest.raises(TrackingError, match="which was deleted"):
        Tracker.open(tracker.settings)


def test_records_that_fail_are_counted_and_the_work_goes_on(tracker, caplog, tmp_path):
    with tracker.run("stage", key="spared") as run:
        run.artifact_uri = "s3://nowhere/mlflow"  # no object store is open in this test
        with caplog.at_level(logging.WARNING):
            run.log_image(Image.new("RGB", (8, 8)), "grid", 0)
    assert run.lost == 1
    assert "no object store is open" in caplog.text
    assert "1 records are missing in MLflow" in caplog.text
    assert tracker.client.get_run(run.id).info.status == "FINISHED"


def test_key_that_would_break_the_search_is_refused(tracker):
    with pytest.raises(TrackingError, match="single quote"), tracker.run("stage", key="a'b"):
        pass

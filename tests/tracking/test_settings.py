import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from fewstep.errors import TrackingError
from fewstep.tracking.connection import connect, failures, without_password
from fewstep.tracking.settings import TrackingSettings


@pytest.fixture(autouse=True)
def _home(monkeypatch, tmp_path):
    monkeypatch.setenv("FEWSTEP_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_default_is_sqlite_in_the_home_folder(tmp_path):
    assert TrackingSettings().tracking_uri() == f"sqlite:///{tmp_path}/home/mlflow.db"
    assert TrackingSettings().sqlite_path() == tmp_path / "home" / "mlflow.db"


def test_environment_names_the_server_and_the_recipe_comes_first(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert TrackingSettings().tracking_uri() == "http://tracking:5000"
    assert TrackingSettings().sqlite_path() is None
    assert TrackingSettings(uri="https://other").tracking_uri() == "https://other"


def test_resolved_does_not_depend_on_the_folder_of_the_process(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    resolved = TrackingSettings(uri="sqlite:///runs/m.db").resolved()
    monkeypatch.chdir("/")
    assert resolved.sqlite_path() == Path(tmp_path, "runs/m.db")


@pytest.mark.parametrize("uri", ["./mlruns", "file:///tmp/mlruns", "s3://bucket/x", "sqlite:///", "sqlite://m.db"])
def test_uri_that_mlflow_cannot_use_names_it_and_the_mend(uri):
    with pytest.raises(TrackingError, match=r"tracking\.uri is .*sqlite:///"):
        TrackingSettings(uri=uri).tracking_uri()


def test_unknown_setting_is_refused():
    with pytest.raises(ValidationError, match="experimnt"):
        TrackingSettings(experimnt="x")


def test_messages_do_not_carry_passwords():
    assert without_password("postgresql://u:secret@db/m") == "postgresql://u:***@db/m"
    assert without_password("http://host:5000") == "http://host:5000"


def test_without_sqlalchemy_as_in_the_serving_image_servers_are_asked_and_databases_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)  # as if it were not installed
    with pytest.raises(TrackingError, match=r"postgresql://u:\*\*\*@db/x.*mlflow-skinny.*http://HOST:PORT"):
        connect(TrackingSettings(uri="postgresql://u:secret@db/x"))
    server = TrackingSettings(uri="http://127.0.0.1:9")
    assert connect(server).tracking_uri == "http://127.0.0.1:9"
    with pytest.raises(TrackingError, match=r"read a thing: gone\."), failures("read a thing", server):
        raise OSError("gone")

"""docs/environment.md names every variable of fewstep's own, and every one that the store is taken from."""

import re
from pathlib import Path

from fewstep.storage.environment import VARIABLES

ROOT = Path(__file__).parents[1]


def test_every_variable_is_on_the_page() -> None:
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    source = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "src").rglob("*.py"))
    read = set(re.findall(r"\bFEWSTEP_[A-Z0-9_]+\b", source)) | set(re.findall(r'environ\W+(?:get\()?"(\w+)"', source))
    read |= {name for names in VARIABLES.values() for name in names}
    read -= {"PATH", "HOME", "S3_ENDPOINT_URL"}  # the last is of a bench's other reader
    assert {"FEWSTEP_SET", "FEWSTEP_RUNS", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"} <= read
    assert {name for name in read if f"`{name}`" not in page} == set()

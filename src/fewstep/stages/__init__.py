"""The boxes of the picture in docs/architecture.md: one short file a stage, tying the rooms together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fewstep.recipe import StageName
from fewstep.stages.context import Artifact, StageContext, find_artifact, stage_uri
from fewstep.stages.convert import convert
from fewstep.stages.encode import encode
from fewstep.stages.evaluate import evaluate
from fewstep.stages.fingerprints import fingerprint
from fewstep.stages.guidance import guidance
from fewstep.stages.prepare import prepare
from fewstep.stages.progressive import progressive
from fewstep.stages.register import register
from fewstep.stages.teacher import teacher

#: Every stage by name: takes a context, returns the facts of its artifact.
STAGES: dict[StageName, Callable[[StageContext], dict[str, Any]]] = {
    "prepare": prepare,
    "teacher": teacher,
    "encode": encode,
    "convert": convert,
    "guidance": guidance,
    "progressive": progressive,
    "evaluate": evaluate,
    "register": register,
}

__all__ = ["STAGES", "Artifact", "StageContext", "find_artifact", "fingerprint", "stage_uri"]

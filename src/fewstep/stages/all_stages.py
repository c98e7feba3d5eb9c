"""The stages by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fewstep.recipe import StageName
from fewstep.stages.context import StageContext
from fewstep.stages.convert import convert
from fewstep.stages.encode import encode
from fewstep.stages.evaluate import evaluate
from fewstep.stages.guidance import guidance
from fewstep.stages.prepare import prepare
from fewstep.stages.progressive import progressive
from fewstep.stages.promote import promote
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
    "promote": promote,
}

"""register: students go into the model registry; one becomes champion if it passes the gate."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from fewstep.evaluate.gate import decide
from fewstep.evaluate.report import read_report
from fewstep.models import copy_student, read_student_info
from fewstep.models.lora import ADAPTER_FILE
from fewstep.recipe import digest
from fewstep.stages.context import StageContext
from fewstep.stages.fingerprints import fingerprint
from fewstep.storage import join
from fewstep.tracking.adapters import add_flavor
from fewstep.tracking.fetch import fetch_model
from fewstep.tracking.registry import Registry

logger = logging.getLogger("fewstep")

#: In place of an alias: of a version that was champion or candidate once and is neither now.
NO_ALIAS = "without an alias"


def register(context: StageContext) -> dict[str, Any]:
    """Register every evaluated student: the recipe's chosen one under NAME, the student for N steps under NAME-N.

    Each gets the alias champion if it passes the gate, else candidate with the reason. In a recipe that has the stage
    promote each new version becomes the candidate, and only that stage, or a person, moves champion.
    """
    recipe, storage = context.recipe, context.storage
    settings = recipe.register_
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        file.write_bytes(storage.read_bytes(join(context.uri("evaluate"), "report.json")))
        report = read_report(file)
    encoded = context.artifact("encode").facts
    trained = context.artifact("progressive").facts["students"]
    registry = Registry(context.tracker)
    versions: dict[str, Any] = {}
    for steps in sorted({*recipe.evaluate.steps, settings.num_inference_steps}, reverse=True):
        name = settings.name if steps == settings.num_inference_steps else f"{settings.name}-{steps}"
        row = report.find("student", steps)
        metrics = {} if row is None else {f: getattr(row, f) for f in _METRICS if getattr(row, f) is not None}
        trained_folder = fetch_model(trained[str(steps)]["uri"], storage=storage)
        with tempfile.TemporaryDirectory() as scratch:
            student, registered_as = _at_scale(trained_folder, Path(scratch, "student"), recipe.evaluate.guidance_scale)
            _add_flavor(student)
            version = registry.log_student(
                context.run,
                student,
                name=name,
                params=recipe.model_dump(mode="json", by_alias=True, exclude={"storage", "tracking"}),
                tags={
                    "num_inference_steps": str(steps),
                    "teacher": context.teacher(),
                    "teacher_digest": context.teacher_digest(),
                    "data_digest": encoded.get("data_digest", encoded["train"]["source_digest"]),
                    "fingerprint": registered_as,
                    "recipe": recipe.name,
                    "evaluation": fingerprint(recipe, "evaluate"),
                },
                metrics=metrics,
                code=trained[str(steps)].get("code"),
            )
        decision = decide(report, num_inference_steps=steps, settings=settings.gate)
        reason = "; ".join(decision.reasons)
        give_alias = registry.offer if "promote" in recipe.stages else registry.promote
        alias = give_alias(name, version, passed=decision.passed, reason=reason)
        log = logger.info if decision.passed else logger.warning
        verdict = "passed" if decision.passed else "failed"
        log("models:/%s version %d %s the gate and is %s: %s", name, version, verdict, alias or NO_ALIAS, reason)
        versions[name] = {
            "version": version,
            "alias": alias or NO_ALIAS,
            "num_inference_steps": steps,
            "passed": decision.passed,
            "reasons": decision.reasons,
        }
    return {"models": versions}


_METRICS = ("kid_lite0_to_real", "kid_lite0_to_teacher", "fd_lite0_to_real", "alignment", "paired_mse")


def _add_flavor(folder: Path) -> None:
    """Let MLflow's own `diffusers` flavour read a student of adapters; a student without them stays as it is."""
    info = read_student_info(folder)
    if info is None or info.lora_base is None or info.num_inference_steps is None:
        return
    add_flavor(
        folder,
        adapters=folder / ADAPTER_FILE,
        base=info.lora_base,
        num_inference_steps=info.num_inference_steps,
        guidance_scale=1.0 if info.has_single_w else info.guidance_scale,
    )


def _at_scale(folder: Path, copy: Path, guidance_scale: float) -> tuple[Path, str]:
    """Return a student's folder and fingerprint, with the scale that it was evaluated at as its default.

    Training does not depend on the scale, so its folder may carry that of an earlier recipe; the version in the
    registry does, so that its fingerprint is that of both.
    """
    info = read_student_info(folder)
    assert info is not None  # our own export
    info = replace(
        info,
        guidance_scale=guidance_scale,
        fingerprint=digest([info.fingerprint, f"guidance_scale={guidance_scale:g}"]),
    )
    copy_student(folder, copy, info)
    return copy, info.fingerprint

"""promote: the versions that register left become champions, if they passed the gate."""

from __future__ import annotations

import logging
from typing import Any

from fewstep.stages.context import StageContext
from fewstep.stages.register import NO_ALIAS
from fewstep.tracking.registry import CANDIDATE, CHAMPION, RegisteredModel, Registry

logger = logging.getLogger("fewstep")


def promote(context: StageContext) -> dict[str, Any]:
    """Move the alias champion to every version that register left, passed the gate and is still the candidate.

    The others leave the champion as it is, with a warning that says why, and are no failure: a student that is not good
    enough is a result. What has changed in the registry since counts: a version that a person has promoted stays
    champion, and one that was rolled back, or has a newer candidate or champion, is not brought back.

    Raises:
        FewstepError: register has not run.
        TrackingError: MLflow cannot be reached, or a version has been deleted.
    """
    registry = Registry(context.tracker)
    facts: dict[str, Any] = {}
    for name, left in context.artifact("register").facts["models"].items():
        model = registry.get(f"models:/{name}/{left['version']}")
        champion = registry.get_champion(name)
        passed = left.get("passed", left["alias"] == CHAMPION)  # not in what earlier releases left
        why = _why_not(model, champion, passed=passed, reasons=left["reasons"])
        if why is None:
            # Of a champion too: a process that was killed may have left it the candidate as well.
            before = registry.set_alias(name, CHAMPION, model.version)
            same = before == model.version
            moved = f"version {model.version} already" if same else f"version {before or 'none'} → {model.version}"
            logger.info("models:/%s@%s: %s", name, CHAMPION, moved)
        else:
            kept = "there is no champion" if champion is None else f"version {champion.version} stays the champion"
            logger.warning(
                "%s is not promoted, %s: %s%s", model.uri, kept, "" if passed else "it failed the gate: ", why
            )
        now = registry.get(model.uri)
        alias = next((each for each in (CHAMPION, CANDIDATE) if each in now.aliases), NO_ALIAS)
        facts[name] = {**left, "alias": alias, "champion_before": champion and champion.version, "why_not": why}
    if not any(each["alias"] == CHAMPION for each in facts.values()):
        logger.warning("promote: no new champion")
    return {"models": facts}


def _why_not(
    model: RegisteredModel, champion: RegisteredModel | None, *, passed: bool, reasons: list[str]
) -> str | None:
    """Return why a version may not become champion; None when it may."""
    if champion is not None and champion.version == model.version:
        return None
    by_hand = f"`fewstep promote {model.uri}` makes it the champion all the same"
    if not passed:
        return "; ".join(reasons)
    if CANDIDATE not in model.aliases:
        return f"it is the candidate no longer, a newer one has followed or a person has moved the aliases; {by_hand}"
    if champion is not None and champion.version > model.version:
        return f"the champion is newer; {by_hand}"
    return None

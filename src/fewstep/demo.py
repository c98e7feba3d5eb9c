"""The demo: a whole recipe, then one picture over HTTP, and what to do next."""

from __future__ import annotations

import base64
import logging
from pathlib import Path

from fewstep.errors import RecipeError
from fewstep.recipe import load_recipe
from fewstep.recipe_arguments import out_folder
from fewstep.serving import served
from fewstep.stages.register import NO_ALIAS
from fewstep.train.cluster import local_ray
from fewstep.workflow import run_workflow
from fewstep.workplace import open_workplace

logger = logging.getLogger("fewstep")

PROMPT = "a red apple, twemoji"


def run_demo(recipe_path: Path, out: Path | None = None) -> list[str]:
    """Run a recipe, serve its student on a free port, fetch one picture with the OpenAI client, stop everything, and
    return three lines: what was made, where to look, what to type next.

    Raises:
        FewstepError: whatever a user can mend.
    """
    if not recipe_path.exists() and not recipe_path.is_absolute():
        raise RecipeError(f"there is no {recipe_path} here: run this in the folder of a clone, or name a recipe")
    recipe = load_recipe(recipe_path)
    if "register" not in recipe.stages:
        raise RecipeError(
            f"{recipe_path} has no stage register, so there is nothing to serve: use `fewstep run` for it"
        )
    folder = out_folder(out, recipe.name)
    # Ray and the store stay up over both halves; inside, each finds what is running.
    with open_workplace(recipe) as workplace, local_ray(recipe.cluster):
        artifacts = run_workflow(recipe, workplace, out=folder)
        left = artifacts.get("promote") or artifacts["register"]
        chosen = left.facts["models"][recipe.register_.name]
        uri = f"models:/{recipe.register_.name}/{chosen['version']}"
        picture = folder / "over_http.png"
        logger.info("serve …")
        with served([uri], recipe=recipe, announce=logger.info) as server:
            picture.write_bytes(_fetch(server.url, PROMPT))
    passed = chosen["alias"] == "champion"
    # What promote says stands first: a version that passed may still stay behind a newer one.
    why = "" if passed else f" because {chosen.get('why_not') or chosen['reasons'][0]}"
    name = uri if chosen["alias"] == NO_ALIAS else f"models:/{recipe.register_.name}@{chosen['alias']}"
    return [
        f"Made: a {chosen['num_inference_steps']}-step student, version {chosen['version']} of {recipe.register_.name} "
        f"in the MLflow registry, as {chosen['alias']}{why}.",
        f"Look at: {folder / 'report.html'} and {folder / 'samples.png'}; {picture} came over HTTP.",
        f"Next: make serve MODEL={name}, then  curl localhost:8000/v1/images/generations -H 'content-type: "
        f'application/json\' -d \'{{"prompt": "{PROMPT}"}}\'  · or  .venv/bin/fewstep run workflows/recipes/emoji.yaml',
    ]


def _fetch(url: str, prompt: str) -> bytes:
    from openai import OpenAI

    # Keys are not checked on loopback; the client insists on having one.
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=2)
    answer = client.images.generate(prompt=prompt, response_format="b64_json", extra_body={"seed": 0})
    data = answer.data[0].b64_json if answer.data else None
    assert data is not None, "the server answered 200 without a picture"
    return base64.b64decode(data)

"""What a stage's result is named by: a digest of all the settings and inputs that made it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from fewstep.data.classes import files_digest
from fewstep.data.emoji.dataset import SPLITS, Split
from fewstep.data.metadata.settings import ONLY_DOWNLOADING
from fewstep.data.mixture import Mixture, named_shares
from fewstep.distill.settings import LadderKind
from fewstep.errors import DataError, FewstepError
from fewstep.recipe import Recipe, StageName, digest
from fewstep.tracking.fetch import fetch_model
from fewstep.train.settings import ONLY_ROUNDING, ONLY_WATCHING

#: Raised when a stage changes what it makes of the same settings, so that older artifacts are made again.
_FORMAT = 2


def fingerprint(recipe: Recipe, stage: StageName) -> str:
    """Return a digest of the settings and inputs of a stage, those of the stages before it included.

    Settings that change nothing of the result (how often to log, where Ray runs) are left out, so that a stage that is
    done stays done when they change.
    """
    inputs: dict[str, Any] = {"stage": stage, "format": _FORMAT, "seed": recipe.seed}
    stream = _order(recipe)
    if stage == "prepare":
        # Which splits are drawn belongs to it: one that the recipe no longer names elsewhere has to be drawn after all.
        drawn = drawn_splits(recipe)
        inputs |= {"settings": _source(recipe, *drawn), "drawn": drawn}
    elif stage == "teacher":
        settings = recipe.train_teacher or recipe.train_class_teacher
        inputs |= {"settings": _dump(settings), "data": split_fingerprint(recipe, "train"), "stream": stream}
        inputs |= _rules(recipe)
        if recipe.train_teacher is not None and recipe.train_teacher.init is not None:
            inputs["init"] = _model(recipe.train_teacher.init)
            inputs["masks"] = _dump(recipe.encode.masks)  # of an inpainting teacher
        if settings is not None and settings.vae is not None:
            inputs["vae"] = _model(settings.vae)
    elif stage == "encode":
        data = [split_fingerprint(recipe, "train"), split_fingerprint(recipe, "evaluate")]
        inputs |= {"settings": _of_encode(recipe), "data": data, "teacher": _teacher(recipe)} | _rules(recipe)
    elif stage == "convert":
        inputs |= {"settings": _dump(recipe.convert), "encode": fingerprint(recipe, "encode"), "stream": stream}
    elif stage == "guidance":
        inputs |= {"settings": _dump(recipe.guidance), "encode": fingerprint(recipe, "encode"), "stream": stream}
        if "convert" in recipe.stages:
            inputs["convert"] = fingerprint(recipe, "convert")
    elif stage == "progressive":
        inputs["guidance_scale"] = recipe.evaluate.guidance_scale  # of the picture grids
        inputs |= {"settings": _dump(recipe.progressive), "guidance": fingerprint(recipe, "guidance"), "stream": stream}
    elif stage == "evaluate":
        judged = recipe.evaluate_classes or recipe.evaluate
        inputs |= {"settings": _dump(judged), "progressive": fingerprint(recipe, "progressive")}
        if recipe.evaluate_classes is not None:
            # Its batch size trains it.
            inputs["classifier"] = recipe.evaluate_classes.classifier.model_dump(mode="json", exclude={"num_threads"})
        inputs["alignment"] = split_fingerprint(recipe, "alignment")
    elif stage == "register":
        inputs |= {"settings": _dump(recipe.register_), "evaluate": fingerprint(recipe, "evaluate")}
    else:
        inputs["register"] = fingerprint(recipe, "register")
    return digest(inputs)


def autoencoder_fingerprint(recipe: Recipe) -> str:
    """Return a digest of what the teacher's VAE depends on."""
    settings = recipe.train_teacher or recipe.train_class_teacher
    assert settings is not None
    assert settings.autoencoder_train is not None
    return digest(
        {
            "settings": settings.autoencoder and _dump(settings.autoencoder),
            "train": settings.autoencoder_train.of_the_weights(),
            "weights": [settings.kl_weight, settings.edge_weight],
            "data": split_fingerprint(recipe, "train"),
            "stream": _order(recipe),
            "seed": recipe.seed,
            "format": _FORMAT,
        }
        | _rules(recipe)
        # That of a teacher with classes reads pictures with a class, grey ones perhaps.
        | ({} if recipe.train_class_teacher is None else {"channels": recipe.train_class_teacher.network.channels})
    )


def latents_fingerprint(
    recipe: Recipe, *, shards_digest: str, encoders_digest: str, masks: bool = False, held_out: bool = False
) -> str:
    """Return a digest of the latents that a teacher gives of picture shards, both named by their content.

    Args:
        recipe: the recipe.
        shards_digest: digest of the index of the picture shards.
        encoders_digest: of the parts of the teacher that make them.
        masks: masks are drawn for the pictures, which depend on the recipe's seed.
        held_out: these are square and have their text, whatever the recipe says of those that are trained on.
    """
    settings = _of_encode(recipe)
    settings.pop("store_latents", None)
    if held_out:
        settings.pop("buckets", None)
        settings.pop("store_text", None)
    if not masks:
        del settings["masks"]
    inputs = {"settings": settings, "data": shards_digest, "encoders": encoders_digest, "format": _FORMAT}
    drawn = masks or recipe.encode.crop == "random"
    return digest(inputs | _rules(recipe) | ({"seed": recipe.seed} if drawn else {}))


def data_digest(recipe: Recipe, *, shards_digests: Sequence[str], resolution: int) -> str:
    """Return a digest of the data that networks are trained on: the content of the shards of each source with its
    weight, which samples and captions are taken of them, and what is made of their pictures. It is the same wherever
    the shards lie, and whatever model is trained on them.

    Args:
        recipe: the recipe.
        shards_digests: digest of the index of the picture shards of each source, in the order of the recipe.
        resolution: side of the pictures in pixels.
    """
    train = recipe.data.train
    shares = Mixture(train).shares if isinstance(train, tuple) else (1,)
    transform: dict[str, Any] = {
        "resolution": resolution, "crop": recipe.encode.crop, "picture_sizes": recipe.encode.picture_sizes
    }  # fmt: skip
    if recipe.encode.crop == "random":
        transform["seed"] = recipe.seed
    if recipe.encode.buckets is not None:
        transform["buckets"] = _dump(recipe.encode.buckets)
    return digest(
        {
            "shards": [list(each) for each in zip(shards_digests, shares, strict=True)],
            "rules": recipe.sample_rules.to_json(),
            "transform": transform,
        }
    )


def guidance_fingerprint(recipe: Recipe, *, teacher_digest: str, latents_digest: str) -> str:
    """Return a digest of what stage one's weights depend on: its settings, and its inputs by their content.

    Held-out data and the guidance scale of the evaluation are no part of it, so that evaluating on more prompts or at
    another scale trains nothing anew.

    Args:
        recipe: the recipe.
        teacher_digest: `folder_digest` of the teacher.
        latents_digest: digest of the latent shards that it is trained on.
    """
    assert recipe.guidance is not None
    return digest(
        {
            "settings": _without(_dump(recipe.guidance), {"num_validation"}),
            "teacher": teacher_digest,
            "latents": latents_digest,
            "stream": _order(recipe),
            "seed": recipe.seed,
            "format": _FORMAT,
        }
    )


def convert_fingerprint(recipe: Recipe, *, teacher_digest: str, latents_digest: str) -> str:
    """Return a digest of what a converted teacher's weights depend on; arguments as for `guidance_fingerprint`."""
    return digest(
        {
            "settings": _dump(recipe.convert),
            "teacher": teacher_digest,
            "latents": latents_digest,
            "stream": _order(recipe),
            "seed": recipe.seed,
            "format": _FORMAT,
        }
    )


def guided_pair_fingerprint(recipe: Recipe, *, w: float | None, teacher_digest: str, latents_digest: str) -> str:
    """Return a digest of what a ladder that begins with the guided teacher depends on before its first rung, as the
    others do on stage one's; arguments as for `guidance_fingerprint` and `rung_fingerprint`."""
    assert recipe.guidance is not None
    return digest(
        {
            "weights": list(recipe.guidance.weights) if w is None else [w, w],
            "teacher": teacher_digest,
            "latents": latents_digest,
            "stream": _order(recipe),
            "seed": recipe.seed,
            "format": _FORMAT,
        }
    )


def rung_fingerprint(
    recipe: Recipe, kind: LadderKind, num_inference_steps: int, *, w: float | None = None, before: str
) -> str:
    """Return a digest of one rung and all that it builds on; a change to a later rung leaves it as it is.

    Args:
        recipe: the recipe.
        kind: of the ladder.
        num_inference_steps: the rung.
        w: the weight of a single-w ladder.
        before: fingerprint of the rung before it; for the first that of stage one or, in ladders without it,
            `guided_pair_fingerprint`.
    """
    assert recipe.progressive is not None
    stage = recipe.progressive
    # What another rung or another ladder is told does not matter to this one.
    own = stage.model_dump(
        mode="json", exclude={"ladder", "updates", "train", "kinds", "single_w", "first_teacher_steps"}
    )
    own |= {key: own[key].get(str(num_inference_steps), own[key].get(num_inference_steps)) for key in _BY_STEPS}
    own["skip_level"] = None  # it shows in the rung before, and in the number of its steps
    if kind != "naive":
        own["guided_share"] = None
    return digest(
        {
            "rung": num_inference_steps,
            "kind": kind,
            "w": w,
            "teacher_steps": stage.teacher_of(num_inference_steps)[1],
            "settings": stage.rung(num_inference_steps).of_the_weights(),
            "stage": own,
            "before": before,
        }
    )


def _of_encode(recipe: Recipe) -> dict[str, Any]:
    """Return the settings of encode that its latents depend on; what came later only where it is not as before."""
    settings: dict[str, Any] = _dump(recipe.encode)
    del settings["encoders"]
    for key, before in (("precision", "float32"), ("store_latents", True), ("store_text", True), ("buckets", None)):
        if settings[key] == before:
            del settings[key]
    return settings


_BY_STEPS = ("start_times", "prediction_type")


def _order(recipe: Recipe) -> dict[str, Any]:
    """Return what the order of the samples of a training depends on beside the shards."""
    order: dict[str, Any] = {
        "num_streams": recipe.stream.num_streams,
        "piece_bytes": recipe.stream.piece_bytes,
        "shuffle_bytes": recipe.stream.shuffle_bytes,
    }
    if isinstance(recipe.data.train, tuple):
        mixture = Mixture(recipe.data.train)
        order["sources"] = named_shares(mixture.names, mixture.shares)
    return order


def drawn_splits(recipe: Recipe) -> list[Split]:
    """Return the splits that prepare draws: those for which the recipe names no shards of the user's own."""
    return [split for split in SPLITS if getattr(recipe.data, split) is None]


def split_fingerprint(recipe: Recipe, split: Split) -> str:
    """Return a digest of the shards of one split: how many samples the others have is no part of it."""
    named = getattr(recipe.data, split)
    if isinstance(named, tuple):
        # Their weights are part of the trainings' order: the latents do not depend on them.
        return digest({"sources": [[source.name, source.uri] for source in named], **_version(recipe)})
    prepared = recipe.prepare or recipe.prepare_classes or recipe.prepare_metadata
    if named is not None or prepared is None or "prepare" not in recipe.stages:
        return digest({"uri": named, **_version(recipe)})
    others = {f"num_{other}" for other in SPLITS if other != split}
    if recipe.prepare_metadata is not None and recipe.prepare_metadata.num_train is None:
        others = set()  # training takes what the others leave
    if recipe.prepare_metadata is not None and split == "alignment":
        others.discard("num_evaluate")  # it lies before those
    return digest({"settings": _without(_source(recipe, split), others), "format": _FORMAT})


def _version(recipe: Recipe) -> dict[str, str]:
    return {} if recipe.data.version is None else {"version": recipe.data.version}


def _rules(recipe: Recipe) -> dict[str, Any]:
    return {"rules": recipe.sample_rules.to_json()} if recipe.sample_rules else {}


def _source(recipe: Recipe, *splits: Split) -> dict[str, Any]:
    """Return what samples are drawn from: the settings, and files by their content, wherever they lie."""
    if recipe.prepare_metadata is not None:
        return _without(_dump(recipe.prepare_metadata), ONLY_DOWNLOADING) | _version(recipe)
    settings: dict[str, Any] = _dump(recipe.prepare or recipe.prepare_classes)
    if recipe.prepare_classes is None:
        return settings
    try:
        files = {split: files_digest(recipe.prepare_classes, split) for split in splits}
    except DataError:
        return settings  # the stage has words for what is missing
    return _without(settings, {"path"}) | {"files": files}


def _teacher(recipe: Recipe) -> str:
    return fingerprint(recipe, "teacher") if recipe.teacher is None else _model(recipe.teacher)


def _model(uri: str) -> str:
    try:
        folder = fetch_model(uri) if uri.startswith("asset:") else Path(uri).expanduser()
    except FewstepError:
        return uri
    # A folder on disk may be saved again under the same name: its weights are part of what it is.
    return folder_digest(folder) if folder.is_dir() else uri


@lru_cache
def folder_digest(folder: Path) -> str:
    """Return the SHA-256 over names and content of the files of a model folder, in hex."""
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.suffix in (".safetensors", ".bin", ".json", ".txt"):
            total.update(str(file.relative_to(folder)).encode())
            with file.open("rb") as opened:
                total.update(hashlib.file_digest(opened, "sha256").digest())
    return total.hexdigest()


_WATCHING = {*ONLY_WATCHING, *ONLY_ROUNDING, "batch_size", "num_threads"}


def _dump(settings: Any) -> Any:
    return _without(settings.model_dump(mode="json"), _WATCHING)


def _without(value: Any, keys: set[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without(inner, keys) for key, inner in value.items() if key not in keys}
    return value

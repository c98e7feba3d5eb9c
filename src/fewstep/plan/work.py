"""What a recipe computes, stage by stage and rung by rung: trainings and their network calls, the driver's passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fewstep.distill.jumps import plan_jumps
from fewstep.distill.settings import LadderKind, student_kind, student_label
from fewstep.evaluate.classes.compare import table_specs
from fewstep.evaluate.compare import row_specs
from fewstep.models.latent import pictures_at_once
from fewstep.models.lora import LoraSettings
from fewstep.plan.network import Network, networks_of_parts
from fewstep.plan.shapes import Shape
from fewstep.recipe import Recipe, StageName
from fewstep.stage_settings import GuidanceStage, ProgressiveStage
from fewstep.train.settings import TrainSettings

#: What the training of the guidance stage is called in a plan.
STAGE_ONE = "stage one"


@dataclass(frozen=True)
class Training:
    """One training and the network calls of its updates.

    Attributes:
        stage: the stage that it belongs to.
        name: as its run is called.
        settings: updates, batch size and the rest.
        network: what is trained.
        rows: rows that a sample makes in the trained network: 2 where both branches are trained.
        teacher: the frozen network that is called; None: there is none.
        teacher_rows: rows of one call for a sample: 2 under classifier-free guidance.
        teacher_calls: calls in one update.
        features: what compares outputs instead of the mean square (error: features): the teacher's encoder.
        adapters: the adapters that alone are trained; None: the whole network is.
        text: the frozen text encoders that make the embeddings of each sample; None: the shards hold them.
        vae: the frozen VAE that makes the latents of each sample; None: the shards hold them, or there are none.
        vae_pictures: pictures that it encodes for a sample: 2 for inpainting, with and without the hole.
        bfloat16_encoders: whether VAE and text encoders run under autocast (encode.precision).
        reads: "latents", "pictures", "latents_without_text", or "latents_alone" (without any condition).
        group_rows: rows of one shape, which a micro-batch must divide; None: all are of one.
    """

    stage: StageName
    name: str
    settings: TrainSettings
    network: Network
    rows: int = 1
    teacher: Network | None = None
    teacher_rows: int = 1
    teacher_calls: int = 0
    features: Network | None = None
    adapters: LoraSettings | None = None
    text: Network | None = None
    vae: Network | None = None
    vae_pictures: int = 0
    bfloat16_encoders: bool = False
    reads: str = "latents"
    group_rows: int | None = None


@dataclass(frozen=True)
class Passes:
    """Forward passes that the driver makes by itself, on one GPU, in float32.

    Attributes:
        stage: the stage that they belong to.
        name: what is done, in words.
        each: (network, passes for a sample).
        held: networks whose weights lie on the GPU meanwhile.
        at_once: (network, most rows that it gets in one pass).
        batch_key: the recipe's key that the rows follow.
        samples: how many samples; None: the training samples.
    """

    stage: StageName
    name: str
    each: tuple[tuple[Network, float], ...]
    held: tuple[Network, ...]
    at_once: tuple[tuple[Network, int], ...]
    batch_key: str
    samples: int | None = None


Work = Training | Passes


def work_of(recipe: Recipe, shape: Shape) -> list[Work]:
    """Return what the stages of a recipe compute, in order; prepare and register compute nothing of note."""
    work: list[Work] = []
    for stage in recipe.stages:
        if stage == "teacher":
            work += _teacher(recipe, shape)
        elif stage == "encode":
            work += _encode(recipe, shape)
        elif stage == "convert":
            assert recipe.convert is not None
            work.append(Training("convert", "convert", recipe.convert.train, Network.of(shape), reads=_reads(shape)))
        elif stage == "guidance":
            assert recipe.guidance is not None
            work.append(_guidance(recipe.guidance, shape))
        elif stage == "progressive":
            work += _progressive(recipe, shape)
        elif stage == "evaluate":
            work.append(_evaluate(recipe, shape))
    if recipe.encode.buckets is not None and shape.vae is not None and "encode" in recipe.stages:
        # Rows of a micro-batch have one shape, so it is a stream's group where the recipe does not say less.
        work = [_in_groups(each, recipe.stream.num_streams) for each in work]
    changes = _made_in_training(recipe, shape)
    return [
        replace(each, **changes) if isinstance(each, Training) and each.stage != "teacher" else each for each in work
    ]


def _made_in_training(recipe: Recipe, shape: Shape) -> dict[str, Any]:
    """Return the fields of a training in which it differs from one whose shards hold latents and embeddings."""
    settings = recipe.encode
    if "encode" not in recipe.stages:
        return {}
    text = Network.of(shape, "text_encoders") if shape.text_encoders else None
    if shape.vae is not None and not settings.store_latents:
        return {
            "reads": "pictures",
            "text": text,
            "vae": Network.of(shape, "vae_encoder"),
            "vae_pictures": _pictures_of_a_sample(shape),
            "bfloat16_encoders": settings.precision == "bfloat16",
        }
    if text is not None and not settings.store_text:
        return {"reads": "latents_without_text", "text": text}
    return {}


def _in_groups(work: Work, num_streams: int) -> Work:
    if not isinstance(work, Training) or work.stage == "teacher":
        return work
    settings = work.settings
    group = max(1, settings.global_batch_size // num_streams)
    size = settings.micro_batch_size or group
    return replace(work, settings=settings.model_copy(update={"micro_batch_size": size}), group_rows=group)


def _reads(shape: Shape) -> str:
    return "pictures" if shape.vae is None else "latents"


def _embedding_dim(settings: GuidanceStage) -> int | None:
    w_min, w_max = settings.weights
    return None if w_min == w_max else settings.embedding_dim


def rung_name(ladder: LadderKind, steps: int, *, w: float | None) -> str:
    """Return what a training of a ladder is called in a plan."""
    return student_label(ladder, steps, w=w) + (" step" if steps == 1 else " steps")


def _guidance(settings: GuidanceStage, shape: Shape) -> Training:
    network = Network.of(shape)
    return Training(
        "guidance",
        STAGE_ONE,
        settings.train,
        network.with_weight(_embedding_dim(settings)),
        teacher=network,
        teacher_rows=2,
        teacher_calls=1,
        features=Network.of(shape, "encoder") if settings.error == "features" else None,
        adapters=settings.lora,
        reads=_reads(shape),
    )


def _progressive(recipe: Recipe, shape: Shape) -> Iterator[Training]:
    settings, guidance = recipe.progressive, recipe.guidance
    assert settings is not None
    assert guidance is not None
    of_stage_one = Network.of(shape, embedding_dim=_embedding_dim(guidance))
    for ladder in settings.kinds:
        for w in settings.single_w if ladder == "single_w" else (None,):
            # These ladders begin with the guided pair; naive students stay a pair, those of a single w do not.
            network = Network.of(shape) if ladder in ("naive", "single_w") else of_stage_one
            for steps in settings.ladder:
                taught_by, _ = settings.teacher_of(steps)
                guided = ladder == "naive" or (ladder == "single_w" and taught_by is None)
                yield Training(
                    "progressive",
                    rung_name(ladder, steps, w=w),
                    settings.rung(steps),
                    network,
                    rows=2 if ladder == "naive" else 1,
                    teacher=network,
                    teacher_rows=2 if guided else 1,
                    teacher_calls=_teacher_calls(settings, ladder, steps),
                    features=Network.of(shape, "encoder") if settings.error == "features" else None,
                    adapters=settings.lora,
                    reads=_reads(shape),
                )


def _teacher_calls(settings: ProgressiveStage, ladder: LadderKind, steps: int) -> int:
    """Return the calls of the teacher in an update: as many as its longest row needs."""
    jumps = plan_jumps(
        student_kind(ladder),
        steps,
        teacher_steps=settings.teacher_of(steps)[1],
        start_times=settings.start_times.get(steps) if ladder == "deterministic" else None,
    )
    calls = max(jumps.teacher_steps)
    if settings.trajectory_inputs and ladder == "deterministic":
        calls += jumps.grid_steps // jumps.stride
    return calls


def _encode(recipe: Recipe, shape: Shape) -> Iterator[Passes]:
    if shape.vae is None:
        return
    encoders = [(Network.of(shape, "vae_encoder"), float(_pictures_of_a_sample(shape)))]
    if shape.text_encoders:
        encoders.append((Network.of(shape, "text_encoders"), 1.0))
    if recipe.encode.store_latents:
        yield _encoding(recipe, shape, "encode", "encode", encoders)
    else:
        yield replace(
            _encoding(recipe, shape, "encode", "held-out pictures", encoders), samples=_held_out_samples(recipe)
        )


def _pictures_of_a_sample(shape: Shape) -> int:
    # An inpainting model also gets the latents of the picture with its hole.
    return 2 if "masked_latents" in shape.conditions else 1


def _held_out_samples(recipe: Recipe) -> int:
    """Return how many pictures are held out; of shards that the recipe names, as many as are judged, an assumption."""
    prepared = recipe.prepare or recipe.prepare_classes or recipe.prepare_metadata
    if prepared is None or recipe.data.evaluate is not None:
        return recipe.evaluate.num_prompts
    return prepared.num_evaluate


def _encoding(
    recipe: Recipe, shape: Shape, stage: StageName, name: str, encoders: Sequence[tuple[Network, float]]
) -> Passes:
    return Passes(
        stage,
        name,
        tuple(encoders),
        held=networks_of_parts(shape),
        at_once=tuple((network, recipe.encode.batch_size) for network, _ in encoders),
        batch_key="encode.batch_size",
    )


def _evaluate(recipe: Recipe, shape: Shape) -> Passes:
    if recipe.evaluate_classes is not None:
        classes = recipe.evaluate_classes
        kinds = recipe.progressive.kinds if recipe.progressive is not None else ()
        singles = recipe.progressive if "single_w" in kinds else None
        table = table_specs(
            reference_steps=classes.reference_steps,
            weights=classes.weights,
            steps=classes.steps,
            single_w=() if singles is None else [w for w in classes.weights if w in singles.single_w],
            stochastic="stochastic" in kinds,
        )
        samples, rows = classes.num_pictures, len(table)
        batch, key = classes.compare.batch_size, "evaluate_classes.compare.batch_size"
        calls = sum(row.num_inference_steps * (1 if _is_student(row.method) or row.w == 0 else 2) for row in table)
    else:
        specs = row_specs(recipe.evaluate)
        samples, rows = recipe.evaluate.num_prompts, len(specs)
        batch, key = recipe.evaluate.batch_size, "evaluate.batch_size"
        calls = sum(row.num_inference_steps * (1 if _is_student(row.method) else 2) for row in specs)
    batch = min(batch, samples)
    each = [(Network.of(shape), float(calls))]
    at_once = [(Network.of(shape), 2 * batch)]
    if shape.vae is not None:
        decoder = Network.of(shape, "vae_decoder")
        each.append((decoder, float(rows)))
        at_once.append((decoder, min(batch, pictures_at_once(shape.resolution, shape.resolution))))
        at_once.append((Network.of(shape, "vae_encoder"), batch))
    # The teacher and, one after the other, the students.
    held = (*networks_of_parts(shape), Network.of(shape))
    return Passes("evaluate", "evaluate", tuple(each), held, tuple(at_once), key, samples)


def _is_student(method: str) -> bool:
    return method.startswith("student")


def _teacher(recipe: Recipe, shape: Shape) -> Iterator[Work]:
    classes = recipe.train_class_teacher
    if classes is not None:
        if classes.autoencoder_train is not None:
            yield Training(
                "teacher", "autoencoder", classes.autoencoder_train, Network.of(shape, "autoencoder"), reads="pictures"
            )
        yield Training("teacher", "teacher", classes.train, Network.of(shape), reads=_reads(shape))
        return
    settings = recipe.train_teacher
    assert settings is not None
    if settings.autoencoder_train is not None:
        yield Training(
            "teacher", "autoencoder", settings.autoencoder_train, Network.of(shape, "autoencoder"), reads="pictures"
        )
    encoder = (Network.of(shape, "vae_encoder"), 1.0)
    yield _encoding(recipe, shape, "teacher", "encode for the teacher", [encoder])
    yield Training("teacher", "teacher", settings.train, Network.of(shape, "denoiser_and_text"), reads="latents_alone")

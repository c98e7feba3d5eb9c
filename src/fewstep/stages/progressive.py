"""progressive: stage two, the halving ladder; one student is kept for every step count."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from PIL import Image

from fewstep.diffusion import ddim
from fewstep.distill import LossWeight, ProgressiveObjective
from fewstep.models import StudentInfo, initial_noise, load_parts, student_model
from fewstep.stages.batches import latent_batches
from fewstep.stages.context import StageContext, rung_fingerprint
from fewstep.stages.device import driver_device
from fewstep.stages.guidance import TeacherSource, export_student, held_out_samples
from fewstep.storage import Storage, join
from fewstep.tracking.fetch import fetch_model
from fewstep.tracking.lineage import lineage
from fewstep.train.job import TrainJob
from fewstep.train.run import finished_result, run_training, trained_by

_GRID_PROMPTS = 16


def progressive(context: StageContext) -> dict[str, Any]:
    """Train every rung from the one before it; each is a run of its own, with a picture grid."""
    recipe, storage = context.recipe, context.storage
    settings = recipe.progressive
    assert settings is not None
    assert recipe.guidance is not None
    teacher = TeacherSource(context.teacher(), storage, context.tracker.settings)
    stage_one = context.artifact("guidance").facts
    before, fingerprint = stage_one["training"]["export_uri"], stage_one["fingerprint"]
    students: dict[str, Any] = {}
    reused, seconds = True, 0.0
    for steps in settings.ladder:
        fingerprint = rung_fingerprint(recipe, steps, before=fingerprint)
        info = StudentInfo(
            stage="progressive",
            num_inference_steps=steps,
            w_min=recipe.guidance.w_min,
            w_max=recipe.guidance.w_max,
            guidance_scale=recipe.evaluate.guidance_scale,
            teacher=teacher.uri,
            fingerprint=fingerprint,
        )
        train = settings.rung(steps)
        name = f"{steps} step{'s' if steps > 1 else ''}"
        job = TrainJob(
            name=name,
            fingerprint=info.fingerprint,
            objective=partial(_objective, settings.loss_weight, before, info, storage),
            batches=partial(
                latent_batches,
                context.latents("train"),
                storage=storage,
                stream=recipe.stream,
                global_batch_size=train.global_batch_size,
                # Another order for each rung: the first samples are no more seen than the others.
                seed=recipe.seed + steps,
            ),
            export=partial(export_student, teacher, info),
            settings=train,
            seed=recipe.seed + steps,
            num_streams=recipe.stream.num_streams,
            tags=lineage(),
        )
        uri = join(storage.root, "students", f"{name.replace(' ', '-')}-{info.fingerprint[:16]}")
        with context.tracker.run(
            f"progressive {name}", key=f"{recipe.name}/{recipe.digest()}/{info.fingerprint}", parent=context.parent
        ) as run:
            run.log_params(train)
            reused = reused and finished_result(job, storage=storage, uri=uri) is not None
            result = run_training(job, cluster=recipe.cluster, storage=storage, uri=uri, tracker=run.handle())
            # A rung that an earlier recipe trained has its curves there, and here its end.
            run.log_metrics({f"final_{name}": value for name, value in result.figures.items()}, step=result.updates)
            run.log_image(_grid(context, result.export_uri, steps), f"samples_{steps}", step=result.updates)
        before, seconds = result.export_uri, seconds + result.seconds
        students[str(steps)] = {
            "uri": result.export_uri,
            "training": result.to_json(),
            "fingerprint": info.fingerprint,
            "code": trained_by(storage=storage, uri=uri),
        }
    return {"students": students, "training_seconds": seconds, "reused": reused}


def _objective(
    loss_weight: LossWeight, before: str, info: StudentInfo, storage: Storage, device: torch.device
) -> ProgressiveObjective:
    parts = load_parts(fetch_model(before, storage=storage)).to(device)
    assert info.num_inference_steps is not None
    return ProgressiveObjective(
        parts.unet,
        schedule=parts.schedule,
        prediction_type=parts.prediction_type,
        num_inference_steps=info.num_inference_steps,
        w_min=info.w_min,
        w_max=info.w_max,
        loss_weight=loss_weight,
    )


def _grid(context: StageContext, student_uri: str, steps: int) -> Image.Image:
    """Return 4 × 4 pictures of the first held-out prompts, each from its own fixed noise."""
    device = driver_device(context.recipe.cluster)
    parts = load_parts(fetch_model(student_uri, storage=context.storage)).to(device)
    held_out = held_out_samples(context.storage, context.latents("evaluate"), _GRID_PROMPTS)
    embeddings = parts.encode_prompts([sample["caption"] for sample in held_out])
    latents = ddim(
        student_model(parts.unet, embeddings, context.recipe.evaluate.guidance_scale - 1),
        initial_noise(range(len(held_out)), parts.latent_shape, device=device),
        schedule=parts.schedule,
        prediction_type=parts.prediction_type,
        num_inference_steps=steps,
    )
    pictures = parts.decode(latents).permute(0, 2, 3, 1).cpu().numpy()
    side = parts.resolution
    sheet = Image.new("RGB", (4 * side, 4 * side), "white")
    for number, picture in enumerate(pictures):
        sheet.paste(Image.fromarray(picture), (number % 4 * side, number // 4 * side))
    return sheet

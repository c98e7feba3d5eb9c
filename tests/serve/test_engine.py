"""The engine with real tiny students: what a picture depends on, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.diffusion.schedulers import StochasticDDIMScheduler
from fewstep.errors import ModelError, SamplingError
from fewstep.models import StudentInfo, TextToImageParts, copy_student, load_parts, read_student_info
from fewstep.serve.catalog import ImageRequest
from fewstep.serve.engine import Engine, Student, load_engine, load_student, make_card
from fewstep.serve.sample import sample_images, weight_in_interval
from fewstep.serve.settings import ServeSettings
from fewstep.tracking.settings import TrackingSettings
from tiny import tiny_student_folder, tiny_teacher_folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("students")
    return [tiny_student_folder(root / f"emoji-{n}", num_inference_steps=n) for n in (4, 1)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load(folders: list[Path], **options: object) -> Engine:
    students = []
    for folder in folders:
        parts, info = load_parts(folder), read_student_info(folder)
        assert info is not None
        students.append(Student(make_card("emoji", parts, info, version="3"), parts, info))
    return Engine(students, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def engine(folders: list[Path]) -> Engine:
    return load(folders)


def request(seed: int, **changes: object) -> ImageRequest:
    return ImageRequest(**({"prompt": "a red apple", "seed": seed} | changes))  # type: ignore[arg-type]


def test_pictures_come_in_the_order_of_the_requests_whatever_their_steps(engine: Engine) -> None:
    steps = [4, 1, 4, 1, 4]
    before = engine.batch_sizes.copy()
    images = engine.generate([request(seed, num_inference_steps=n) for seed, n in enumerate(steps)])
    assert [image.num_inference_steps for image in images] == steps
    assert [image.seed for image in images] == list(range(5))
    assert engine.batch_sizes - before == {3: 1, 2: 1}
    for seed, image in enumerate(images):
        alone = engine.generate([request(seed, num_inference_steps=steps[seed])])[0]
        # Measured on float32: batches of different sizes differ by about 1e-6 before rounding.
        assert np.abs(alone.pixels.astype(int) - image.pixels.astype(int)).max() <= 1


def test_with_padded_batches_a_picture_is_the_same_to_the_last_bit(folders: list[Path]) -> None:
    engine = load(folders, max_batch_size=4, pad_batches=True)
    # Compared before rounding to 8 bits, which would hide a difference.
    seen: list[torch.Tensor] = []
    hook = engine.students[0].parts.vae.decoder.register_forward_hook(lambda m, a, out: seen.append(out))
    together = engine.generate([request(seed, prompt=f"apple {seed}") for seed in range(4)])
    alone = [engine.generate([request(seed, prompt=f"apple {seed}")])[0] for seed in range(4)]
    hook.remove()
    assert all(torch.equal(seen[0][k], seen[1 + k][0]) for k in range(4))
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(together, alone, strict=True))
    assert engine.batch_sizes == {4: 1, 1: 4}


def test_the_same_request_gives_the_same_bits_and_seed_prompt_and_guidance_matter(engine: Engine) -> None:
    base = engine.generate([request(7)])[0].pixels
    assert np.array_equal(base, engine.generate([request(7)])[0].pixels)
    for other in (request(8), request(7, prompt="two birds on blue"), request(7, guidance_scale=1.0)):
        assert not np.array_equal(base, engine.generate([other])[0].pixels)


def test_diffusers_draws_the_same_picture(engine: Engine) -> None:
    parts = engine.students[0].parts
    pipeline = parts.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        "a red apple",
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(7)],
        output_type="np",
    ).images[0]
    ours = engine.generate([request(7, guidance_scale=3.0)])[0].pixels
    assert np.abs(ours.astype(int) - np.round(theirs * 255).astype(int)).max() <= 1


def test_a_large_request_is_split_into_batches(engine: Engine) -> None:
    before = engine.batch_sizes.copy()
    assert len(engine.generate([request(seed) for seed in range(11)])) == 11
    assert engine.batch_sizes - before == {8: 1, 3: 1}


def test_a_long_prompt_is_cut_and_counted(engine: Engine) -> None:
    image = engine.generate([request(1, prompt="apple " * 50)])[0]
    assert image.prompt_tokens == 14
    assert image.prompt_tokens_cut > 0
    assert engine.generate([request(1, prompt="apple")])[0].prompt_tokens_cut == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": " \n"}, "prompt is empty"),
        ({"num_inference_steps": 3}, "use 1, 4"),
        ({"guidance_scale": 7.5}, "outside 1 … 7"),
        ({"model": "other"}, "use one of emoji"),
    ],
)
def test_a_bad_request_is_refused_before_anything_is_drawn(
    engine: Engine, changes: dict[str, object], words: str
) -> None:
    before = engine.batch_sizes.copy()
    with pytest.raises(SamplingError, match=words):
        engine.generate([request(1), request(1, **changes)])
    assert engine.batch_sizes == before


def test_students_of_one_family_share_what_is_equal(engine: Engine, folders: list[Path]) -> None:
    first, second = (student.parts for student in engine.students)
    assert first.vae is second.vae
    assert first.text_encoder is second.text_encoder
    assert first.unet is not second.unet


def test_students_of_different_families_keep_their_own(folders: list[Path], tmp_path: Path) -> None:
    other = tiny_student_folder(tmp_path / "other", num_inference_steps=2, seed=5)
    first, second = (student.parts for student in load([folders[0], other]).students)
    assert first.vae is not second.vae
    assert first.text_encoder is not second.text_encoder


def test_two_students_that_no_request_could_tell_apart_are_refused(folders: list[Path]) -> None:
    with pytest.raises(ModelError, match="made for 4 steps"):
        load([folders[0], folders[0]])


def test_engine_from_settings_names_models_by_their_folders(folders: list[Path]) -> None:
    settings = ServeSettings(models=tuple(str(folder) for folder in folders), dtype="float32")
    engine = load_engine(settings, storage=None, tracking=TrackingSettings())
    assert [card.label for card in engine.catalog.students] == ["emoji-4", "emoji-1"]
    assert engine.catalog.students[0].size == "16x16"
    assert engine.catalog.students[0].guidance_scale_range == (1.0, 7.0)
    assert engine.generate([request(1)])[0].guidance_scale == 4.0


def test_bfloat16_is_close_to_float32(folders: list[Path], engine: Engine) -> None:
    settings = ServeSettings(models=(str(folders[0]),), dtype="bfloat16")
    low = load_engine(settings, storage=None, tracking=TrackingSettings()).generate([request(3)])[0].pixels
    full = engine.generate([request(3)])[0].pixels
    assert np.abs(low.astype(int) - full.astype(int)).mean() < 4


def test_a_teacher_is_not_served(tmp_path: Path) -> None:
    folder = tiny_teacher_folder(tmp_path / "teacher")
    with pytest.raises(ModelError, match="no few-step student"):
        load_student(str(folder), storage=None, tracking=TrackingSettings())


@pytest.mark.parametrize(
    ("kind", "words"), [("encoder", "goes from the picture to noise"), ("naive", "two evaluations a step")]
)
def test_students_that_cannot_draw_in_one_evaluation_a_step_are_not_served(
    folders: list[Path], tmp_path: Path, kind: str, words: str
) -> None:
    folder = told_otherwise(folders[0], tmp_path / "other", kind=kind)
    with pytest.raises(ModelError, match=f"cannot be served: .*{words}: serving needs one that is deterministic or"):
        load_student(str(folder), storage=None, tracking=TrackingSettings())


def test_a_stochastic_student_draws_diffusers_picture_of_a_seed(folders: list[Path], tmp_path: Path) -> None:
    folder = told_otherwise(folders[0], tmp_path / "emoji-4", kind="stochastic")
    engine = Engine([load_student(str(folder), storage=None, tracking=TrackingSettings())])
    pipeline = engine.students[0].parts.pipeline()
    pipeline.scheduler = StochasticDDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np", "generator": generators}
    theirs = pipeline(["a red apple"] * 2, **settings).images
    # Each picture in other company: fresh noise belongs to the seed, not to the row.
    ours = [
        engine.generate([request(1), request(7, guidance_scale=3.0)])[1],
        engine.generate([request(8, guidance_scale=3.0), request(7)])[0],
    ]
    for own, stock in zip(ours, theirs, strict=True):
        assert np.abs(own.pixels.astype(int) - np.round(stock * 255).astype(int)).max() <= 1
    images = sample_images(
        engine.students[0].parts,
        prompts=["a red apple"] * 2,
        seeds=[7, 8],
        num_inference_steps=4,
        guidance_scale=3.0,
        info=engine.students[0].info,
    )
    assert np.abs(np.asarray(images[1]).astype(int) - ours[1].pixels).max() <= 1
    deterministic = load(folders[:1]).generate([request(7, guidance_scale=3.0)])[0]
    assert not np.array_equal(deterministic.pixels, ours[0].pixels)


def test_the_default_of_a_student_of_one_weight_is_that_weight(folders: list[Path], tmp_path: Path) -> None:
    folder = told_otherwise(folders[0], tmp_path / "emoji-4", w_min=2.0, w_max=2.0, guidance_scale=4.0)
    student = load_student(str(folder), storage=None, tracking=TrackingSettings())
    assert student.card.guidance_scale_default == 3.0
    assert Engine([student]).generate([request(1)])[0].guidance_scale == 3.0


def told_otherwise(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy of a student that says other things of itself."""
    info = read_student_info(folder)
    assert info is not None
    copy_student(folder, target, replace(info, **changes))
    return target


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> TextToImageParts:
    return load_parts(tiny_teacher_folder(tmp_path_factory.mktemp("teacher") / "teacher"))


def pictures(parts: TextToImageParts, info: StudentInfo | None = None, **options: Any) -> np.ndarray:
    settings: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 4.0, "info": info} | options
    return np.stack([np.asarray(image) for image in sample_images(parts, prompts=["an emoji"], seeds=[5], **settings)])


def test_a_negative_prompt_takes_the_null_prompts_place(teacher: TextToImageParts, folders: list[Path]) -> None:
    plain = pictures(teacher)
    assert np.array_equal(pictures(teacher, negative_prompt=""), plain)
    assert not np.array_equal(pictures(teacher, negative_prompt="two birds on blue"), plain)
    pipeline = teacher.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 4, "guidance_scale": 4.0, "generator": [torch.Generator().manual_seed(5)]}
    stock = pipeline(["an emoji"], negative_prompt=["two birds on blue"], output_type="np", **settings).images
    own = pictures(teacher, negative_prompt="two birds on blue").astype(int)
    assert np.abs(own - np.round(stock * 255).astype(int)).max() <= 1
    with pytest.raises(SamplingError, match="no effect at guidance_scale=1"):
        pictures(teacher, negative_prompt="birds", guidance_scale=1.0)
    student, info = load_parts(folders[0]), read_student_info(folders[0])
    assert info is not None
    for made_for in (info, replace(info, w_min=3.0, w_max=3.0)):
        with pytest.raises(SamplingError, match="a negative prompt has no effect on this model"):
            pictures(student, made_for, negative_prompt="birds")


def test_guidance_in_an_interval(teacher: TextToImageParts, folders: list[Path]) -> None:
    for parts, info in ((teacher, None), (load_parts(folders[0]), read_student_info(folders[0]))):
        everywhere = pictures(parts, info, guidance_interval=(0.0, 1.0))
        assert np.array_equal(everywhere, pictures(parts, info))
        inside = pictures(parts, info, guidance_interval=(0.4, 0.8))
        assert not np.array_equal(inside, everywhere)
        assert not np.array_equal(inside, pictures(parts, info, guidance_scale=1.0))
        with pytest.raises(SamplingError, match=r"no step begins within .*begin at t = 1, 0.75, 0.5, 0.25; widen it"):
            pictures(parts, info, guidance_interval=(0.6, 0.7))
        with pytest.raises(SamplingError, match=r"0\.8 … 0\.4 must be within 0 … 1"):
            pictures(parts, info, guidance_interval=(0.8, 0.4))


def test_weights_outside_an_interval_are_the_least_trained(folders: list[Path]) -> None:
    parts, info = load_parts(folders[0]), read_student_info(folders[0])
    assert info is not None
    from_one = replace(info, w_min=1.0)
    t = torch.tensor([1.0, 0.75, 0.5, 0.25])
    settings: dict[str, Any] = {"guidance_scale": 4.0, "interval": (0.4, 0.8), "num_inference_steps": 4}
    assert weight_in_interval(parts, from_one, **settings)(t).tolist() == [1, 3, 3, 1]
    assert weight_in_interval(parts, from_one, extrapolate=True, **settings)(t).tolist() == [0, 3, 3, 0]
    assert weight_in_interval(parts, info, **settings)(t).tolist() == [0, 3, 3, 0]
    with pytest.raises(SamplingError, match="its one weight, w = 3, is built in"):
        weight_in_interval(parts, replace(info, w_min=3.0, w_max=3.0), **settings)


def test_a_student_of_one_weight_takes_one_evaluation_and_an_encoder_none(
    teacher: TextToImageParts, folders: list[Path]
) -> None:
    info = read_student_info(folders[0])
    assert info is not None
    single, sizes = replace(info, w_min=3.0, w_max=3.0), []
    hook = teacher.unet.register_forward_hook(lambda m, a, out: sizes.append(len(a[0])))
    pictures(teacher, single)
    pictures(teacher, replace(info, kind="naive"))
    hook.remove()
    assert sizes == [1] * 4 + [2] * 4
    with pytest.raises(SamplingError, match=r"guidance_scale=5 has no effect .* the one weight w = 3: use 4 or leave"):
        pictures(teacher, single, guidance_scale=5.0, extrapolate=True)
    with pytest.raises(SamplingError, match="from the picture to noise: drawing from a prompt needs"):
        pictures(teacher, replace(info, kind="encoder"))


def test_sampling_without_a_server_is_the_same_picture(folders: list[Path], engine: Engine) -> None:
    parts, info = load_parts(folders[0]), read_student_info(folders[0])
    images = sample_images(
        parts, prompts=["a red apple"] * 2, seeds=[7, 8], num_inference_steps=4, guidance_scale=4.0, info=info
    )
    served = engine.generate([request(7), request(8)])
    assert all(np.array_equal(np.asarray(a), b.pixels) for a, b in zip(images, served, strict=True))
    with pytest.raises(SamplingError, match="made for 4"):
        sample_images(parts, prompts=["a"], seeds=[1], num_inference_steps=2, guidance_scale=4.0, info=info)
    with pytest.raises(SamplingError, match="prompt is empty"):
        sample_images(parts, prompts=[""], seeds=[1], num_inference_steps=4, guidance_scale=4.0, info=info)
    with pytest.raises(SamplingError, match="one seed for each"):
        sample_images(parts, prompts=["a"], seeds=[1, 2], num_inference_steps=4, guidance_scale=4.0, info=info)


def test_sampling_with_a_teacher_uses_guidance(tmp_path: Path) -> None:
    parts = load_parts(tiny_teacher_folder(tmp_path / "teacher"))
    calls: list[int] = []
    hook = parts.unet.register_forward_hook(lambda m, a, out: calls.append(a[0].shape[0]))
    sample_images(parts, prompts=["a red apple"], seeds=[7], num_inference_steps=5, guidance_scale=3.0)
    hook.remove()
    assert calls == [2] * 5

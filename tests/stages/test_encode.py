"""Pictures and captions become latent shards: broken samples are counted, a killed run goes on where it was."""

from __future__ import annotations

import io
import json
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fewstep.data.buckets import BucketSettings
from fewstep.data.counts import SampleCounts
from fewstep.data.latents import decode_latents
from fewstep.data.pictures import decode_picture
from fewstep.data.samples import CaptionSource, FieldFilter, SampleRules
from fewstep.data.shards import read_index, write_shards
from fewstep.data.source import iterate_samples
from fewstep.errors import DataError, ModelError, RecipeError
from fewstep.models import TextToImageParts
from fewstep.stages.encode import check_takes_buckets, check_takes_sizes
from fewstep.stages.encode_shards import EncodeTask, Encoding, ShardEncoder, encode_shards
from fewstep.storage import Storage, join
from tiny import tiny_inpainting, tiny_sdxl, tiny_teacher
from tiny_classes import tiny_class_model


@pytest.fixture(scope="module")
def parts() -> TextToImageParts:
    return tiny_teacher()


def _sample(number: int) -> dict[str, Any]:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (number * 20 % 256, 90, 30)).save(file, format="PNG")
    return {"__key__": f"{number:04d}", "png": file.getvalue(), "txt": f"picture {number}".encode()}


def _encode(source: str, target: str, parts: TextToImageParts, storage: Storage, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"max_bad_share": 0.5, "label": "test"}
    settings |= {name: changes.pop(name) for name in ("max_bad_share", "encoders") if name in changes}
    encoding = Encoding(batch_size=3, **changes)
    return encode_shards(source, target, parts=parts, storage=storage, encoding=encoding, **settings)


def _latents(uri: str, storage: Storage) -> list[dict[str, Any]]:
    counts = SampleCounts(max_bad_share=0.0)
    return list(
        iterate_samples(read_index(uri, storage=storage).shards, storage=storage, decode=decode_latents, counts=counts)
    )


def test_latents_and_embeddings_are_the_teachers_own(
    parts: TextToImageParts, storage: Storage, bucket_uri: str
) -> None:
    source, target = join(bucket_uri, "pictures"), join(bucket_uri, "latents")
    samples = [_sample(number) for number in range(8)]
    written = write_shards(samples, source, samples_per_shard=5, storage=storage)
    facts = _encode(source, target, parts, storage)
    assert facts["uri"] == target
    assert (facts["num_samples"], facts["num_shards"], facts["skipped"]) == (8, 2, {})
    assert facts["source_digest"] == written.digest
    latents = _latents(target, storage)
    assert [sample["caption"] for sample in latents] == [f"picture {number}" for number in range(8)]
    pixels = torch.stack([decode_picture(sample, resolution=16)["pixels"] for sample in samples])
    mean, std = parts.encode_pictures(pixels)
    text = parts.encode_prompts([f"picture {number}" for number in range(8)])
    for name, expected in (("latent_mean", mean), ("latent_std", std), ("text", text)):
        stored = torch.stack([sample[name].float() for sample in latents])
        torch.testing.assert_close(stored, expected, rtol=2e-3, atol=2e-3)  # half precision


def test_broken_samples_are_counted_and_left_out(parts: TextToImageParts, storage: Storage, bucket_uri: str) -> None:
    source, target = join(bucket_uri, "pictures"), join(bucket_uri, "latents")
    samples = [_sample(number) for number in range(12)]
    samples[1]["png"] = samples[1]["png"][:40]
    del samples[6]["txt"]
    samples[7]["txt"] = b"  "
    write_shards(samples, source, samples_per_shard=4, storage=storage)
    facts = _encode(source, target, parts, storage)
    assert facts["num_samples"] == 9
    assert sum(facts["skipped"].values()) == 3
    kept = [sample["caption"] for sample in _latents(target, storage)]
    assert kept == [f"picture {number}" for number in range(12) if number not in (1, 6, 7)]
    # A second call reads the records, and tells the same.
    assert _encode(source, target, parts, storage) == facts
    with pytest.raises(DataError, match=r"max_bad_share"):
        _encode(source, join(bucket_uri, "strict"), parts, storage, max_bad_share=0.1)


def test_a_run_that_was_killed_goes_on_at_the_shard_it_had_reached(
    parts: TextToImageParts, storage: Storage, bucket_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = join(bucket_uri, "pictures"), join(bucket_uri, "latents")
    samples = [_sample(number) for number in range(12)]
    samples[2]["png"] = b"broken"
    write_shards(samples, source, samples_per_shard=4, storage=storage)
    real, names = ShardEncoder.encode, []

    def encode(self: ShardEncoder, task: EncodeTask) -> dict[str, Any]:
        names.append(task.shard.name)
        if len(names) == 3:
            raise KeyboardInterrupt
        return real(self, task)

    monkeypatch.setattr(ShardEncoder, "encode", encode)
    with pytest.raises(KeyboardInterrupt):
        _encode(source, target, parts, storage)
    facts = _encode(source, target, parts, storage)
    assert names == ["00000.tar", "00001.tar", "00002.tar", "00002.tar"]
    assert facts["num_samples"] == 11
    assert sum(facts["skipped"].values()) == 1
    whole = _encode(source, join(bucket_uri, "whole"), parts, storage)
    assert whole["digest"] == facts["digest"]


def test_a_run_that_goes_on_still_names_the_shards(parts: TextToImageParts, storage: Storage, bucket_uri: str) -> None:
    source, target = join(bucket_uri, "pictures"), join(bucket_uri, "latents")
    samples = [_sample(number) for number in range(12)]
    for number in (0, 1, 5):
        samples[number]["png"] = b"broken"
    write_shards(samples, source, samples_per_shard=4, storage=storage)
    for _ in range(2):  # the second has nothing left to encode
        with pytest.raises(DataError, match=r"3 of the 12 seen.*; in \S+/00000\.tar, \S+/00001\.tar\. Mend"):
            _encode(source, target, parts, storage, max_bad_share=0.1)
    facts = _encode(source, target, parts, storage, max_bad_share=0.3)
    assert facts["bad_shards"] == {join(source, "00000.tar"): 2, join(source, "00001.tar"): 1}


@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_a_shard_that_was_mended_is_encoded_after_all(
    damage: str, parts: TextToImageParts, storage: Storage, bucket_uri: str
) -> None:
    """Its entry in the index says the same of it as before."""
    source, target = join(bucket_uri, "pictures"), join(bucket_uri, "latents")
    index = write_shards([_sample(number) for number in range(12)], source, samples_per_shard=4, storage=storage)
    second = index.shards[1].uri
    whole = storage.read_bytes(second)
    storage.delete(second)
    if damage == "cut short":
        storage.write_bytes(second, whole[: len(whole) // 2])
    for _ in range(2):
        with pytest.raises(DataError, match="Mend or remove these shards"):
            _encode(source, target, parts, storage, max_bad_share=0.1)
    storage.write_bytes(second, whole)
    facts = _encode(source, target, parts, storage, max_bad_share=0.1)
    assert (facts["num_samples"], facts["skipped"]) == (12, {})
    assert [sample["caption"] for sample in _latents(target, storage)] == [f"picture {number}" for number in range(12)]


def test_what_a_whole_pass_has_lost_stays_lost(parts: TextToImageParts, storage: Storage, bucket_uri: str) -> None:
    """Trainings may have begun on its latents, and their order is that of the shards."""
    source, target = join(bucket_uri, "pictures"), join(bucket_uri, "latents")
    index = write_shards([_sample(number) for number in range(12)], source, samples_per_shard=4, storage=storage)
    second = index.shards[1].uri
    whole = storage.read_bytes(second)
    storage.delete(second)
    facts = _encode(source, target, parts, storage, max_bad_share=0.5)
    assert (facts["num_samples"], facts["skipped"]) == (8, {"shard missing": 4})
    storage.write_bytes(second, whole)
    assert _encode(source, target, parts, storage, max_bad_share=0.5) == facts


def test_keys_that_cannot_name_files_are_counted_and_others_are_kept(
    parts: TextToImageParts, storage: Storage, bucket_uri: str, tmp_path: Path
) -> None:
    source, target = join(bucket_uri, "pictures"), join(bucket_uri, "latents")
    long = "k" * 96
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for key in ("./00001", long, "../up", "twice", "other", "twice", "not-\udcff-utf-8"):
            for name, data in (("png", _sample(0)["png"]), ("txt", b"a picture")):
                member = tarfile.TarInfo(f"{key}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    storage.upload_file(tmp_path / "00000.tar", join(source, "00000.tar"))
    facts = _encode(source, target, parts, storage, max_bad_share=0.3)
    assert facts["skipped"] == {"key cannot be a file name": 1, "key comes twice in its shard": 1}
    shards = read_index(target, storage=storage).shards
    kept = [sample["__key__"] for sample in iterate_samples(shards, storage=storage, decode=dict)]
    assert kept == ["00001", long, "twice", "other", "not-\udcff-utf-8"]


def test_shards_that_changed_are_encoded_again(parts: TextToImageParts, storage: Storage, bucket_uri: str) -> None:
    source, target = join(bucket_uri, "pictures"), join(bucket_uri, "latents")
    write_shards([_sample(number) for number in range(8)], source, samples_per_shard=4, storage=storage)
    before = _encode(source, target, parts, storage)
    write_shards([_sample(number) for number in (0, 1, 2, 3, 8, 9)], source, samples_per_shard=4, storage=storage)
    after = _encode(source, target, parts, storage)
    assert after["num_samples"] == 6
    assert after["digest"] != before["digest"]
    captions = [sample["caption"] for sample in _latents(target, storage)]
    assert captions == [f"picture {number}" for number in (0, 1, 2, 3, 8, 9)]
    tars = [info.uri for info in storage.list(target) if info.uri.endswith(".tar")]
    assert tars == [shard.uri for shard in read_index(target, storage=storage).shards], "nothing is left of the old"


def test_a_late_task_of_the_same_shard_changes_nothing(
    parts: TextToImageParts, storage: Storage, bucket_uri: str
) -> None:
    """A machine that was given up for dead comes back, and has rounded differently."""
    source, target = join(bucket_uri, "pictures"), join(bucket_uri, "latents")
    index = write_shards([_sample(number) for number in range(4)], source, samples_per_shard=4, storage=storage)
    facts = _encode(source, target, parts, storage)
    late = ShardEncoder(parts, Encoding(batch_size=3, precision="bfloat16"), storage)
    record = late.encode(EncodeTask(0, index.shards[0], target))
    (shard,) = read_index(target, storage=storage).shards
    assert record["shard"]["fingerprint"] == shard.fingerprint
    assert [info.uri for info in storage.list(target) if info.uri.endswith(".tar")] == [shard.uri]
    assert _encode(source, target, parts, storage) == facts


def test_bfloat16_is_coarser_and_no_more(parts: TextToImageParts, storage: Storage, bucket_uri: str) -> None:
    source = join(bucket_uri, "pictures")
    write_shards([_sample(number) for number in range(8)], source, samples_per_shard=8, storage=storage)
    found = []
    for precision in ("float32", "bfloat16"):
        target = join(bucket_uri, precision)
        _encode(source, target, parts, storage, precision=precision)
        found.append(torch.stack([sample["latent_mean"].float() for sample in _latents(target, storage)]))
    difference = (found[1] - found[0]).abs().max() / found[0].std()
    assert 1e-4 < difference < 0.1


def test_filters_and_captions_are_part_of_the_latents_and_counted_over_a_restart(
    parts: TextToImageParts, storage: Storage, bucket_uri: str
) -> None:
    source, target = join(bucket_uri, "pictures"), join(bucket_uri, "latents")
    samples = [
        _sample(number) | {"json": json.dumps({"width": 100 + number, "blip": f"new {number}"}).encode()}
        for number in range(10)
    ]
    write_shards(samples, source, samples_per_shard=5, storage=storage)
    rules = SampleRules(
        [FieldFilter(field="width", min=103), FieldFilter(field="width", max=107)], [CaptionSource(template="a {blip}")]
    )
    facts = _encode(source, target, parts, storage, rules=rules)
    assert facts["filtered"] == {"width below 103": 3, "width above 107": 2}
    assert (facts["num_samples"], facts["skipped"]) == (5, {})
    assert [sample["caption"] for sample in _latents(target, storage)] == [f"a new {number}" for number in range(3, 8)]
    storage.delete(join(target, "records", "00001.json"))  # as if it had been killed before the second shard
    assert _encode(source, target, parts, storage, rules=rules) == facts
    nothing = SampleRules([FieldFilter(field="width", min=1000)])
    with pytest.raises(DataError, match="filters leave nothing of 10 samples"):
        _encode(source, join(bucket_uri, "none"), parts, storage, rules=nothing)


def test_the_networks_of_sdxl_can_be_told_each_pictures_own_size(storage: Storage, bucket_uri: str) -> None:
    sdxl = tiny_sdxl()
    samples = []
    for number, size in enumerate([(16, 16), (40, 32), (16, 48)]):
        file = io.BytesIO()
        Image.new("RGB", size, (90, 20 * number, 30)).save(file, format="PNG")
        samples.append({"__key__": f"{number:04d}", "png": file.getvalue(), "txt": b"a picture"})
    source = join(bucket_uri, "pictures")
    write_shards(samples, source, samples_per_shard=3, storage=storage)
    decode = partial(decode_latents, condition_names=("text", "pooled", "time_ids"))

    def stored(target: str, **options: Any) -> list[list[int]]:
        _encode(source, join(bucket_uri, target), sdxl, storage, **options)
        index = read_index(join(bucket_uri, target), storage=storage)
        read = iterate_samples(index.shards, storage=storage, decode=decode)
        return [sample["time_ids"].tolist() for sample in read]

    assert stored("own", picture_sizes=True) == [
        [16, 16, 0, 0, 16, 16], [32, 40, 0, 2, 16, 16], [48, 16, 16, 0, 16, 16]
    ]  # fmt: skip
    assert stored("uncropped") == [[16, 16, 0, 0, 16, 16]] * 3
    assert stored("random", picture_sizes=True, crop="random", seed=3)[2][2] != 16
    check_takes_sizes(sdxl, "sdxl")
    with pytest.raises(RecipeError, match=r"encode\.picture_sizes=true is for models of .* and s3://t takes no sizes"):
        check_takes_sizes(tiny_teacher(), "s3://t")


BUCKETS = BucketSettings(max_aspect_ratio=4.0, multiple_of=8)


def _pictures_of_sizes(sizes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    samples = []
    for number, (width, height) in enumerate(sizes):
        pixels = torch.arange(width * height * 3).mul(7 + number).remainder(251).reshape(height, width, 3)
        file = io.BytesIO()
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(file, format="PNG")
        samples.append({"__key__": f"{number:04d}", "png": file.getvalue(), "txt": f"picture {number}".encode()})
    return samples


def test_pictures_are_encoded_in_their_buckets(storage: Storage, bucket_uri: str) -> None:
    """Each comes out as if it had been cropped and encoded by itself, in the order of the pictures."""
    sdxl = tiny_sdxl()
    sizes = [(16, 16), (32, 8), (8, 32), (64, 16), (36, 8), (20, 20), (8, 40), (33, 8), (8, 34), (90, 20)]
    samples = _pictures_of_sizes(sizes)
    source, target = join(bucket_uri, "pictures"), join(bucket_uri, "latents")
    write_shards(samples, source, samples_per_shard=10, storage=storage)
    facts = _encode(source, target, sdxl, storage, buckets=BUCKETS, picture_sizes=True)
    assert facts["num_samples"] == len(sizes)
    decode = partial(decode_latents, condition_names=("text", "pooled", "time_ids"))
    shards = read_index(target, storage=storage).shards
    stored = list(iterate_samples(shards, storage=storage, decode=decode))
    assert [sample["caption"] for sample in stored] == [f"picture {number}" for number in range(len(sizes))]
    for sample, (width, height), latents in zip(samples, sizes, stored, strict=True):
        bucket = (32, 8) if width > 2 * height else (8, 32) if height > 2 * width else (16, 16)
        alone = decode_picture(sample, resolution=16, buckets=[bucket], sizes=True)
        mean, std = sdxl.encode_pictures(alone["pixels"][None])
        assert latents["latent_mean"].shape == (4, bucket[1] // 4, bucket[0] // 4)
        torch.testing.assert_close(latents["latent_mean"].float(), mean[0], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(latents["latent_std"].float(), std[0], rtol=2e-3, atol=2e-3)
        assert latents["time_ids"].tolist() == alone["time_ids"].tolist()
        assert latents["time_ids"].tolist()[:2] == [height, width]
        assert latents["time_ids"].tolist()[4:] == [bucket[1], bucket[0]]
    encoding = Encoding(batch_size=2, buckets=BUCKETS)
    options: dict[str, Any] = {"parts": sdxl, "storage": storage, "max_bad_share": 0.0, "label": "test"}
    other = encode_shards(source, join(bucket_uri, "other"), encoding=encoding, **options)
    stored = list(iterate_samples(read_index(other["uri"], storage=storage).shards, storage=storage, decode=decode))
    assert [sample["caption"] for sample in stored] == [f"picture {number}" for number in range(len(sizes))]
    assert [sample["time_ids"].tolist() for sample in stored[:3]] == [
        [16, 16, 0, 0, 16, 16], [8, 32, 0, 0, 8, 32], [32, 8, 0, 0, 32, 8]
    ]  # fmt: skip


def test_models_without_buckets_are_told() -> None:
    check_takes_buckets(tiny_teacher(), "t", BUCKETS)
    with pytest.raises(ModelError, match=r"multiple_of=4 is no multiple of 8, by which .* of t divide .*: take 8"):
        check_takes_buckets(tiny_teacher(), "t", BucketSettings(multiple_of=4))
    with pytest.raises(ModelError, match=r"and s3://t is of the family inpainting: leave them out"):
        check_takes_buckets(tiny_inpainting(), "s3://t", BUCKETS)
    with pytest.raises(DataError, match="no size beside the square of 16 pixels"):
        check_takes_buckets(tiny_teacher(), "t", BucketSettings(max_aspect_ratio=2, multiple_of=8))
    for latent in (True, False):
        with pytest.raises(ModelError, match=r"encode\.buckets are for models that diffuse latents"):
            check_takes_buckets(tiny_class_model(latent=latent), "c", BUCKETS)

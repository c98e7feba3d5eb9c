"""`fewstep bench data` in small: every figure is there, and what must be exact is."""

from __future__ import annotations

import io
import os

import psutil
import pytest
from click.testing import CliRunner
from PIL import Image

from fewstep.bench.data.checks import shuffle_quality
from fewstep.bench.data.measure import on_one_core
from fewstep.bench.data.pictures import picture_samples
from fewstep.bench.data.run import DataBenchSettings, bench_data, own_store, table
from fewstep.cli import main
from fewstep.data.stream import StreamSettings


def test_pictures_are_as_img2dataset_leaves_them() -> None:
    samples = list(picture_samples(12, resolution=64))
    sizes = {Image.open(io.BytesIO(sample["jpg"])).size for sample in samples}
    assert all(min(size) == 64 for size in sizes)
    assert len(sizes) >= 3
    assert samples == list(picture_samples(12, resolution=64))
    assert len({sample["jpg"] for sample in samples}) == 12


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a single core cannot be shared out")
def test_readers_and_the_store_take_no_time_from_each_other() -> None:
    before = os.sched_getaffinity(0)
    with own_store():
        assert os.sched_getaffinity(0) == before
        children = psutil.Process().children(recursive=True)
        servers = [each for each in children if any("fewstep-bench-" in part for part in each.cmdline())]
        assert servers
        readers = on_one_core(os.sched_getaffinity, 0)
        assert len(readers) == 1
        for server in servers:
            assert not readers & set(server.cpu_affinity())


@pytest.mark.slow
def test_every_figure_is_there(capfd: pytest.CaptureFixture[str]) -> None:
    settings = DataBenchSettings(
        images=64, latents=64, resolution=64, batch_size=8, rounds=1, seconds=0.1, many_shards=16, stops=2,
        memory_minutes=0.02,
    )  # fmt: skip
    result = bench_data(settings)
    assert result["resume"]["different"] == 0
    assert result["resume"]["epochs"] >= 2
    assert result["first"]["num_shards"] == 16
    bad = result["faults"]
    assert bad["resets"] >= 3
    assert bad["busy"] >= 1
    assert (bad["lost_of_whole_shards"], bad["doubled"]) == (0, 0)
    assert 0 < bad["kept_of_the_cut_shard"] <= 13
    assert bad["counted"] == {"shard missing": 25, "shard cut short": bad["counted"]["shard cut short"]}
    assert 10 <= bad["counted"]["shard cut short"] <= 30  # streams that are ahead meet it again
    for part, goal in (("pictures", "of bare"), ("pictures", "of webdataset"), ("latents", "of boto3")):
        assert 0 < result[part][goal]["median"] < 100
    lines = table(result).splitlines()
    assert len(lines) == 4 + 9
    assert all(line.endswith(("| met |", "| not met |", "| none set |  |")) for line in lines[4:])


def test_an_epoch_is_mixed_nearly_as_by_a_full_permutation() -> None:
    mixed = shuffle_quality(StreamSettings(), num_shards=64, samples_per_shard=200)
    ours, full = mixed["ours"], mixed["permutation"]
    assert full["moved"] == pytest.approx(1 / 3, abs=0.01)
    assert ours["moved"] == pytest.approx(1 / 3, abs=0.05)
    assert ours["shards_in_a_batch"] > 0.5 * full["shards_in_a_batch"]
    one_by_one = StreamSettings(num_streams=1, piece_bytes=2**30, shuffle_bytes=1)
    poor = shuffle_quality(one_by_one, num_shards=64, samples_per_shard=200)["ours"]
    assert poor["shards_in_a_batch"] < 0.2 * ours["shards_in_a_batch"]
    assert poor["neighbours_in_a_batch"] > 2 * ours["neighbours_in_a_batch"]


def test_what_cannot_work_is_said() -> None:
    result = CliRunner().invoke(main, ["bench", "data", "--images", "3"])
    assert result.exit_code == 2
    assert "--images 3: Input should be greater than or equal to 64" in result.output

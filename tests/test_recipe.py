"""A recipe that cannot work is refused before anything runs, in words that name the key, the value and the fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fewstep.errors import RecipeError
from fewstep.recipe import load_recipe, parse_recipe

TRAIN = {"updates": 10, "global_batch_size": 8, "learning_rate": 1.0e-3}


def content(**changes: Any) -> dict[str, Any]:
    """Return a small recipe of all stages but the teacher's, with changes; "a__b" changes key b of a, None removes."""
    recipe: dict[str, Any] = {
        "name": "small",
        "stages": ["prepare", "encode", "guidance", "progressive", "evaluate", "register"],
        "teacher": "asset:emoji-teacher",
        "prepare": {"resolution": 32},
        "guidance": {"w_min": 0.0, "w_max": 4.0, "train": dict(TRAIN)},
        "progressive": {"ladder": [4, 2, 1], "train": dict(TRAIN)},
        "evaluate": {"steps": [4, 2, 1], "guidance_scale": 4.0},
        "register": {"name": "small", "num_inference_steps": 4},
    }
    for path, value in changes.items():
        *parents, key = path.split("__")
        place = recipe
        for parent in parents:
            place = place.setdefault(parent, {})
        if value is None:
            del place[key]
        else:
            place[key] = value
    return recipe


def test_the_small_recipe_is_taken() -> None:
    recipe = parse_recipe(content())
    assert recipe.stages[-1] == "register"
    assert recipe.register_.name == "small"
    assert recipe.progressive is not None
    assert recipe.progressive.rung(2).updates == 10


@pytest.mark.parametrize("file", sorted(Path("workflows/recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_recipe_is_taken_and_named_after_its_file(file: Path) -> None:
    assert load_recipe(file).name == file.stem


def test_updates_of_single_rungs() -> None:
    progressive = parse_recipe(content(progressive__updates={1: 30})).progressive
    assert progressive is not None
    assert [progressive.rung(steps).updates for steps in (4, 2, 1)] == [10, 10, 30]
    assert progressive.rung(1).learning_rate == TRAIN["learning_rate"]


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"guidence": {}}, ["guidence: unknown key", "the keys here are name, seed, stages, teacher", "guidance"]),
        ({"guidance__wmax": 3}, ["guidance.wmax: unknown key", "the keys here are", "w_min", "w_max", "train"]),
        (
            {"guidance__train__lr": 3},
            ["guidance.train.lr: unknown key", "updates, global_batch_size, learning_rate", "ema_decay"],
        ),
        ({"register__gate__kid": 1}, ["register.gate.kid: unknown key", "max_kid_ratio"]),
        ({"register_": {}}, ["register_: unknown key", "register"]),
        ({"progressive__ladder": [8, 3, 1]}, ["ladder[1]=3 is not a divisor below 8", "write 4 there"]),
        ({"progressive__ladder": []}, ["the ladder is empty"]),
        ({"progressive__updates": {8: 5}}, ["updates names the step counts [8]", "not in the ladder [4, 2, 1]"]),
        ({"progressive__updates": {1: 0}}, ["progressive.updates.1=0", "greater than 0"]),
        (
            {"progressive__updates": {1: 5}, "progressive__train__warmup_updates": 6},
            ["updates {1: 5} are fewer than train.warmup_updates=6", "set it to at most 5"],
        ),
        ({"guidance__w_min": 5.0}, ["w_min=5 is not below w_max=4", "upside down"]),
        ({"guidance__w_min": -1.0}, ["guidance.w_min=-1.0", "greater than or equal to 0"]),
        ({"guidance__embedding_dim": 2}, ["guidance.embedding_dim=2"]),
        ({"guidance__loss_weight": "snr2"}, ["guidance.loss_weight='snr2'", "truncated_snr"]),
        ({"guidance": None}, ["stages has guidance, but its settings are missing: add the key guidance"]),
        ({"progressive": None}, ["stages has progressive", "add the key progressive"]),
        ({"prepare": None}, ["stages has prepare", "add the key prepare"]),
        ({"stages": ["teacher", "encode"]}, ["stages has teacher", "add the key train_teacher"]),
        (
            {"train_teacher": {"init": "m", "autoencoder_train": TRAIN, "train": TRAIN}},
            ["begins from a model (init), or with fresh networks around", "name exactly one"],
        ),
        (
            {"train_teacher": {"add_pooled_text": True, "autoencoder_train": TRAIN, "train": TRAIN}},
            ["add_pooled_text changes the model named by init", "network.pooled_text"],
        ),
        (
            {"train_teacher": {"network": {"text_width": 100}, "autoencoder_train": TRAIN, "train": TRAIN}},
            ["text_width=100 cannot be shared equally by num_attention_heads=8"],
        ),
        ({"stages": ["encode", "prepare"]}, ["out of order or doubled; the order is ['prepare', 'encode']"]),
        ({"stages": ["prepare", "prepare"]}, ["out of order or doubled"]),
        ({"stages": ["prepare", "enc"]}, ["stages.1='enc'", "'encode'"]),
        ({"stages": ["encode"]}, ["there are no shards: name them in data.train, or put prepare into stages"]),
        ({"teacher": None}, ["there is no teacher: name a MODEL in the key teacher"]),
        ({"evaluate__guidance_scale": 5.5}, ["guidance_scale=5.5 is w=4.5, outside the trained range 0 … 4"]),
        (
            {"progressive__kinds": ["encoder", "deterministic"], "guidance__w_min": 1.0},
            ["kinds has encoder, and guidance begins at w=1", "set guidance.w_min to 0"],
        ),
        (
            {"progressive__kinds": ["stochastic"]},
            ["progressive.kinds is ['stochastic'], and evaluate judges the deterministic students"],
        ),
        ({"evaluate__steps": [16, 4]}, ["evaluate.steps has [16]", "progressive.ladder [4, 2, 1]"]),
        ({"evaluate__steps": [4, 4]}, ["steps=[4, 4] must be different numbers"]),
        ({"register__num_inference_steps": 8}, ["register.num_inference_steps=8 is not in", "[4, 2, 1]"]),
        ({"guidance__train__updates": None}, ["guidance.train.updates: this key is required and missing"]),
        ({"guidance__train__hand_over": "ema"}, ["hand_over=ema needs averaged weights; set ema_decay"]),
        ({"guidance__train__learning_rate": "fast"}, ["guidance.train.learning_rate='fast'", "valid number"]),
        ({"name": "Small Recipe"}, ["name='Small Recipe'", "match pattern"]),
        ({"name": None}, ["name: this key is required and missing"]),
        (
            {"data": {"filters": [{"field": "width"}]}},
            ["data.filters.0", "the filter on width says nothing: give min, max, one_of or matches"],
        ),
        (
            {"data": {"captions": [{"template": "{txt"}]}},
            ["data.captions.0.template='{txt'", "a field is a name in braces"],
        ),
        (
            {"data": {"filters": [{"feild": "width", "min": 1}]}},
            ["data.filters.0.feild: unknown key; the keys here are field, min"],
        ),
        (
            {
                "prepare": None,
                "prepare_metadata": {"source": "s3://b/laion"},
                "data": {"train": "s3://b/x", "evaluate": "s3://b/y", "alignment": "s3://b/z"},
            },
            ["prepare_metadata has nothing to draw", "take those that it shall draw out of data"],
        ),
        ({"data": {"train": []}}, ["data.train: the list of sources is empty: name at least one, or a URI"]),
        ({"data": {"train": 3}}, ["data.train=3: 3 is neither the URI of shards nor a list of sources"]),
        ({"data": {"train": {"uri": "s3://b/x"}}}, ["data.train: {'uri': 's3://b/x'} is neither the URI"]),
        (
            {"data": {"train": [{"uri": "s3://b/x", "weight": 0}, {"uri": "s3://b/y", "weight": -2}]}},
            ["data.train.0.weight=0: ", "greater than 0", "data.train.1.weight=-2"],
        ),
        ({"data": {"train": [{"uri": "s3://b/x", "weight": float("inf")}]}}, ["data.train.0.weight=inf", "finite"]),
        ({"data": {"train": [{"url": "s3://b/x"}]}}, ["train.0.url: unknown key; the keys here are uri, weight, name"]),
        ({"data": {"train": [{"uri": "s3://b/x", "name": "a//b"}]}}, ["data.train.0.name='a//b'", "match pattern"]),
        (
            {"data": {"train": [{"uri": "s3://b/x", "name": "own"}, {"uri": "s3://b/own"}, {"uri": "s3://b/own"}]}},
            ["data.train: 3 sources, of which more than one is named 'b/own': give each a name of its own"],
        ),
        ({"data": {"evaluate": [{"uri": "s3://b/x"}]}}, ["data.evaluate: Input should be a valid string"]),
        ({"prepare__resolution": 8}, ["prepare.resolution=8", "greater than or equal to 16"]),
    ],
    ids=lambda value: "" if isinstance(value, list) else next(iter(value)),
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], messages: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(content(**changes), source="my.yaml")
    text = str(caught.value)
    assert text.startswith("my.yaml")
    for message in messages:
        assert message in text


def test_filters_of_a_recipe_with_classes_are_refused() -> None:
    made = content(stages=["prepare"], prepare=None, prepare_classes={"source": "digits"})
    made["data"] = {"filters": [{"field": "width", "min": 1}]}
    with pytest.raises(RecipeError, match="this one has prepare_classes: leave them out"):
        parse_recipe(made)


def test_a_scale_on_the_edge_of_the_range_is_inside() -> None:
    """1.3 - 1 is a little more than 0.3 in floating point."""
    parse_recipe(content(guidance__w_max=0.3, evaluate__guidance_scale=1.3))


def test_all_faults_are_named_at_once() -> None:
    changed = content(guidance__train__updates=0, progressive__train__learning_rate=-1.0, teachr="x")
    with pytest.raises(RecipeError) as caught:
        parse_recipe(changed)
    for place in ("guidance.train.updates=0", "progressive.train.learning_rate=-1.0", "teachr: unknown key"):
        assert place in str(caught.value)


def test_a_named_and_a_trained_teacher_are_one_too_many() -> None:
    stages = ["prepare", "teacher", "encode"]
    changed = content(stages=stages, train_teacher={"autoencoder_train": dict(TRAIN), "train": dict(TRAIN)})
    with pytest.raises(RecipeError, match="it is either named or trained"):
        parse_recipe(changed)
    del changed["teacher"]
    assert parse_recipe(changed).teacher is None


def test_shards_may_be_named_instead_of_prepared() -> None:
    stages = ["encode", "guidance"]
    recipe = parse_recipe(content(stages=stages, prepare=None, data={"train": "s3://b/train", "evaluate": "s3://b/ev"}))
    assert recipe.data.train == "s3://b/train"


def test_sources_are_mixed_by_weight() -> None:
    shards = {"train": [{"uri": "s3://b/laion/train", "weight": 3}, {"uri": "s3://b/own/train", "name": "mine"}]}
    recipe = parse_recipe(content(data=shards))
    assert isinstance(recipe.data.train, tuple)
    assert [(each.name, each.weight) for each in recipe.data.train] == [("train", 3.0), ("mine", 1.0)]
    again = parse_recipe(recipe.model_dump(mode="json", by_alias=True))
    assert again == recipe
    assert again.digest() == recipe.digest()


def test_a_list_of_one_source_is_its_uri() -> None:
    alone = parse_recipe(content(data={"train": [{"uri": "s3://b/train", "weight": 3, "name": "x"}]}))
    assert alone == parse_recipe(content(data={"train": "s3://b/train"}))


def test_recipes_are_frozen() -> None:
    recipe: Any = parse_recipe(content())
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3


def test_a_file_is_read_as_its_content(tmp_path: Path) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(content()))
    assert load_recipe(file) == parse_recipe(content())


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there is no recipe .*nowhere\.yaml; the shipped ones are in"):
        load_recipe(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "cannot be read"),
        ("a: b: c", "cannot be read"),
        ("", "must be a mapping of keys, not NoneType"),
        ("- name", "must be a mapping of keys, not list"),
        ("\x00", "cannot be read"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(file)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_bytes(b"\xff\xfename: x")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(file)


def test_where_it_runs_is_not_part_of_the_digest() -> None:
    digest = parse_recipe(content()).digest()
    assert parse_recipe(content(cluster={"num_workers": 4}, storage={"bucket": "other"})).digest() == digest
    assert parse_recipe(content(seed=1)).digest() != digest


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stream": {"num_streams": 3}}, ["global_batch_size=8 is no multiple of stream.num_streams=3: take 9"]),
        (
            {"cluster": {"num_workers": 3}},
            ["num_streams=8 is no multiple of cluster.num_workers=3", "set num_streams to 9"],
        ),
        (
            {"cluster": {"num_workers": {"min": 1, "max": 9}, "use_gpu": True, "cpus_per_worker": 2}},
            ["cluster.num_workers.max=9 is above stream.num_streams=8", "lower max"],
        ),
        (
            {
                "cluster": {"num_workers": {"min": 1, "max": 3}, "use_gpu": True, "cpus_per_worker": 2},
                "stream": {"loader_processes": 3},
            },
            ["stream.loader_processes=3", "num_workers.max=3 some have 2 of", "take at most 2 processes"],
        ),
        ({"evaluate": {"num_prompts": 1201}}, ["num_prompts=1201 is more than prepare.num_evaluate=1200"]),
        (
            {"evaluate": {"num_prompts": 60}, "register": {"gate": {"min_num_images": 100}}},
            ["min_num_images=100 is more than evaluate.num_prompts=60"],
        ),
        (
            {
                "stages": ["encode", "guidance", "progressive", "evaluate"],
                "prepare": None,
                "data": {"train": "s3://b/t"},
            },
            ["data.evaluate and data.alignment must name held-out shards"],
        ),
    ],
)
def test_sizes_that_do_not_fit_together(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RecipeError) as raised:
        parse_recipe(content(**changes))
    for word in words:
        assert word in str(raised.value)

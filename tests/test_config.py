"""Configuration and recipes: read strictly, every mistake with its place and a way out."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy import toy_config

from mosear.config import ARConfig, BackboneConfig, ModelConfig, MoSEConfig, Policy, Target, VoiceConfig, parse
from mosear.contract import DECODER, heads, parts
from mosear.errors import ConfigError
from mosear.recipe import Limits, Precision, Recipe

RECIPES = sorted((Path(__file__).parents[1] / "export" / "recipes").glob("*.toml"))
Table = dict[str, Any]  # Any: what JSON holds


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    config = toy_config(groups=("text", "video", "audio", "sink"), ar=ARConfig(policy=Policy.TARGET, layers=(1,)))
    config.save(tmp_path / "config.json")
    assert ModelConfig.load(tmp_path / "config.json") == config


def unknown_top(data: Table) -> None:
    data["backbones"] = data.pop("backbone")


def unknown_deep(data: Table) -> None:
    data["ar"]["tau_low"] = 0.1


def unlike_any(data: Table) -> None:
    data["mose"]["xyzzy"] = 1


def missing(data: Table) -> None:
    del data["backbone"]["kv_heads"]


def wrong_word(data: Table) -> None:
    data["ar"]["policy"] = "balanced"


def wrong_item(data: Table) -> None:
    data["mose"]["targets"] = ["q_proj", "qkv"]


def wrong_type(data: Table) -> None:
    data["backbone"]["layers"] = "two"


def bool_for_int(data: Table) -> None:
    data["backbone"]["layers"] = True


def float_for_int(data: Table) -> None:
    data["voice"]["hop"] = 160.0


def no_table(data: Table) -> None:
    data["face"] = 3


def not_finite(data: Table) -> None:
    data["mose"]["alpha"] = float("inf")


def ragged_heads(data: Table) -> None:
    data["backbone"]["kv_heads"] = 4


def groups_out_of_order(data: Table) -> None:
    data["groups"] = ["text", "audio", "video"]


def nine_groups(data: Table) -> None:
    data["groups"] = ["text", "video", "audio", *"abcdef"]


def beyond_1(data: Table) -> None:
    data["ar"]["strength"] = 1.5


def thresholds_crossed(data: Table) -> None:
    data["ar"]["tau_lo"] = 0.9


def no_ramp(data: Table) -> None:
    data["ar"]["ramp"] = 0


MISTAKES: dict[Callable[[Table], None], str] = {
    unknown_top: r"config\.json has an unknown key 'backbones': did you mean 'backbone'\?",
    unknown_deep: r"config\.json: ar has an unknown key 'tau_low': did you mean 'tau_lo'\?",
    unlike_any: r"mose has an unknown key 'xyzzy': known keys: targets, rank",
    missing: r"backbone lacks the key 'kv_heads'",
    wrong_word: r"ar: policy is 'balanced': choose one of off, balance, target",
    wrong_item: r"mose: targets\[1\] is 'qkv': choose one of q_proj, ",
    wrong_type: r"backbone: layers is 'two', which is not of type int",
    bool_for_int: r"backbone: layers is True, which is not of type int",
    float_for_int: r"voice: hop is 160\.0, which is not of type int",
    no_table: r"face must be a table of FaceConfig keys, not 3",
    not_finite: r"mose: alpha is inf: it must be a finite number",
    ragged_heads: r"backbone\.heads is 6, which is no multiple of kv_heads 4",
    groups_out_of_order: r"must begin with text, video, audio",
    nine_groups: r"at most 8 names",
    beyond_1: r"ar\.strength is 1\.5: it is a share, from 0 to 1",
    thresholds_crossed: r"ar\.tau_lo 0\.9 must lie below ar\.tau_hi",
    no_ramp: r"ar\.ramp 0\.0 .*must be above 0",
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_in_a_configuration_is_named(mistake: Callable[[Table], None], tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    toy_config().save(path)
    data = json.loads(path.read_text())
    mistake(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=MISTAKES[mistake]):
        ModelConfig.load(path)


def test_a_file_that_is_no_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        ModelConfig.load(tmp_path / "config.json")
    for data in (b"{", b"\xff\xfe"):
        (tmp_path / "config.json").write_bytes(data)
        with pytest.raises(ConfigError, match=r"config\.json cannot be read as JSON"):
            ModelConfig.load(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match="must be a table of ModelConfig keys"):
        ModelConfig.load(tmp_path / "config.json")


def test_what_has_a_default_may_be_left_out() -> None:
    assert parse(MoSEConfig, {"rank": 4, "alpha": 8}, where="x") == MoSEConfig(rank=4, alpha=8.0)
    assert isinstance(parse(MoSEConfig, {"alpha": 8}, where="x").alpha, float)


def test_derived_numbers() -> None:
    assert MoSEConfig(rank=8, alpha=16.0).scale == 2.0
    assert (VoiceConfig().tokens, VoiceConfig().feature_size, VoiceConfig().max_seconds) == (9, 768, 30.0)
    shape = BackboneConfig(**dataclasses.asdict(toy_config().backbone))
    assert shape.linear_size(Target.O_PROJ) == (48, 24) and shape.linear_size(Target.V_PROJ) == (24, 16)


def test_the_contract_follows_the_configuration() -> None:
    config = toy_config()
    decoder = parts(config)[DECODER]
    assert decoder.heads == heads(config) and len(decoder.heads) == 1 + 2 * (3 * 3 + 1)
    assert decoder.state == tuple((f"{k}_{i}", f"{k}_{i}_out") for i in range(2) for k in ("key", "value"))
    names = [spec.name for spec in decoder.inputs + decoder.heads + decoder.outputs]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_our_recipes_are_read(path: Path) -> None:
    recipe = Recipe.load(path)
    assert recipe.name == path.stem and recipe.used_threads >= 1
    assert (recipe.precision is Precision.INT8) == path.stem.endswith("int8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("precison = 'int8'", r"has an unknown key 'precison': did you mean 'precision'\?"),
        ("[limits]\nclip_second = 3", r"limits has an unknown key 'clip_second': did you mean 'clip_seconds'\?"),
        ("precision = 'fp8'", "precision is 'fp8': choose one of fp32, int8"),
        ("target = 'cuda'", "target is 'cuda': choose one of onnxruntime-cpu"),
        ("heads = true", "heads is True: choose one of inputs, baked"),
        ("block = 48", "recipe x: block is 48; choose 16, 32"),
        ("threads = -1", "recipe x: threads is -1; 0 means all"),
        ("threads = 1.5", "threads is 1.5, which is not of type int"),
        ("[limits]\nwords = 0", r"limits\.words is 0: it must be above 0"),
        ("[limits]\nclip_seconds = nan", "clip_seconds is nan: it must be a finite number"),
        ("threads = ", "cannot be read as TOML"),
    ],
)
def test_a_mistake_in_a_recipe_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'name = "x"\n{text}\n')
    with pytest.raises(ConfigError, match=message):
        Recipe.load(path)


def test_a_recipe_must_be_there_and_have_a_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mine\.toml does not exist: name a recipe"):
        Recipe.load(tmp_path / "mine.toml")
    (tmp_path / "mine.toml").write_text("threads = 2\n")
    with pytest.raises(ConfigError, match=r"mine\.toml lacks the key 'name'"):
        Recipe.load(tmp_path / "mine.toml")
    (tmp_path / "mine.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        Recipe.load(tmp_path / "mine.toml")


def test_a_recipe_of_a_name_alone_has_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('name = "x"\n[limits]\nwords = 10\n')
    assert Recipe.load(tmp_path / "mine.toml") == Recipe(name="x", limits=Limits(words=10))

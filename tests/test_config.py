"""Strict parsing: what is read is what was written, and each mistake names its file, field, value and limit."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import FULL, GROUPED, toy_config

from mosear.config import (
    ARConfig,
    BackboneConfig,
    ModelConfig,
    MoSEConfig,
    Policy,
    Route,
    Select,
    Statistic,
    Target,
    VoiceConfig,
    parse,
)
from mosear.errors import ConfigError
from mosear.recipe import Limits, Precision, Recipe

Data = dict[str, Any]  # what JSON holds


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    share: float = 0.5
    names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    count: int
    flag: bool = False
    note: str | None = None
    inner: Inner = dataclasses.field(default_factory=Inner)
    policies: tuple[Policy, ...] = ()
    inners: tuple[Inner, ...] = ()


@pytest.mark.parametrize(
    "config",
    [
        toy_config(),
        toy_config(
            backbone=FULL,
            groups=("text", "video", "audio", "sink"),
            mose=MoSEConfig(targets=tuple(Target), share_a=False, route=Route.MODALITY, select=Select.TOP1),
            ar=ARConfig(policy=Policy.TARGET, statistic=Statistic.MEAN, layers=(0, 1)),
        ),
    ],
    ids=["grouped", "full"],
)
def test_what_is_saved_is_loaded(config: ModelConfig, tmp_path: Path) -> None:
    config.save(tmp_path / "config.json")
    assert ModelConfig.load(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"count": 1, "cuont": 2}, "x has an unknown key 'cuont': did you mean 'count'?"),
        ({"count": 1, "zzz": 2}, "x has an unknown key 'zzz': known keys: count, flag, note, inner, policies, inners"),
        ({}, "x lacks the key 'count' (<class 'int'>): add it"),
        ({"count": "1"}, "x: count is '1', which is not of type int"),
        ({"count": 1.0}, "x: count is 1.0, which is not of type int"),
        ({"count": True}, "x: count is True, which is not of type int"),
        ({"count": None}, "x: count is None, which is not of type int"),
        ({"count": 1, "flag": 1}, "x: flag is 1, which is not of type bool"),
        ({"count": 1, "flag": "true"}, "x: flag is 'true', which is not of type bool"),
        ({"count": 1, "note": 3}, "x: note is 3, which is not of type str"),
        ({"count": 1, "inner": 3}, "x: inner must be a table of Inner keys, not 3"),
        ({"count": 1, "inner": {"shares": 3}}, "x: inner has an unknown key 'shares': did you mean 'share'?"),
        ({"count": 1, "inner": {"share": True}}, "x: inner: share is True, which is not of type float"),
        ({"count": 1, "inner": {"share": "0.5"}}, "x: inner: share is '0.5', which is not of type float"),
        ({"count": 1, "inner": {"share": float("nan")}}, "x: inner: share is nan: it must be a finite number"),
        ({"count": 1, "inner": {"share": float("inf")}}, "x: inner: share is inf: it must be a finite number"),
        ({"count": 1, "inner": {"names": "abc"}}, "x: inner: names is 'abc', which is not of type "),
        ({"count": 1, "inner": {"names": ["a", 2]}}, "x: inner: names[1] is 2, which is not of type str"),
        ({"count": 1, "policies": ["of"]}, "x: policies[0] is 'of': choose one of off, balance, target"),
        ({"count": 1, "policies": [["off"]]}, "x: policies[0] is ['off']: choose one of off, balance, target"),
        ({"count": 1, "inners": [{}, {"shar": 1}]}, "x: inners[1] has an unknown key 'shar': did you mean 'share'?"),
        ([1], "x must be a table of Outer keys, not [1]"),
        (None, "x must be a table of Outer keys, not None"),
    ],
    ids=str,
)
def test_each_mistake_has_its_place(data: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(Outer, data, where="x")
    assert str(caught.value).startswith(message)


def test_what_is_right_is_taken_as_it_is() -> None:
    given_data = {"count": 3, "note": None, "inner": {"share": 1}, "policies": ["off", "target"], "inners": [{}]}
    expected = Outer(count=3, inner=Inner(share=1.0), policies=(Policy.OFF, Policy.TARGET), inners=(Inner(),))
    made = parse(Outer, given_data, where="x")
    assert made == expected and type(made.inner.share) is float and type(made.policies[0]) is Policy
    assert parse(Outer, {"count": 3, "note": "n"}, where="x").note == "n"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=5), inside, max_size=3),
    max_leaves=5,
)
fields_of = st.sampled_from(["", "backbone", "mose", "ar", "voice", "face", "scene", "prompt"])


@settings(max_examples=150, deadline=None)
@given(section=fields_of, position=st.integers(0, 20), value=json_values)
def test_any_value_anywhere_is_taken_or_refused_by_us(section: str, position: int, value: object) -> None:
    data = json.loads(json.dumps(dataclasses.asdict(toy_config())))
    table = data[section] if section else data
    key = list(table)[position % len(table)]
    table[key] = value
    try:
        parse(ModelConfig, data, where="config.json")
    except ConfigError as error:
        assert key in str(error)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist: name a checkpoint folder with a config.json"),
        ("{", "cannot be read as JSON"),
        ("[]", "must be a table of ModelConfig keys"),
        (b"\xff\xfe{}", "cannot be read as JSON"),
        ("{}", "lacks the key 'name'"),
    ],
    ids=["missing", "cut off", "a list", "not UTF-8", "empty"],
)
def test_a_file_that_cannot_be_used_is_named(text: str | bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        ModelConfig.load(path)
    assert str(path) in str(caught.value) and message in str(caught.value)


def test_a_folder_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        ModelConfig.load(tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dataclasses.replace(GROUPED, kv_heads=4), r"backbone\.heads is 6, which is no multiple of kv_heads 4"),
        (lambda: ARConfig(strength=1.5), r"ar\.strength is 1\.5: it is a share, from 0 to 1"),
        (lambda: ARConfig(move=-0.1), r"ar\.move is -0\.1: it is a share"),
        (lambda: ARConfig(audio_share=2), r"ar\.audio_share is 2: it is a share"),
        (lambda: ARConfig(tau_lo=0.6, tau_hi=0.6), r"ar\.tau_lo 0\.6 must lie below ar\.tau_hi 0\.6"),
        (lambda: ARConfig(ramp=0), r"ar\.ramp 0 and .* must be above 0"),
        (lambda: ARConfig(sigma=0), r"ar\.sigma 0 must be above 0"),
        (
            lambda: toy_config(groups=("text", "audio", "video")),
            r"groups is \['text', 'audio', 'video'\]: it must begin",
        ),
        (lambda: toy_config(groups=("text", "video")), "must begin with text, video, audio"),
        (lambda: toy_config(groups=("text", "video", "audio", *"abcdef")), "at most 8 names"),
    ],
)
def test_values_out_of_range_name_the_limit(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_the_widths_of_linear_layers() -> None:
    sizes = {target: GROUPED.linear_size(target) for target in Target}
    assert sizes == {
        Target.Q_PROJ: (24, 48),
        Target.K_PROJ: (24, 16),
        Target.V_PROJ: (24, 16),
        Target.O_PROJ: (48, 24),
        Target.GATE_PROJ: (24, 40),
        Target.UP_PROJ: (24, 40),
        Target.DOWN_PROJ: (40, 24),
    }


def test_derived_values() -> None:
    assert MoSEConfig(rank=8, alpha=12.0).scale == 1.5
    voice = VoiceConfig()
    assert (voice.tokens, voice.feature_size, voice.max_seconds) == (9, 768, 30.0)
    assert toy_config().scene.tokens == 4
    assert [
        field.name for field in dataclasses.fields(BackboneConfig) if field.default is not dataclasses.MISSING
    ] == []


RECIPES = sorted((Path(__file__).parents[1] / "export" / "recipes").glob("*.toml"))


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
        ("precision = 'fp6'", "precision is 'fp6': choose one of fp32, fp16, bf16, int8, int4, fp8"),
        ("precision = 'fp8'", "precision is fp8; target onnxruntime-cpu takes fp32, int8"),
        (
            "target = 'cuda'",
            "target is 'cuda': choose one of onnxruntime-cpu, onnxruntime-cuda, tensorrt-rtx, tensorrt",
        ),
        ("[tensorrt]", "a .tensorrt. table is for the targets tensorrt-rtx"),
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("precision = 'fp32'", "precision is fp32; target tensorrt-rtx takes fp16, bf16, int8, int4, fp8"),
        ("precision = 'fp8'", "fp8, which compute capability 8.6 does not have: leave it out"),
        ("precision = 'int4'", "block is 32; int4 on TensorRT takes blocks of 128"),
        (
            "[tensorrt]\ncapacity = 1024",
            r"limits.prompt_tokens \+ limits.new_tokens is 1280, above tensorrt.capacity 1024",
        ),
        ("[tensorrt]\nprefill_rows = 2000", r"tensorrt.prefill_rows is 2000: a call cannot hold more rows"),
        ("[tensorrt]\nprefill_batch = 1", "are 1 and 8: they must be 2 or more"),
        ("[tensorrt]\ndecode_batch = 0", r"tensorrt.decode_batch is 0: it must be above 0"),
        (
            "[tensorrt]\nbuilder_memory = 2",
            r"tensorrt has an unknown key 'builder_memory': did you mean 'builder_memory_mb'",
        ),
        (
            "[tensorrt]\ncompute_capabilities = ['9.0']",
            r"has '9.0': the target tensorrt-rtx serves 8.0, .*need the target tensorrt",
        ),
        ("[tensorrt]\ncompute_capabilities = ['8.6', '8.6']", "name at least one, and each once"),
        ("[tensorrt]\ncompute_capabilities = []", "name at least one"),
        ("[tensorrt]\ncapacity = 1300", r"tensorrt.capacity is 1300: it must be a multiple of 64"),
        ("[tensorrt]\ncompute_capabilities = [8.6]", r"compute_capabilities\[0\] is 8.6, which is not of type str"),
    ],
)
def test_a_mistake_in_a_tensorrt_recipe_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    precision = "" if "precision" in text else "precision = 'fp16'\n"
    path.write_text(f'name = "x"\ntarget = "tensorrt-rtx"\n{precision}{text}\n')
    with pytest.raises(ConfigError, match=message) as caught:
        Recipe.load(path)
    assert str(path) in str(caught.value)


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

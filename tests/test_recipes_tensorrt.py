"""Recipes of the TensorRT targets: what each takes, and what is said of the rest; graphs for plugins in 16 bits."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from test_plain_flavour import Exported
from toy import AR, GROUPED, toy_config

from mosear.backends.tensorrt_load import Device, check_engine, serves
from mosear.config import MoSEConfig, Statistic
from mosear.config import Target as Linear
from mosear.contract import DECODER, parts
from mosear.errors import ConfigError, EngineError
from mosear.recipe import Compatibility, Heads, Mechanisms, Precision, Recipe, Target, TensorRT
from mosear_export import build_tensorrt, preflight, tensorrt_graph
from mosear_export.ops import DOMAIN

RECIPES = Path(__file__).parents[1] / "export" / "recipes"
PLUGINS = TensorRT(compute_capabilities=("9.0",), mechanisms=Mechanisms.PLUGINS)


def recipe(plans: TensorRT = PLUGINS, **changes: Any) -> Recipe:  # Any: a field of Recipe each
    return Recipe(
        **{"name": "mine", "target": Target.TENSORRT, "precision": Precision.FP16, "tensorrt": plans, **changes}
    )


def test_every_recipe_in_the_repository_can_be_read() -> None:
    found = {path.stem: Recipe.load(path) for path in RECIPES.glob("*.toml")}
    assert all(name == made.name for name, made in found.items())
    assert {made.target for made in found.values()} == set(Target)
    assert found["trt-fp16"].plans.mechanisms is Mechanisms.PLUGINS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": Precision.FP8}, r"precision is fp8; target tensorrt takes fp16, bf16"),
        ({"compute_capabilities": ("8.9", "9.0")}, r"is \['8\.9', '9\.0'\]: the target tensorrt builds on the GPU that will run"),
        ({"compute_capabilities": ("7.5",)}, r"has '7\.5': the target tensorrt serves 8\.0, 8\.6, 8\.9, 9\.0, 10\.0, 12\.0"),
        ({"compatibility": Compatibility.AMPERE_PLUS}, r"our kernels in a plan are those of one chip: set tensorrt\.mechanisms"),
        ({"target": Target.TENSORRT_RTX, "compute_capabilities": ("8.9",)}, r"mechanisms is plugins, which TensorRT-RTX"),
        (
            {"target": Target.TENSORRT_RTX, "compute_capabilities": ("8.9",), "mechanisms": Mechanisms.OPERATORS,
             "compatibility": Compatibility.SAME_COMPUTE_CAPABILITY},
            r"compatibility is same_compute_capability, which TensorRT-RTX has not: name each chip",
        ),
        (
            {"target": Target.TENSORRT_RTX, "mechanisms": Mechanisms.OPERATORS, "compute_capabilities": ("9.0",)},
            r"has '9\.0': the target tensorrt-rtx serves 8\.0, .*9\.0 and 10\.0, the data-centre chips, need the target tensorrt",
        ),
        ({"target": Target.ONNXRUNTIME_CPU, "precision": Precision.FP32}, r"a \[tensorrt\] table is for the targets"),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_be_built_is_refused(changes: dict[str, Any], message: str) -> None:
    of_plans = {key: value for key, value in changes.items() if key in TensorRT.__slots__}
    others = {key: value for key, value in changes.items() if key not in of_plans}
    with pytest.raises(ConfigError, match=message):
        recipe(dataclasses.replace(PLUGINS, **of_plans), **others)


def test_chips_that_a_compatible_plan_runs_on() -> None:
    record = recipe().record()
    assert serves(record, ["9.0"], "9.0") and not serves(record, ["9.0"], "8.9")
    plans = TensorRT(compute_capabilities=("9.0",), compatibility=Compatibility.AMPERE_PLUS)
    wide = recipe(plans).record()
    assert serves(wide, ["9.0"], "8.0") and serves(wide, ["9.0"], "12.0") and not serves(wide, ["9.0"], "7.5")


@pytest.mark.parametrize(
    ("device", "message"),
    [
        (Device(compute_capability=None, reason="no NVIDIA driver here"), r"9\.0.*: no NVIDIA driver here: build"),
        (Device(compute_capability="8.9", multiprocessors=58), r"9\.0.*this one is 8\.9: build there, or name"),
    ],
)  # fmt: skip
def test_a_build_on_another_gpu_is_refused(
    device: Device, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_tensorrt, "first_device", lambda: device)
    part = parts(toy_config())[DECODER]
    with pytest.raises(EngineError, match=message):
        build_tensorrt.on_gpu(recipe(), part, tmp_path)
    monkeypatch.setattr(preflight, "first_device", lambda: device)
    (finding,) = preflight._gpu(recipe())
    assert finding.stops and finding.mend


def test_a_job_names_the_kernels_the_gpu_and_the_timings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_tensorrt, "first_device", lambda: Device(compute_capability="9.0", multiprocessors=132))
    table = parts(toy_config())
    given = build_tensorrt.on_gpu(recipe(), table[DECODER], tmp_path)
    assert (given["plugins"].arch, given["plugins"].multiprocessors) == (90, 132) and given["compatibility"] == "none"
    assert given["timing_cache"].name.startswith("timings-sm90-") and given["timing_cache"].parent == tmp_path
    assert build_tensorrt.on_gpu(recipe(), table["voice"], tmp_path)["plugins"] is None
    rtx = recipe(TensorRT(), target=Target.TENSORRT_RTX)
    assert build_tensorrt.on_gpu(rtx, table[DECODER], tmp_path) == {}


@pytest.fixture(scope="module")
def decoder(shared: Path) -> Exported:
    backbone = dataclasses.replace(GROUPED, head_size=64, heads=4, kv_heads=2)
    mose = MoSEConfig(targets=(Linear.Q_PROJ, Linear.V_PROJ), rank=3, experts=2)  # as in plugins/test_flavour
    config = toy_config(backbone=backbone, ar=dataclasses.replace(AR, statistic=Statistic.MEAN), mose=mose)
    return Exported(config, DECODER, shared)


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
@pytest.mark.parametrize("heads", list(Heads))
def test_plugin_nodes_take_16_bits_where_kernels_compute_and_fp32_elsewhere(
    precision: Precision, heads: Heads, decoder: Exported
) -> None:
    """Types through the whole graph, by ONNX's own inference with our nodes' schemas; the cache is never widened."""
    config, part = decoder.model.config, parts(decoder.model.config)[DECODER]
    made = recipe(precision=precision, heads=heads)
    model, kept = tensorrt_graph.prepare_plugin_decoder(
        onnx.load(decoder.path), config, made, dict(decoder.heads), part
    )
    half = TensorProto.FLOAT16 if precision is Precision.FP16 else TensorProto.BFLOAT16
    onnx.checker.check_model(model, full_check=False)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, check_type=True)
    types = {
        v.name: v.type.tensor_type.elem_type
        for v in (*inferred.graph.value_info, *model.graph.input, *model.graph.output)
    }
    types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    assert {node.op_type for node in nodes} == {"AttentionSplit", "AttentionFinish", "ExpertsShrink", "ExpertsExpand"}
    kinds = tensorrt_graph.typed_operators()
    for node in nodes:
        for name, narrow in zip(node.input, kinds[node.op_type][0], strict=True):
            wanted = {half} if narrow else {TensorProto.FLOAT, TensorProto.INT32, 0}
            assert types.get(name, 0) in wanted | {0}, (node.name, name, types.get(name))
    cache = {name for pair in part.state for name in pair}
    assert {types[name] for name in cache} == {half}
    assert not [node for node in model.graph.node if node.op_type == "Cast" and cache & set(node.input)]
    assert bool(kept) == (heads is Heads.INPUTS)
    if kept:
        assert types["layers.0.q_proj.a"] == half and types["layers.0.ar_params"] == TensorProto.FLOAT
        assert set(kept) == {value.name for value in model.graph.input} & set(decoder.heads)


def test_an_engine_of_another_module_is_refused(tmp_path: Path) -> None:
    """Version, chip and hashes are asked for whichever module built it."""
    from test_tensorrt_builder import engine

    manifest = engine(tmp_path)
    device = Device(compute_capability="8.9")
    with pytest.raises(EngineError, match=r"needs tensorrt None, which is not installed: pip install"):
        check_engine(tmp_path, manifest, module="tensorrt", version=None, device=device)


def test_heads_are_numbers_of_the_plans_type() -> None:
    value = np.array([1.00001], np.float32)
    assert tensorrt_graph.stored_head(value, "layers.0.q_proj.a", recipe()).dtype == np.float16

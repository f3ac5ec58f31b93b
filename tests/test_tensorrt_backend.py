"""Engines of both TensorRT targets, answering: their own graphs and profiles on a stand-in for TensorRT's runtime and a GPU.

What is real: the backend, its calls of runtime and driver, addresses, types, profiles, cuts of calls. What is not: the GPU.
"""

import dataclasses
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import stand_in_tensorrt as stand_in
from onnx import TensorProto
from toy import decoder_inputs
from toy_engine import LIMITS, Folders

from mosear.artifacts import CONFIG
from mosear.backends.cuda_driver import Driver
from mosear.backends.tensorrt_backend import TensorRTBackend
from mosear.backends.tensorrt_builder import MODULES, profile
from mosear.backends.tensorrt_decoder import PlanDecoder
from mosear.backends.tensorrt_plans import from_plan, to_plan
from mosear.config import ModelConfig
from mosear.contract import DECODER, Tensors, parts
from mosear.engine import Engine
from mosear.errors import EngineError
from mosear.recipe import Mechanisms, Precision, Recipe, Target, TensorRT
from mosear.runtime.request import Request
from mosear_export import build_tensorrt, tensorrt_graph
from mosear_export.golden_plans import check_on_gpu

COMPILER = shutil.which("cc") or shutil.which("gcc")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler, for a stand-in of CUDA's driver")
KINDS = {
    TensorProto.FLOAT: "FLOAT", TensorProto.FLOAT16: "HALF", TensorProto.BFLOAT16: "BF16", TensorProto.INT32: "INT32",
    TensorProto.UINT8: "UINT8", TensorProto.INT64: "INT64",
}  # fmt: skip
SIZES = {"capacity": 640, "prefill_batch": 2, "prefill_rows": 16, "decode_batch": 3}
FEW = dataclasses.replace(LIMITS, new_tokens=200)
RECIPES = {
    "tensorrt-rtx": Recipe(
        name="rtx", target=Target.TENSORRT_RTX, precision=Precision.FP16, limits=FEW,
        tensorrt=TensorRT(compute_capabilities=("8.9",), **SIZES),
    ),
    "tensorrt": Recipe(
        name="trt", target=Target.TENSORRT, precision=Precision.BF16, limits=FEW,
        tensorrt=TensorRT(compute_capabilities=("9.0",), mechanisms=Mechanisms.PLUGINS, **SIZES),
    ),
}  # fmt: skip
# RMS error of an output relative to its RMS, that 16 bits bring on the toy (tests/test_tensorrt_graph.py).
TOLERANCE = {Precision.FP16: 0.05, Precision.BF16: 0.35}


def write_plans(recipe: Recipe, onnx_folder: Path, folder: Path, config: ModelConfig) -> Path:
    """Stand-ins' plans: the graphs that the builder would be given, with their types and profiles."""
    folder.mkdir(parents=True)
    for name, part in parts(config).items():
        if name == DECODER and recipe.plans.mechanisms is Mechanisms.PLUGINS:
            kinds = {}  # plugin nodes take head sizes that the toy has not: the types are those of the emulated graph
        else:
            real, _ = build_tensorrt._prepared(recipe, onnx_folder, part, config)
            kinds = types(real)
        model, heads = build_tensorrt._prepared(recipe, onnx_folder, part, config, emulate=True)
        if not kinds:
            narrow = {n for pair in part.state for n in pair} | {n for n in heads if n.endswith((".a", ".b", ".gate"))}
            kinds = types(model) | dict.fromkeys(narrow, "BF16")
        tensorrt_graph.fix_axis(model, "L", recipe.plans.capacity)
        shapes = tensorrt_graph.shapes(model)
        ranges = [profile(part, shapes, sizes) for sizes in build_tensorrt.profiles(part, config, recipe)]
        data = stand_in.plan_bytes(model.SerializeToString(), kinds, ranges if ranges[0] else [])
        (folder / f"{name}.plan").write_bytes(data)
    return folder


def types(model: onnx.ModelProto) -> dict[str, str]:
    return {v.name: KINDS[v.type.tensor_type.elem_type] for v in (*model.graph.input, *model.graph.output)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """A backend on the stand-ins, and the CPU's engine of the same export."""

    recipe: Recipe
    backend: TensorRTBackend
    engine: Engine
    library: Path

    @property
    def config(self) -> ModelConfig:
        return self.engine.config

    def near(self, found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any], what: str) -> None:
        error = float(np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted.astype(np.float64) ** 2)))
        assert error <= TOLERANCE[self.recipe.precision], (what, error)


@pytest.fixture(scope="module", params=RECIPES)
def loaded(
    request: pytest.FixtureRequest, folders: Folders, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Loaded]:
    recipe, root = RECIPES[request.param], tmp_path_factory.mktemp("stand_in")
    config, module = ModelConfig.load(folders.onnx / CONFIG), MODULES[recipe.target]
    plans, library = (
        write_plans(recipe, folders.onnx, root / "plans", config),
        stand_in.driver_library(root, str(COMPILER)),
    )
    _, heads = build_tensorrt._prepared(recipe, folders.onnx, parts(config)[DECODER], config, emulate=True)
    with pytest.MonkeyPatch.context() as patch, Engine(folders.engine) as engine:
        patch.setitem(sys.modules, module, stand_in.module(module))
        backend = TensorRTBackend(plans, config, module=module, heads=heads, driver=Driver(str(library)))
        yield Loaded(recipe=recipe, backend=backend, engine=engine, library=library)
        backend.close()
        assert stand_in.live(library) == 0


def call(config: ModelConfig, **changes: Any) -> Tensors:
    """A decoder call as the contract has it, without cache."""
    cached = {name for name, _ in parts(config)[DECODER].state}
    tensors = decoder_inputs(config, **changes)
    return {name: value.numpy() for name, value in tensors.items() if name not in cached}


def compare(loaded: Loaded, found: Tensors, wanted: Tensors, tensors: Tensors) -> None:
    """Logits, gates and, where rows are reallocated, masses of the rows that are real."""
    live, position = tensors["position"] >= 0, tensors["position"]
    loaded.near(found["logits"][live], wanted["logits"][live], "logits")
    gates = [out["expert_weights"].transpose(0, 2, 1, 3)[live] for out in (found, wanted)]
    loaded.near(gates[0], gates[1], "gates")
    given = live & (position >= tensors["first_row"][:, None])
    for name in ("mass_before", "mass_after") if given.any() else ():
        rows = [out[name].transpose(0, 3, 1, 2, 4)[given] for out in (found, wanted)]
        loaded.near(rows[0], rows[1], name)


@pytest.mark.parametrize(
    ("rows", "lengths", "first_row"),
    [
        (1, [1, 1, 1], [0, 0, 0]),
        pytest.param(9, [9, 9, 9], [8, 8, 8], marks=pytest.mark.full),
        pytest.param(9, [9, 9, 9], [99, 99, 99], marks=pytest.mark.full),  # a piece of a prompt that goes on
        (40, [40, 40, 40], [39, 39, 39]),  # more rows than the profile takes
        (6, [6, 6, 6], [2, 3, 2]),  # a label behind its prompt: rows that are reallocated, one by one
        pytest.param(9, [9, 6, 1], [8, 5, 0], marks=pytest.mark.full),  # padding rows
        (9, [9, 6, 4], [4, 4, 2]),  # both
    ],
)
def test_a_call_gives_what_the_cpu_gives(loaded: Loaded, rows: int, lengths: list[int], first_row: list[int]) -> None:
    """Then one more row of each sequence, on the cache that the call has written."""
    ours, theirs = (b.start(batch=3, capacity=64) for b in (loaded.backend, loaded.engine.backend))
    first = np.array(first_row, np.int32)
    tensors = call(loaded.config, batch=3, rows=rows, capacity=64, lengths=lengths) | {"first_row": first}
    tensors["logit_row"] = np.tile(np.arange(rows, dtype=np.int32), (3, 1))[:, -9:]
    wanted = theirs.step(tensors)
    found = ours.step(tensors)
    last = tensors | {"position": np.take_along_axis(tensors["position"], tensors["logit_row"], 1)}
    shown = slice(rows - tensors["logit_row"].shape[1], None)
    compare(loaded, trimmed(found, shown), trimmed(wanted, shown), last)
    step = call(loaded.config, batch=3, rows=1, capacity=64, start=lengths) | {"first_row": first}
    compare(loaded, ours.step(step), theirs.step(step), step)


def trimmed(outputs: Tensors, shown: slice) -> Tensors:
    """The rows whose logits were asked for."""
    gates, masses = (
        outputs["expert_weights"][:, :, shown],
        {n: outputs[n][:, :, :, shown] for n in ("mass_before", "mass_after")},
    )
    return {
        "logits": np.array(outputs["logits"]),
        "expert_weights": np.array(gates),
        **{n: np.array(v) for n, v in masses.items()},
    }


def test_rows_are_moved_cleared_and_kept(loaded: Loaded) -> None:
    """A sequence that was moved, and one behind a new capacity, go on as on the CPU; blocks of rows are told apart."""
    states = [backend.start(batch=3, capacity=64) for backend in (loaded.backend, loaded.engine.backend)]
    whole = call(loaded.config, batch=3, rows=7, capacity=64, lengths=[7, 7, 7])
    whole |= {"first_row": np.full(3, 6, np.int32), "logit_row": np.full((3, 1), 6, np.int32)}
    one = {name: value[:1] for name, value in whole.items()}
    two = {name: value[1:] for name, value in whole.items()}
    step = call(loaded.config, batch=3, rows=1, capacity=64, start=[7, 7, 7]) | {"first_row": whole["first_row"]}
    found = []
    for state in states:
        state.step(one, first=0)
        state.step(two, first=1)
        state.move(2, 0, 7)
        state.clear(2)
        state.resize(128, rows=2, length=7)
        wide = {**step, "key_group": np.pad(step["key_group"], ((0, 0), (0, 64)))}
        order = {name: value[[2, 1]] for name, value in wide.items()}
        found.append({name: np.array(value) for name, value in state.step(order, first=0).items()})
    compare(loaded, found[0], found[1], {name: value[[2, 1]] for name, value in step.items()})


def test_golden_outputs_are_met_in_both_profiles(
    loaded: Loaded, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a build on a GPU asks; and where the decode profile alone computes something else, that is named."""
    limit = build_tensorrt.TOLERANCE[loaded.recipe.precision]
    errors = check_on_gpu(loaded.backend, folders.onnx, loaded.config, limit=limit)
    assert {"decoder.prefill.logits", "decoder.decode.mass_after", "voice.voice_features"} <= errors.keys()
    run = PlanDecoder._run

    def wrong(state: PlanDecoder, tensors: Tensors, piece: Any, profile: int, first: int) -> Tensors:
        found = run(state, tensors, piece, profile, first)
        return found if profile == 0 else found | {"logits": found["logits"][..., ::-1]}

    monkeypatch.setattr(PlanDecoder, "_run", wrong)
    with pytest.raises(EngineError, match=r"decoder\.decode\.logits on this GPU differs from the reference by"):
        check_on_gpu(loaded.backend, folders.onnx, loaded.config, limit=limit)


def test_every_task_is_answered(loaded: Loaded, clip: bytes) -> None:
    """From a clip's bytes to scores, words and masses, by every part."""
    other = loaded.engine.on(loaded.backend)
    for task in ("classify", "conflict", "reason"):
        request = Request(task=task, video=clip, words="well then", strength=0.6, max_tokens=6)
        ours, theirs = other.answer(request), loaded.engine.pipeline.answer(request)
        np.testing.assert_allclose(ours.modality_mass.sum(-1), 1.0, atol=1e-3)
        loaded.near(ours.modality_mass, theirs.modality_mass, "masses")
        if task != "reason":
            assert ours.joint and theirs.joint
            pairs = [(ours.joint.scores[name], score) for name, score in theirs.joint.scores.items()]
            loaded.near(np.array([a for a, _ in pairs]), np.array([b for _, b in pairs]), "scores")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch": 4, "capacity": 64}, "4 sequences are wanted at once, the plan takes 3: raise tensorrt.decode_batch"),
        ({"batch": 1, "capacity": 704}, "704 cache slots are wanted, the plan has 640: raise tensorrt.capacity"),
    ],
)
def test_what_a_plan_does_not_serve_is_refused(loaded: Loaded, wrong: dict[str, int], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        loaded.backend.start(**wrong)


def test_a_shape_outside_the_profile_is_refused(loaded: Loaded) -> None:
    mel = np.zeros((9, loaded.config.voice.mels, 20), np.float32)
    with pytest.raises(
        EngineError, match=r"voice\.plan: input mel is \[9, 8, 20\], its profile goes from \[1, 8, 4\] to"
    ):
        loaded.backend.run("voice", {"mel": mel, "voice_frames": np.full(9, 20, np.int32)})


def test_a_plan_that_the_library_does_not_take_is_refused(folders: Folders, loaded: Loaded, tmp_path: Path) -> None:
    for name in loaded.backend.parts:
        (tmp_path / f"{name}.plan").write_bytes(b"not a plan")
    with pytest.raises(
        EngineError, match=r"voice\.plan cannot be loaded, TensorRT's log says why: build the engine again"
    ):
        TensorRTBackend(
            tmp_path, loaded.config, module=MODULES[loaded.recipe.target], heads={}, driver=Driver(str(loaded.library))
        )


def test_numbers_become_bf16_and_back() -> None:
    """To nearest, ties to even, as hardware does."""
    values = np.array([1.0, 1.00390625, 1.01171875, -3.14159, 1e30, 0.0], np.float32)
    found = from_plan(to_plan(values, "BF16"), "BF16")
    np.testing.assert_array_equal(found, values.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_a_machine_without_a_gpu_says_so() -> None:
    with pytest.raises(EngineError, match=r"no NVIDIA driver here \(libcuda_none\.so is not found\): run this on"):
        Driver("libcuda_none.so")


def test_a_full_gpu_says_so(loaded: Loaded) -> None:
    with pytest.raises(EngineError, match=r"refused cuMemAlloc_v2 \(error 2\): the GPU's memory is full"):
        loaded.backend.driver.allocate(1 << 40)

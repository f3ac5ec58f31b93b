"""Plans really built by TensorRT-RTX, without a GPU; and what is said where that fails."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mosear.artifacts import Manifest
from mosear.backends import tensorrt_builder
from mosear.backends.tensorrt_builder import RTX, Job, build_plan
from mosear.backends.tensorrt_load import Device, check_engine, first_device, installed_version
from mosear.backends.tensorrt_plan import read_plan
from mosear.errors import EngineError

HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT
ROWS = {"x": ((1, 64), (4, 64), (8, 64))}


def linear(*, extra: list[onnx.NodeProto] | None = None, inputs: tuple[str, ...] = ("x",)) -> onnx.ModelProto:
    """y = x @ w, [B, 64]."""
    weight = numpy_helper.from_array(np.ones((64, 64), np.float16), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="layers.3/y"), *(extra or [])]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info(name, HALF, ["B", 64]) for name in inputs],
        [helper.make_tensor_value_info(nodes[-1].output[0], HALF, ["B", 64])], [weight],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)


def job(folder: Path, model: onnx.ModelProto, **changes: Any) -> Job:  # Any: a field of Job each
    path = folder / "part.onnx"
    onnx.save(model, path)
    made = Job(
        part="decoder", onnx=path, plan=folder / "part.plan", profiles=(ROWS,), compute_capabilities=("8.6", "8.9"),
        memory_mb=4096,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def refusal(made: Job) -> str:
    with pytest.raises(EngineError) as caught:
        build_plan(made, lambda line: None)
    assert not made.plan.exists() and not list(made.plan.parent.glob(".job-*"))
    return str(caught.value)


def test_a_plan_is_built_and_read(tmp_path: Path) -> None:
    lines: list[str] = []
    ballast = b"x" * (800 << 20)  # this process's memory is not the child's
    built = build_plan(job(tmp_path, linear()), lines.append)
    assert built.plan.chips == ("8.6", "8.9") and built.version == installed_version(RTX)
    assert built.inputs == {"x": ["HALF", [-1, 64]]} and built.outputs == {"y": ["HALF", [-1, 64]]}
    assert 100 < built.memory_mb < 600 < len(ballast) / 2**20
    (program,) = built.plan.programs
    assert [(kernel.kind, kernel.nodes, kernel.layer) for kernel in program.kernels] == [
        ("fully_connected", ("layers.3/y",), 3)
    ]
    assert program.weight_bytes == {"half": 64 * 64 * 2, "float": 8} and program.fused_attentions == 0
    assert (
        lines == ["engine: decoder: compiling kernels"] and built.plan.size == (tmp_path / "part.plan").stat().st_size
    )


def test_the_same_graph_gives_the_same_bytes(tmp_path: Path) -> None:
    plans = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        build_plan(job(tmp_path / name, linear()), lambda line: None)
        plans.append((tmp_path / name / "part.plan").read_bytes())
    assert plans[0] == plans[1]


def test_an_operator_that_tensorrt_lacks_is_named(tmp_path: Path) -> None:
    strange = helper.make_node("Bernoulli2", ["y"], ["z"], name="strange")
    said = refusal(job(tmp_path, linear(extra=[strange])))
    assert said.startswith("decoder for 8.6, 8.9 cannot be built: TensorRT has no operator Bernoulli2: write it in")


def test_fp8_is_refused_by_a_chip_without_it(tmp_path: Path) -> None:
    model = linear()
    scale, narrow = np.float16(1.0), np.ones((64, 64), ml_dtypes.float8_e4m3fn)
    del model.graph.initializer[:]
    model.graph.initializer.extend(
        [numpy_helper.from_array(narrow, "w8"), numpy_helper.from_array(np.array(scale), "s")]
    )
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s"], ["x8"], output_dtype=TensorProto.FLOAT8E4M3FN),
        helper.make_node("DequantizeLinear", ["x8", "s"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w8", "s"], ["w"]),
        helper.make_node("MatMul", ["xd", "w"], ["y"]),
    ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    said = refusal(job(tmp_path, model))
    assert "the chip sm86 has no fp8_e4m3: choose another precision, or leave the chip out" in said
    built = build_plan(job(tmp_path, model, compute_capabilities=("8.9",)), lambda line: None)
    assert built.plan.programs[0].weight_bytes == {"fp8_e4m3": 64 * 64, "float": 8}


def test_an_input_that_is_ignored_fails_the_build(tmp_path: Path) -> None:
    said = refusal(job(tmp_path, linear(inputs=("x", "idle")), profiles=({**ROWS, "idle": ROWS["x"]},)))
    assert "TensorRT ignores the input idle: the plan would answer as if nothing were given" in said


def test_a_profile_that_does_not_fit_is_named(tmp_path: Path) -> None:
    assert "a profile does not fit the graph" in refusal(job(tmp_path, linear(), profiles=({"x": ((1, 63),) * 3},)))


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    """The builder itself calls such a plan built."""
    plan = tmp_path / "part.plan"
    plan.symlink_to("/dev/full")
    said = refusal(job(tmp_path, linear()))
    assert "the plan cannot be written to" in said and "No space left" in said and "free some space" in said


def test_a_bound_on_memory_holds(tmp_path: Path) -> None:
    said = refusal(job(tmp_path, linear(), memory_mb=60))
    assert "the builder had not enough memory (tensorrt.builder_memory_mb is 60)" in said


@pytest.mark.parametrize(
    ("death", "message"),
    [
        ("os.kill(os.getpid(), 9)", r"the builder died (SIGKILL); the machine may have run out of memory"),
        ("os.kill(os.getpid(), 11)", "the builder died (SIGSEGV)"),
        ("os.abort()", "the builder died (SIGABRT)"),
        ("os._exit(3)", "the builder ended with status 3"),
        ("raise ValueError('so it goes')", "so it goes"),
    ],
)
def test_a_build_that_dies_is_named(
    death: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    (tmp_path / "dying_builder.py").write_text(
        f"import os, sys\nprint('last words', file=sys.stderr, flush=True)\n{death}\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[1] / 'engine'}")
    monkeypatch.setattr(tensorrt_builder, "unusable", lambda module: "")
    (tmp_path / "build").mkdir()
    said = refusal(job(tmp_path / "build", linear(), module="dying_builder"))
    assert message in said and "decoder for 8.6, 8.9" in said and "last words" in said


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_builder, "unusable", lambda module: f"{module} is not installed")
    assert "tensorrt_rtx is not installed, which builds this target: pip install" in refusal(job(tmp_path, linear()))


@pytest.mark.parametrize("damage", [lambda data: data[:2000], lambda data: b"xxxx" + data[4:], lambda data: b""])
def test_a_damaged_plan_is_no_plan(damage: Any, tmp_path: Path) -> None:  # Any: bytes to bytes
    build_plan(job(tmp_path, linear()), lambda line: None)
    plan = tmp_path / "part.plan"
    plan.write_bytes(damage(plan.read_bytes()))
    with pytest.raises(EngineError, match=r"part\.plan (is no TensorRT-RTX plan|holds no listing|cannot be read)"):
        read_plan(plan)


def engine(folder: Path) -> Manifest:
    (folder / "decoder.plan").write_bytes(b"vtrt")
    from mosear.artifacts import folder_hashes

    manifest = Manifest(
        kind="engine", key="k", inputs={"recipe": {"name": "mine"}, RTX: "1.7.1.116"}, files=folder_hashes(folder),
        notes={"compute_capabilities": ["8.6", "8.9"]},
    )  # fmt: skip
    manifest.save(folder)
    return manifest


ADA, NOTHING = Device(compute_capability="8.9"), Device(compute_capability=None, reason="no NVIDIA driver here")


def test_an_engine_that_fits_passes_its_checks(tmp_path: Path) -> None:
    check_engine(tmp_path, engine(tmp_path), module=RTX, version="1.7.1.116", device=ADA)


@pytest.mark.parametrize(
    ("version", "device", "message"),
    [
        ("1.8.0", ADA, r"was built by tensorrt_rtx 1\.7\.1\.116, found 1\.8\.0.*--recipe export/recipes/mine\.toml"),
        (None, ADA, r"needs tensorrt_rtx 1\.7\.1\.116, which is not installed: pip install"),
        (
            "1.7.1.116",
            Device(compute_capability="9.0"),
            r"built for compute capability 8\.6, 8\.9, found 9\.0: name it",
        ),
        ("1.7.1.116", NOTHING, r"needs a GPU of compute capability 8\.6, 8\.9: no NVIDIA driver here"),
    ],
)
def test_an_engine_of_another_version_or_chip_is_refused(
    version: str | None, device: Device, message: str, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match=message):
        check_engine(tmp_path, engine(tmp_path), module=RTX, version=version, device=device)


def test_an_altered_plan_is_refused_before_it_is_read(tmp_path: Path) -> None:
    manifest = engine(tmp_path)
    (tmp_path / "decoder.plan").write_bytes(b"vtrT")
    with pytest.raises(EngineError, match=r"decoder\.plan was altered: expected sha256 .*: build it again: python"):
        check_engine(tmp_path, manifest, module=RTX, version="1.7.1.116", device=ADA)


def test_a_machine_without_a_driver_says_so() -> None:
    device = first_device()
    assert device.compute_capability or "driver" in device.reason
    assert json.dumps(dataclasses.asdict(device))

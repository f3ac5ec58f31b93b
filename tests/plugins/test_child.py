"""What the builder's child asks of TensorRT 11, on its real bindings (`offline_child.py`); and what becomes of its answers."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bindings
import pytest

from mosear.backends import tensorrt_builder
from mosear.backends.tensorrt_builder import Job, Plugins
from mosear.backends.tensorrt_child import network_flags
from mosear.backends.tensorrt_plan import inspected_plan
from mosear.errors import EngineError

needs_bindings = pytest.mark.skipif(bool(bindings.missing()), reason=bindings.missing())
RANGES = {"x": [[1, 2], [2, 2], [4, 2]]}


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bindings.stand_ins(tmp_path_factory.mktemp("libraries"))


def build(folder: Path, libraries: Path, *, takes_timings: bool = True, level: str = "NONE", **changes: Any) -> Any:
    job = {
        "module": "tensorrt", "onnx": "graph.onnx", "plan": str(folder / "part.plan"), "memory_mb": 100,
        "compute_capabilities": [], "profiles": [RANGES, RANGES], "compatibility": "none",
        "plugins": {"module": "recorded_plugins", "arch": 90, "multiprocessors": 132},
        "timing_cache": str(folder / "timings.cache"), **changes,
    }  # fmt: skip
    asked = json.dumps({"folder": str(folder), "job": job, "takes_timings": takes_timings, "level": level})
    return bindings.child("offline_child.py", asked, libraries=libraries)


@needs_bindings
def test_the_network_the_limits_and_the_plan_are_as_the_job_says(tmp_path: Path, libraries: Path) -> None:
    told = build(tmp_path, libraries)
    names = [line[0] for line in told["asked"]]
    assert told["status"] == 0 and (tmp_path / "part.plan").read_bytes() == b"plan"
    assert names.index("register") < names.index("OnnxParser")
    asked = {line[0]: line[1:] for line in told["asked"]}
    assert json.loads(asked["register"][0]) == {"arch": 90, "multiprocessors": 132}
    assert asked["Builder.create_network"] == [str(1 << 0 | 1 << 2)]  # strongly typed, plugins ahead of time
    assert asked["IBuilderConfig.set_memory_pool_limit"] == ["MemoryPoolType.WORKSPACE", str(100 << 20)]
    assert asked["IBuilderConfig.hardware_compatibility_level ="] == ["HardwareCompatibilityLevel.NONE"]
    assert names.count("IBuilderConfig.add_optimization_profile") == 2
    assert asked["IOptimizationProfile.set_shape"] == ["x", *map(str, RANGES["x"])]
    (built,) = [line for line in told["said"] if "built" in line]
    assert built["read_back"]["compatibility"] == "none" and built["read_back"]["profiles"] == 2
    assert built["inputs"] == {"x": ["HALF", [1, 2]]}


@needs_bindings
@pytest.mark.parametrize("level", ["AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"])
def test_compatibility_is_asked_for_and_read_back(level: str, tmp_path: Path, libraries: Path) -> None:
    told = build(tmp_path, libraries, compatibility=level.lower(), level=level)
    assert ["IBuilderConfig.hardware_compatibility_level =", f"HardwareCompatibilityLevel.{level}"] in told["asked"]
    assert told["said"][-1]["read_back"]["compatibility"] == level.lower()


@needs_bindings
def test_timings_are_kept_and_used_again(tmp_path: Path, libraries: Path) -> None:
    """The first build begins with none, the next with what the first left; those of another GPU are told and dropped."""
    created = [build(tmp_path, libraries)["asked"] for _ in range(2)]
    made = [[line[1] for line in lines if line[0] == "IBuilderConfig.create_timing_cache"] for lines in created]
    assert made == [["b''"], ["b'timings'"]] and (tmp_path / "timings.cache").read_bytes() == b"timings"
    told = build(tmp_path, libraries, takes_timings=False)
    assert [line[1] for line in told["asked"] if line[0] == "IBuilderConfig.create_timing_cache"] == [
        "b'timings'",
        "b''",
    ]
    assert any("another GPU or TensorRT: timings are taken anew" in str(line) for line in told["said"])
    assert {path.name for path in tmp_path.iterdir()} == {"part.plan", "timings.cache"}


@needs_bindings
def test_without_the_library_the_child_says_what_is_missing(tmp_path: Path) -> None:
    """In a process that does not find it."""
    job = Job(
        part="voice", onnx=tmp_path / "a.onnx", plan=tmp_path / "a.plan", profiles=(), compute_capabilities=("9.0",),
        memory_mb=100, module="tensorrt",
    )  # fmt: skip
    with pytest.raises(
        EngineError, match=r"tensorrt is installed without its library \(libnvinfer\.so\.11 is not found\)"
    ):
        tensorrt_builder.build_plan(job, print)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorrt_builder, "unusable", lambda module: "")
        with pytest.raises(
            EngineError, match=r"voice for 9\.0: tensorrt cannot be loaded \(libnv.*pip install 'mosear-engine"
        ):
            tensorrt_builder.build_plan(job, print)
    assert list(tmp_path.iterdir()) == []


def test_flags_follow_the_library() -> None:
    """tensorrt 10.3 knows no ahead-of-time plugins; one that knows neither gets none."""
    old = SimpleNamespace(
        NetworkDefinitionCreationFlag=SimpleNamespace(__members__={"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1})
    )
    assert network_flags(old) == 2
    assert network_flags(SimpleNamespace(NetworkDefinitionCreationFlag=SimpleNamespace(__members__={}))) == 0


def test_a_plan_that_is_not_as_asked_is_refused(tmp_path: Path) -> None:
    job = Job(
        part="decoder", onnx=tmp_path, plan=tmp_path, profiles=({}, {}), compute_capabilities=("9.0",), memory_mb=1,
        module="tensorrt", plugins=Plugins(module="m", arch=90, multiprocessors=1), compatibility="ampere_plus",
    )  # fmt: skip
    right: dict[str, object] = {"compatibility": "ampere_plus", "profiles": 2}
    assert tensorrt_builder._judged(job, right) == right
    with pytest.raises(EngineError, match="decoder: compatibility of the plan is none, ampere_plus was asked for"):
        tensorrt_builder._judged(job, right | {"compatibility": "none"})
    with pytest.raises(EngineError, match="decoder: profiles of the plan is 1, 2 was asked for"):
        tensorrt_builder._judged(job, right | {"profiles": 1})


def test_an_inspectors_layers_become_a_report(tmp_path: Path) -> None:
    plan = tmp_path / "a.plan"
    plan.write_bytes(b"plan")
    layer = {
        "Name": "a",
        "LayerType": "Plugin",
        "TacticName": "AttentionFinish",
        "Metadata": "[ONNX Layer: layers.3/x]",
    }
    found = inspected_plan(
        plan, [layer, layer | {"Name": "b [profile 1]", "TacticName": ""}, "c [profile 1]"], ("9.0",)
    )
    assert found.chips == ("9.0",) and found.size == 4 and [len(p.kernels) for p in found.programs] == [1, 2]
    (kernel,) = found.programs[0].kernels
    assert kernel.layer == 3 and kernel.is_attention and found.programs[0].fused_attentions == 1
    assert found.programs[1].kernels[0].name == "b [profile 1]"

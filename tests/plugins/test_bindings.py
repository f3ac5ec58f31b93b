"""Our plugins on TensorRT's real Python bindings, driven as its builder would drive them (`offline.py`)."""

from typing import Any

import bindings
import pytest
from plugin_cases import BOUND, NodeCase

from mosear.kernels.plugins.op import Arithmetic, Site, Tactic

ARCH = 90
pytestmark = pytest.mark.skipif(bool(bindings.missing()), reason=bindings.missing())
KINDS = {"data": "DataType.BF16", "f32": "DataType.FLOAT", "i32": "DataType.INT32"}


# Each kernel's node once, but for runs, whose kernel is a prefill's; the others differ in sizes.
USUAL = (
    "AttentionSplit decode D64", "AttentionSplit prefill D64", "AttentionFinish decode D64", "AttentionFinish prefill D64",
    "AttentionSplitPaged decode D64", "ExpertsShrink decode one", "ExpertsExpand decode one", "ExpertsExpand decode two",
)  # fmt: skip


@pytest.fixture(
    scope="module", params=[USUAL, pytest.param(tuple(BOUND), marks=pytest.mark.full)], ids=["usual", "all"]
)
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:  # Any: JSON
    libraries = bindings.stand_ins(tmp_path_factory.mktemp("libraries"))
    return bindings.child("offline.py", str(ARCH), *request.param, libraries=libraries)


def test_definitions_register(told: Any) -> None:
    """Inputs, attributes with their types and the number of outputs are those of the definitions; each has a kernel."""
    assert told["version"].startswith("11.")
    ops = {case.op.name: case.op for case in BOUND.values()}
    assert set(told["registered"]) == {f"mosear::{name}" for name in ops}
    for name, op in ops.items():
        found = told["registered"][f"mosear::{name}"]
        assert found["inputs"] == list(op.inputs)
        assert found["attributes"] == {n: kind.__name__ for n, kind in op.attributes.items()}
        assert found["outputs"] == len(op.outputs) and found["aot"]


def test_what_is_wrong_is_refused(told: Any) -> None:
    refused = told["refused"]
    assert "does not match the expected input arg schema" in refused["signature"]
    assert "KernelError: plugin mosear::AttentionSplit cannot be registered: " in refused["again"]
    assert "KernelError: AttentionFinish has activations of DataType.INT8: kernels serve fp32" in refused["type"]
    assert "KernelError: AttentionSplit has no tactic 7: `autotune` listed [" in refused["tactic"]


def test_types_and_formats(told: Any) -> None:
    """One combination: the network's types, all linear."""
    for name, found in told["cases"].items():
        op = BOUND[name].op
        assert found["types"] == [KINDS[kind] for kind in op.outputs.values()], name
        wanted = [KINDS[kind] for kind in (*op.inputs.values(), *op.outputs.values())]
        assert found["formats"] == [[kind, "TensorFormat.LINEAR"] for kind in wanted], name


def test_types_follow_the_network(told: Any) -> None:
    for data, kind in (("fp16", "DataType.HALF"), ("fp32", "DataType.FLOAT")):
        assert told[data]["types"][0] == kind and told[data]["formats"][0] == [kind, "TensorFormat.LINEAR"]
        assert told[data]["tactics"][0]["name"] == "decode_merge"


def test_symbols_are_worth_what_the_launcher_computes(told: Any) -> None:
    """Shapes, grids and scalars as symbols, evaluated at each call, beside plain numbers (test_launches: the launchers')."""
    for name, found in told["cases"].items():
        case = BOUND[name]
        site = Site(arch=ARCH, data="bf16", attributes=case.attributes)
        for i, call in enumerate(case.calls):
            sizes = case.at(call)
            assert found["shapes"][i] == [list(shape) for shape in case.op.shapes(sizes, site, Arithmetic())], name
        assert found["tactics"], name
        geometries = [candidate_geometries(case, site, i) for i in range(len(case.calls))]
        for told_of in found["tactics"]:
            for i, launch in enumerate(told_of["calls"]):
                assert (tuple(launch["launch"][:3]), tuple(launch["scalars"])) in geometries[i], name
                assert launch["launch"][4:6] == [1, 1] and launch["launch"][6] <= 48 * 1024, name


def candidate_geometries(case: NodeCase, site: Site, i: int) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Of every tactic that the profile could have."""
    found: list[Tactic] = case.op.tactics(case.ranges(), site)
    geometries = [tactic.at(case.at(case.calls[i]), Arithmetic()) for tactic in found]
    return {(tuple(g.grid), tuple(g.scalars)) for g in geometries}


def test_a_tactics_number_names_one_kernel(told: Any) -> None:
    """Over all nodes and profiles: TensorRT keeps kernels of both profiles under their tactics' numbers."""
    kernels: dict[int, set[str]] = {}
    for found in told["cases"].values():
        for tactic in found["tactics"]:
            body = tactic["ptx"].split(".visible .entry")[1].split("{", 1)[1]
            kernels.setdefault(tactic["number"], set()).add(body)
    for number, bodies in kernels.items():
        assert len(bodies) == 1 and 0 < number < 2**31


def test_without_the_package_the_error_says_what_to_install() -> None:
    """In a process that does not find the libraries."""
    said = bindings.child("undefined.py")
    assert said.startswith("TensorRT's Python package cannot be loaded (") and said.endswith("install tensorrt 11")

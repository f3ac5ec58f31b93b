"""Clips of each kind, one rule for what is quantised, parity figures, sensitivity, and the Optimizer's door, on a toy."""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import accuracy_factory as factory
import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file
from toy_engine import RECIPE, Folders

from mosear.artifacts import Manifest
from mosear.engine import KIND, Engine
from mosear.errors import ConfigError, EngineError
from mosear.recipe import Precision
from mosear_export import build, quantise
from mosear_export.precision import clips, compare, graph, modelopt_child, optimise, run, sensitivity, short
from mosear_export.precision.clips import Case, Kind
from mosear_export.precision.run import Asker, GraphBackend, Said

LABELS = ("happy", "sad", "very angry")


@pytest.fixture(scope="module")
def engine(folders: Folders) -> Iterator[Engine]:
    with Engine(folders.engine) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def cases(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    data = factory.data_folder(tmp_path_factory.mktemp("data"))
    return clips.read_cases(data, clips.PARITY, engine.backend, engine.config, each=2)


def test_clips_are_balanced_and_of_the_speakers_that_were_asked_for(
    cases: list[Case], engine: Engine, tmp_path: Path
) -> None:
    assert [case.kind for case in cases] == [kind for kind in Kind for _ in range(2)]
    brought = {Kind.VOICE: {"voice"}, Kind.FACE: {"face"}, Kind.BOTH: {"voice", "face"}, Kind.TEXT: set()}
    assert all(set(case.features) == brought[case.kind] for case in cases)
    assert all(bool(case.heard) == ("voice" in case.features) for case in cases)
    assert all(case.words for case in cases if case.kind is Kind.TEXT)
    data = factory.data_folder(tmp_path / "data", each=1)
    for file in data.glob("voices/03-*"):
        file.unlink()
    for file in data.glob("faces/train/*.png"):
        file.unlink()
    clips.read_cases(
        data, clips.PARITY, engine.backend, engine.config, each=2
    )  # of speaker 14 and the dev photos alone
    with pytest.raises((FileNotFoundError, OSError)):
        clips.read_cases(data, clips.CALIBRATION, engine.backend, engine.config, each=2)
    with pytest.raises(ConfigError, match="give a folder"):
        clips.read_cases(tmp_path, clips.PARITY, engine.backend, engine.config, each=1)


def test_the_rule_takes_every_linear_layer_and_nothing_else(folders: Folders) -> None:
    model, linears, heads = graph.whole_graph(folders.onnx)
    onnx.checker.check_model(model, full_check=False)
    names = [linear.name for linear in linears]
    assert names == [f"layers.{i}.{kind}" for i in range(2) for kind in graph.IN_A_LAYER] + ["head"]
    weights = {linear.weight for linear in linears}
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    assert [shapes[linear.weight] for linear in linears[:4]] == [(24, 320), (192, 24), (24, 80), (40, 24)]
    narrow = quantise.quantise_int8(model, weights=weights, block=16)
    assert [n.op_type for n in narrow.graph.node].count("MatMulNBits") == len(linears)
    assert not set(heads) & weights

    recipe = dataclasses.replace(
        RECIPE, precision=Precision.INT8, block=32, fine=("down", "head"), fine_block=16, wide=("o",)
    )
    fresh, _, _ = graph.whole_graph(folders.onnx)
    outputs = {node.name: node.output[0] for node in fresh.graph.node}
    mixed = quantise.quantise_linears(fresh, [x.weight for x in linears], recipe)
    nodes = [node for node in mixed.graph.node if node.op_type == "MatMulNBits"]
    blocks = {n.output[0]: next(a.i for a in n.attribute if a.name == "block_size") for n in nodes}
    assert [blocks.get(outputs[x.node]) for x in linears] == [32, None, 32, 16] * 2 + [16]
    for name in ("fine", "wide"):
        with pytest.raises(ConfigError, match=f"{name} has up"):
            dataclasses.replace(recipe, **{name: ("up",)})


def test_a_graph_says_what_its_engine_says(engine: Engine, folders: Folders, cases: list[Case], tmp_path: Path) -> None:
    model, linears, heads = graph.whole_graph(folders.onnx)
    onnx.save(model, tmp_path / "plain.onnx")
    builder = engine.files.prompt_builder()
    other = GraphBackend(run.session(str(tmp_path / "plain.onnx"), threads=1), heads, engine.config, engine.backend)
    wanted = compare.ask(Asker(engine.backend, engine.config, builder), cases, print, reasons=1, steps=5)
    found = compare.ask(Asker(other, engine.config, builder), cases, print, reasons=1, steps=5, follow=wanted)
    result = compare.compare(cases, engine.config.labels, found, wanted)
    assert result["questions"] == 8 + 2 * 2 and result["labels that agree"] == 1.0
    assert result["rms of logits"]["max"] < 1e-4 and result["texts whose tokens are equal"] == 1  # type: ignore[index]
    assert compare.faults(result, precision="fp32") == []

    calls = run.prompt_inputs(cases, engine.backend, engine.config, builder)
    assert len(calls) == len(cases) and {name for name, _ in engine.backend.parts["decoder"].state} <= set(calls[0])
    narrow = quantise.quantise_int8(model, weights=[linear.weight for linear in linears], block=16)
    onnx.save(narrow, tmp_path / "narrow.onnx")
    onnx.save(graph.whole_graph(folders.onnx)[0], tmp_path / "plain.onnx")
    groups = {"none": [], "head": linears[-1:], "all": linears}
    rows = sensitivity.sensitivity(
        tmp_path / "plain.onnx", tmp_path / "narrow.onnx", groups, heads, cases[:2], engine.backend, engine.config,
        builder, print, threads=1, integers=True,
    )  # fmt: skip
    errors = [row["median"] for row in rows]
    assert errors[0] == 0 < errors[1] < errors[2]  # type: ignore[operator]


def test_parity_sees_labels_masses_and_a_curve_that_differ() -> None:
    both = [Case(kind=Kind.BOTH, features={}, words="", heard=LABELS[0], seen=LABELS[1])]

    def asked(label: int, *, mass: float = 0.5, tokens: tuple[int, ...] = (1, 2)) -> compare.Asked:
        scores = np.full(3, -9.0, np.float32)
        scores[label] = 0.0
        said = Said(logits=np.arange(1.0, 5.0), masses=np.full((1, 2, 1, 2), mass), scores=scores)
        return compare.Asked(said={(0, s): said for s in compare.STRENGTHS}, tokens={0: tokens})

    same = compare.compare(both, LABELS, asked(0), asked(0))
    assert same["labels that agree"] == 1.0 and compare.faults(same, precision="fp32") == []
    other = compare.compare(both, LABELS, asked(1, mass=0.75, tokens=(1, 3)), asked(0))
    assert other["labels that agree"] == 0.0 and other["largest distance of the voice share"] == 1.0
    assert other["error of masses"] == {"rms": 0.25, "max": 0.25} and other["first tokens that differ"] == {"0": 1}
    assert len(compare.faults(other, precision="int8")) == 2
    with pytest.raises(EngineError, match="99%"):
        compare.check(other, precision="fp32")


def test_a_build_writes_the_short_form_and_stops_where_it_fails(folders: Folders, tmp_path: Path) -> None:
    notes = Manifest.load(folders.engine, kind=KIND, remedy="").notes["parity"]
    assert isinstance(notes, dict) and notes["labels that agree"] == 1.0 and notes["prompts"] == 8
    assert notes["rms of logits, largest"] < 2e-4 and notes["largest error of a mass"] < 1e-4
    altered = shutil.copytree(folders.onnx, tmp_path / "onnx")
    path = altered / short.GOLDEN / short.FILE
    tensors = load_file(path)
    save_file(tensors | {"logits": 2 * tensors["logits"]}, path)
    with pytest.raises(EngineError, match="golden prompts"):
        build.short_parity(RECIPE, altered, folders.engine)
    eight = dataclasses.replace(RECIPE, name="eight", precision=Precision.INT8, block=16)
    narrow = build.build_engine(eight, folders.onnx, tmp_path / "engines", print)
    found = Manifest.load(narrow, kind=KIND, remedy="").notes["parity"]
    assert isinstance(found, dict) and notes["rms of logits, largest"] < found["rms of logits, largest"] < 0.5


def test_the_optimizer_is_asked_for_the_rule_and_held_to_it(
    folders: Folders, engine: Engine, cases: list[Case], tmp_path: Path
) -> None:
    calls = run.prompt_inputs(cases[:2], engine.backend, engine.config, engine.files.prompt_builder())
    scheme = optimise.SCHEMES["fp8"]
    with pytest.raises(EngineError, match="setup_quantise"):
        optimise.optimise(scheme, folders.onnx, calls, tmp_path, tmp_path / "none", print)
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\necho it went wrong; exit 3\n")
    failing.chmod(0o755)
    with pytest.raises(EngineError, match="exit 3"):
        optimise.optimise(scheme, folders.onnx, calls, tmp_path, failing, print)
    model, linears, heads = graph.whole_graph(folders.onnx)
    onnx.save(model, tmp_path / "nothing.onnx")
    short, long = sorted(calls, key=lambda call: call["position"].shape[1])
    assert short["position"].shape < long["position"].shape
    padded, _ = optimise.even([short, long], 2, engine.config)
    assert padded["hidden"].shape == long["hidden"].shape and padded["position"].min() == -1
    session = run.session(str(tmp_path / "nothing.onnx"), threads=1)
    names = {value.name for value in session.get_inputs()}
    found = [session.run(["logits"], {n: v for n, v in (c | heads).items() if n in names})[0] for c in (short, padded)]
    np.testing.assert_allclose(found[1], found[0], atol=1e-4)
    with pytest.raises(EngineError, match="differs in"):
        optimise.check(tmp_path / "nothing.onnx", [linear.node for linear in linears])


def test_experts_read_what_was_not_quantised(tmp_path: Path) -> None:
    kinds = {"x": [1, 4], "w": [4, 4], "a": [4, 2]}
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in kinds.items()]
    made = [
        ("QuantizeLinear", ["x", "scale", "zero"], "q"), ("DequantizeLinear", ["q", "scale", "zero"], "dq"),
        ("MatMul", ["dq", "w"], "linear"), ("MatMul", ["dq", "a"], "low"),
    ]  # fmt: skip
    nodes = [onnx.helper.make_node(kind, inputs, [output], name=output) for kind, inputs, output in made]
    tensors = [onnx.numpy_helper.from_array(np.float32(0.1), "scale"), onnx.numpy_helper.from_array(np.int8(0), "zero")]
    outputs = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("linear", "low")]
    path = tmp_path / "shared.onnx"
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", values, outputs, tensors)), path)
    with pytest.raises(EngineError, match="low"):
        optimise.check(path, ["linear"])
    optimise.widen_others(path, ["linear"])
    assert optimise.check(path, ["linear"]) == 1
    assert {n.name: list(n.input) for n in onnx.load(path).graph.node}["low"] == ["x", "a"]


def test_a_call_is_run_once_for_all_that_is_asked_of_it() -> None:
    """The Optimizer asks for one activation at a time."""
    calls: list[float] = []

    class Session:
        def get_outputs(self) -> list[SimpleNamespace]:
            return [SimpleNamespace(name=name) for name in ("a", "b")]

        def run(self, names: list[str], feeds: modelopt_child.Call) -> list[np.ndarray]:  # type: ignore[type-arg]
            calls.append(float(feeds["hidden"][0]))
            return [feeds["hidden"] + i for i, _ in enumerate(names)]

    session = modelopt_child.Remembered(Session())
    held = [{"hidden": np.array([n])} for n in (1.0, 2.0)]
    found = [session.run([name], dict(call))[0].tolist() for name in ("b", "a") for call in held]
    assert found == [[2.0], [3.0], [1.0], [2.0]] and calls == [1.0, 2.0]

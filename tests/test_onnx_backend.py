"""Our onnxruntime backend without a server: batches, types, settings, and what it refuses."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from mosear.errors import ConfigError, EngineError, RequestError
from mosear.serving.onnx_backend import SPINNING, Ask, OnnxModel, session_options

WEIGHT = np.arange(12, dtype=np.float32).reshape(4, 3) / 7


def write_linear(folder: Path, *, external: bool = False) -> Path:
    """y [B, S, 3] = x [B, S, 4] @ WEIGHT + shift; `shift` f32 [3] may be left out. rows i64 []: B."""
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["xw"]),
        helper.make_node("Add", ["xw", "shift"], ["y"]),
        helper.make_node("Shape", ["x"], ["rows"], start=0, end=1),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [
            helper.make_tensor_value_info("x", T.FLOAT, ["B", "S", 4]),
            helper.make_tensor_value_info("shift", T.FLOAT, [3]),
        ],
        [
            helper.make_tensor_value_info("y", T.FLOAT, ["B", "S", 3]),
            helper.make_tensor_value_info("rows", T.INT64, [1]),
        ],
        [numpy_helper.from_array(WEIGHT, "weight"), numpy_helper.from_array(np.zeros(3, np.float32), "shift")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    onnx.save(model, path, save_as_external_data=external, location="model.onnx.data", size_threshold=0)
    return path


def config(*, batch: int = 8, **more: Any) -> dict[str, Any]:
    inputs = [{"name": "x", "data_type": "TYPE_FP32", "dims": ["-1", "4"]}]
    outputs = [{"name": "y", "data_type": "TYPE_FP32", "dims": ["-1", "3"]}]
    return {"name": "linear", "max_batch_size": batch, "input": inputs, "output": outputs, **more}


def ask(*shape: int, outputs: tuple[str, ...] = ("y",), seed: int = 0) -> Ask:
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return Ask(inputs={"x": x}, outputs=outputs)


@pytest.fixture
def model(tmp_path: Path) -> OnnxModel:
    write_linear(tmp_path)
    return OnnxModel(config(), tmp_path)


def calls_of(model: OnnxModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of x of each run of the session from now on."""
    shapes, session = [], model.session

    class Counted:
        def run(self, names: list[str], feeds: dict[str, Any]) -> Any:
            shapes.append(feeds["x"].shape)
            return session.run(names, feeds)

    monkeypatch.setattr(model, "session", Counted())
    return shapes


def test_requests_of_one_shape_are_one_run(model: OnnxModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_of(model, monkeypatch)
    asks = [ask(1, 5, 4), ask(2, 5, 4, seed=1), ask(1, 2, 4, seed=2), ask(3, 5, 4, seed=3)]
    answers = model.answer(asks)
    assert sorted(calls) == [(1, 2, 4), (6, 5, 4)]
    for one, answer in zip(asks, answers, strict=True):
        np.testing.assert_allclose(answer["y"], one.inputs["x"] @ WEIGHT, rtol=1e-6, atol=1e-6)


def test_without_a_batch_axis_each_runs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_linear(tmp_path)
    model = OnnxModel(config(batch=0), tmp_path)
    calls = calls_of(model, monkeypatch)
    assert all(answer["y"].shape == (1, 5, 3) for answer in model.answer([ask(1, 5, 4), ask(1, 5, 4)]))
    assert calls == [(1, 5, 4), (1, 5, 4)]


def test_outputs_without_a_batch_axis_are_not_cut(model: OnnxModel) -> None:
    answers = model.answer([ask(1, 5, 4, outputs=("rows",)), ask(2, 5, 4, outputs=("rows",))])
    assert [answer["rows"].tolist() for answer in answers] == [[1], [2]]


def test_only_what_is_wanted_is_answered(model: OnnxModel) -> None:
    answers = model.answer([ask(1, 5, 4), ask(1, 5, 4, outputs=("rows", "y"))])
    assert [list(answer) for answer in answers] == [["y"], ["rows", "y"]]


def test_an_input_with_a_default_may_be_left_out(tmp_path: Path) -> None:
    write_linear(tmp_path)
    shift = {"name": "shift", "data_type": "TYPE_FP32", "dims": ["3"], "optional": True}
    full = config(batch=0)
    model = OnnxModel({**full, "input": [*full["input"], shift]}, tmp_path)
    plain = ask(1, 2, 4)
    moved = Ask(inputs=plain.inputs | {"shift": np.ones(3, np.float32)}, outputs=("y",))
    first, second = model.answer([plain, moved])
    np.testing.assert_allclose(first["y"] + 1, second["y"], rtol=1e-6)


def test_a_bad_request_spoils_no_other(model: OnnxModel) -> None:
    wrong = Ask(inputs={"x": np.zeros((1, 5, 9), np.float32)}, outputs=("y",))
    typed = Ask(inputs={"x": np.zeros((1, 5, 4))}, outputs=("y",))
    empty = Ask(inputs={}, outputs=("y",))
    flat = Ask(inputs={"x": np.zeros((), np.float32)}, outputs=("y",))
    answers = model.answer([wrong, ask(1, 5, 4), typed, wrong, empty, flat, ask(1, 5, 4)])
    assert [isinstance(answer, RequestError) for answer in answers] == [True, False, True, True, True, True, False]
    assert "linear" in str(answers[0]) and "x" in str(answers[0])


def test_strings_go_in_and_out_as_bytes(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "echo",
        [helper.make_tensor_value_info("x", T.STRING, ["B", 1])],
        [helper.make_tensor_value_info("y", T.STRING, ["B", 1])],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "model.onnx"
    )
    strings = {kind: [{"name": name, "data_type": "TYPE_STRING"}] for kind, name in (("input", "x"), ("output", "y"))}
    model = OnnxModel({"name": "echo", "max_batch_size": 4, **strings}, tmp_path)
    said = np.array([["Grüße".encode()]], object)
    answers = model.answer(
        [Ask(inputs={"x": text}, outputs=("y",)) for text in (said, np.array([[b"\xff"]], object), said)]
    )
    assert answers[0]["y"].tolist() == answers[2]["y"].tolist() == said.tolist()
    assert isinstance(answers[1], RequestError)


def test_external_data_and_another_file_name(tmp_path: Path) -> None:
    write_linear(tmp_path / "graph", external=True)
    assert (tmp_path / "graph" / "model.onnx.data").exists()
    model = OnnxModel(config(default_model_filename="graph"), tmp_path)
    one = ask(2, 1, 4)
    np.testing.assert_allclose(model.answer([one])[0]["y"], one.inputs["x"] @ WEIGHT, rtol=1e-6, atol=1e-6)


def test_settings_reach_the_session() -> None:
    values = {"intra_op_thread_count": "2", "inter_op_thread_count": "3", "execution_mode": "1", "unknown": "x"}
    parameters = {key: {"string_value": value} for key, value in values.items()}
    options = session_options(config(parameters=parameters, optimization={"graph": {"level": 2}}))
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 3)
    assert options.execution_mode == ort.ExecutionMode.ORT_PARALLEL
    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    assert options.get_session_config_entry(SPINNING) == "0"
    spun = session_options(config(parameters={SPINNING: {"string_value": "1"}}))
    assert spun.get_session_config_entry(SPINNING) == "1"
    assert spun.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_ALL


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"parameters": {"intra_op_thread_count": {"string_value": "two"}}}, "intra_op_thread_count is 'two'"),
        ({"optimization": {"graph": {"level": 7}}}, "graph.level 7"),
    ],
)
def test_a_setting_that_is_none_is_named(more: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        session_options(config(**more))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"default_model_filename": "other.onnx"}, "other.onnx is missing"),
        ({"input": []}, "leaves out the graph's input x"),
        ({"input": [{"name": "z", "data_type": "TYPE_FP32"}]}, "no input z; it has shift, x"),
        (
            {"output": [{"name": "y", "data_type": "TYPE_FP16"}]},
            r"output y is tensor\(float\), the configuration says TYPE_FP16",
        ),
    ],
)
def test_a_file_that_is_not_what_the_configuration_says(tmp_path: Path, more: dict[str, Any], words: str) -> None:
    write_linear(tmp_path)
    with pytest.raises(EngineError, match=words):
        OnnxModel(config(**more), tmp_path)


def test_a_file_that_is_no_graph(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineError, match="linear: ONNX Runtime cannot load"):
        OnnxModel(config(), tmp_path)

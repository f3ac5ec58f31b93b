"""A plan with our kernels inside, built by TensorRT and run: needs the library and a GPU. Not run yet on any machine."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch
from tolerance import assert_close
from toy import AR, GROUPED, decoder_inputs, next_state, toy_config, toy_model

from mosear.config import MoSEConfig, Statistic, Target
from mosear.contract import DECODER, parts
from mosear_export.ops import ExportOps
from mosear_export.plugin_flavour import plugin_flavour
from mosear_export.to_onnx import export_part

CAPACITY, LENGTHS = 64, [9, 6, 1]


def missing() -> str:
    if not torch.cuda.is_available():
        return "needs a GPU and torch for CUDA"
    return "" if importlib.util.find_spec("tensorrt_libs") else "needs TensorRT's library (pip install tensorrt)"


pytestmark = [pytest.mark.tensorrt, pytest.mark.skipif(bool(missing()), reason=missing())]


def built(model: bytes, sizes: list[dict[str, tuple[int, int]]], axes: dict[str, tuple[int | str, ...]]) -> bytes:
    """A plan with a profile for each of `sizes`."""
    import tensorrt as trt

    log = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(log)
    network, options = builder.create_network(0), builder.create_builder_config()
    parser = trt.OnnxParser(network, log)
    assert parser.parse(model), [str(parser.get_error(i)) for i in range(parser.num_errors)]
    for letters in sizes:
        profile = builder.create_optimization_profile()
        for name, shape in axes.items():
            ends = [[letters[a][end] if isinstance(a, str) else a for a in shape] for end in (0, 1)]
            profile.set_shape(name, ends[0], ends[1], ends[1])
        options.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, options)
    assert plan is not None
    return bytes(plan)


def run(context: Any, profile: int, feeds: dict[str, torch.Tensor], names: list[str]) -> dict[str, torch.Tensor]:
    """One call in one profile; every output has the shape that the context infers."""
    stream = torch.cuda.Stream()
    assert context.set_optimization_profile_async(profile, stream.cuda_stream)
    held = {name: tensor.cuda().contiguous() for name, tensor in feeds.items()}
    for name, tensor in held.items():
        context.set_input_shape(name, tuple(tensor.shape))
        context.set_tensor_address(name, tensor.data_ptr())
    found = {}
    for name in names:
        found[name] = torch.empty(tuple(context.get_tensor_shape(name)), device="cuda")
        context.set_tensor_address(name, found[name].data_ptr())
    torch.cuda.synchronize()
    assert context.execute_async_v3(stream.cuda_stream)
    stream.synchronize()
    return {name: tensor.cpu() for name, tensor in found.items()}


def test_one_plan_serves_prefill_and_decode(tmp_path: Path) -> None:
    import tensorrt as trt

    from mosear.kernels.modality_experts.plugin import OPS as EXPERTS_OPS
    from mosear.kernels.plugins.binding import Device, define
    from mosear.kernels.reallocated_attention.plugin import OPS as ATTENTION_OPS

    backbone = dataclasses.replace(GROUPED, head_size=64, heads=4, kv_heads=2)
    mose = MoSEConfig(targets=(Target.Q_PROJ, Target.V_PROJ), rank=3, experts=2)
    config = toy_config(backbone=backbone, ar=dataclasses.replace(AR, statistic=Statistic.MEAN), mose=mose)
    part, model = parts(config)[DECODER], toy_model(config)
    path = tmp_path / "decoder.onnx"
    export_part(toy_model(config, ops=ExportOps()), part, path)
    plain = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    major, minor = torch.cuda.get_device_capability()
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    define((*ATTENTION_OPS, *EXPERTS_OPS), Device(arch=10 * major + minor, multiprocessors=processors))
    import onnx

    heads = {spec.name: model.heads[spec.name] for spec in part.heads}
    sizes = [{"B": (1, 4), "L": (32, 128), "Q": (1, 16), "S": rows} for rows in ((2, 16), (1, 1))]
    axes = {spec.name: spec.axes for spec in (*part.inputs, *part.heads) if any(isinstance(a, str) for a in spec.axes)}
    plan = built(plugin_flavour(onnx.load(path), config).SerializeToString(), sizes, axes)
    engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine(plan)
    context, names = engine.create_execution_context(), [spec.name for spec in part.outputs]
    call = decoder_inputs(config, batch=3, rows=9, capacity=CAPACITY, lengths=LENGTHS)
    for step in range(3):
        ours = run(context, min(step, 1), call | heads, names)
        feeds = {name: tensor.numpy() for name, tensor in (call | heads).items()}
        theirs = {n: torch.from_numpy(v) for n, v in zip(names, plain.run(names, feeds))}
        live = call["position"] >= 0
        assert_close(ours["logits"][live], theirs["logits"][live], "demo")
        call = decoder_inputs(config, batch=3, rows=1, capacity=CAPACITY, start=[n + step for n in LENGTHS])
        call |= next_state(part, ours)

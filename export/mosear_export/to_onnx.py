"""Export of a part to ONNX: names and dynamic axes from the contract, weights in an external file, mechanisms as nodes."""

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
import torch
from onnx_ir import external_data
from torch import Tensor, nn
from torch.onnx._internal.exporter._registration import ONNXRegistry

from mosear.config import ModelConfig
from mosear.contract import DECODER, EMBEDDING, Axis, Part, TensorSpec
from mosear_export import plain
from mosear_export.model.decoder import Decoder
from mosear_export.model.whole import ReferenceModel, run_decoder
from mosear_export.ops import DOMAIN, OPSET, VERSION, translations

# Sizes of the example inputs, all different so that torch.export takes no axis for another; T is even.
EXAMPLE_SIZES = {"B": 2, "S": 5, "L": 24, "T": 60, "N": 3, "Q": 4}
# T is an even number of mel frames: two make one frame of the encoder.
MULTIPLE = {"T": 2}
SIZE_THRESHOLD = 1024  # bytes of a tensor that stays in the graph


class PartModule(nn.Module):
    """A part as a function of flat tensors in the contract's order: inputs, then heads."""

    def __init__(self, model: ReferenceModel, part: Part) -> None:
        super().__init__()
        self.part = part
        self.network = model.decoder if part.name in (DECODER, EMBEDDING) else model.get_submodule(part.name)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        if not isinstance(self.network, Decoder):
            outputs = self.network(*tensors)
            return outputs if isinstance(outputs, tuple) else (outputs,)
        if self.part.name == EMBEDDING:
            return (self.network.embed_tokens(tensors[0].long()),)
        named = {spec.name: tensor for spec, tensor in zip(self.part.inputs + self.part.heads, tensors, strict=True)}
        heads = {spec.name: named[spec.name] for spec in self.part.heads}
        outputs = run_decoder(self.network, self.part, named, heads)
        return tuple(outputs[spec.name] for spec in self.part.outputs)


def export_part(model: ReferenceModel, part: Part, path: Path) -> None:
    """Write `path` (.onnx) and `path`.data. The model must carry `ExportOps`."""
    program = trace_part(model, part)
    # Weights go to their file one by one.
    program.model = external_data.unload_from_model(
        program.model, path.parent, f"{path.name}.data", size_threshold_bytes=SIZE_THRESHOLD
    )
    save_part(program, model.config, part, path)


def trace_part(model: ReferenceModel, part: Part) -> torch.onnx.ONNXProgram:
    """A part's graph, its weights still the model's own memory."""
    inputs = part.inputs + part.heads
    sizes = {letter: torch.export.Dim(letter) for letter in EXAMPLE_SIZES if letter not in MULTIPLE}
    for letter, step in MULTIPLE.items():
        sizes[letter] = step * torch.export.Dim(f"half_{letter}")
    example = tuple(example_tensor(spec, EXAMPLE_SIZES) for spec in inputs)
    dynamic = tuple({i: sizes[axis] for i, axis in enumerate(spec.axes) if isinstance(axis, str)} for spec in inputs)
    with quiet(), one_registry():
        program = torch.onnx.export(
            PartModule(model, part),
            example,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes={"tensors": dynamic},
            input_names=[spec.name for spec in inputs],
            output_names=[spec.name for spec in part.outputs],
            custom_translation_table=translations(),
            verbose=False,
        )
    assert program is not None
    return program


def save_part(program: torch.onnx.ONNXProgram, config: ModelConfig, part: Part, path: Path) -> None:
    """Write a graph whose weights lie in files beside it already."""
    proto = program.model_proto
    finish(proto, part, config)
    onnx.save_model(proto, path)
    onnx.checker.check_model(path)


def example_tensor(spec: TensorSpec, sizes: Mapping[str, int]) -> Tensor:
    """Zeros of a tensor's type and shape, its dynamic axes at the given sizes."""
    shape = [sizes[axis] if isinstance(axis, str) else axis for axis in spec.axes]
    return torch.zeros(shape, dtype=getattr(torch, spec.dtype.value))


def finish(proto: onnx.ModelProto, part: Part, config: ModelConfig) -> None:
    """Name the axes as the contract does, and add the plain flavour of the mechanisms where they are called."""
    for value, spec in zip([*proto.graph.input, *proto.graph.output], [*part.inputs, *part.heads, *part.outputs]):
        for dim, axis in zip(value.type.tensor_type.shape.dim, spec.axes, strict=True):
            _name_axis(dim, axis)
    if any(node.domain == DOMAIN for node in proto.graph.node):
        proto.functions.extend(plain.functions(config))
        if DOMAIN not in {o.domain for o in proto.opset_import}:
            proto.opset_import.append(onnx.helper.make_opsetid(DOMAIN, VERSION))


def _name_axis(dim: onnx.TensorShapeProto.Dimension, axis: Axis) -> None:
    if isinstance(axis, str):
        dim.dim_param = axis
    else:
        dim.dim_value = axis


@contextlib.contextmanager
def one_registry() -> Iterator[None]:
    """The exporter parses the sources of all its operators at each call, a fifth of a small part's export: here once."""
    kept = ONNXRegistry.from_torchlib
    ONNXRegistry.from_torchlib = staticmethod(_registry)  # type: ignore[method-assign]
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = kept  # type: ignore[method-assign]


_registry = functools.cache(ONNXRegistry.from_torchlib)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what the exporter says of its own internals."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)

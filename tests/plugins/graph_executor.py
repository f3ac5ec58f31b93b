"""Runs a decoder of the plugin flavour on a CPU: plugin nodes by the very kernels, interpreted; all others by ONNX's reference.

A node is served as an engine would: its tactics for the sizes at hand, the first one's kernel and launch. Outputs hold NaN
until a kernel writes them, and a node without work in a profile leaves them so: whoever read them would show.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from mosear.kernels.launch import Kind, run
from mosear.kernels.modality_experts.plugin import OPS as EXPERTS_OPS
from mosear.kernels.plugins.op import Arithmetic, PluginOp, Range, Ranges, Site
from mosear.kernels.reallocated_attention.plugin import OPS as ATTENTION_OPS
from mosear_export.ops import DOMAIN

DTYPES = {Kind.F32: torch.float32, Kind.I32: torch.int32}
Array = NDArray[Any]  # of any element type


def serve(
    op: PluginOp, arch: int, launched: list[str], arrays: Iterable[Array], attributes: dict[str, Any]
) -> tuple[Array, ...]:
    """One node's outputs; the kernel's name goes into `launched`."""
    inputs = {n: torch.from_numpy(np.array(a, order="C")) for n, a in zip(op.inputs, arrays, strict=True)}
    sizes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
    ranges = Ranges(inputs={n: tuple(Range(least=a, most=a) for a in shape) for n, shape in sizes.items()})
    data = {torch.float32: "fp32", torch.float16: "fp16"}[
        inputs[next(n for n, k in op.inputs.items() if k is Kind.DATA)].dtype
    ]
    site = Site(arch=arch, data=data, attributes=attributes)
    dtypes = DTYPES | {Kind.DATA: torch.float32 if data == "fp32" else torch.float16}
    outputs = {}
    for (name, kind), shape in zip(op.outputs.items(), op.shapes(sizes, site, Arithmetic()), strict=True):
        nothing = -1 if kind is Kind.I32 else torch.nan
        outputs[name] = torch.full(shape, nothing, dtype=dtypes[kind])
    tactic = op.tactics(ranges, site)[0]
    launched.append(tactic.kernel.name if tactic.kernel else "nothing")
    if tactic.kernel:
        geometry = tactic.at(sizes, Arithmetic())
        own = [[named[n.removesuffix("_ptr")] for n in pointers] for named, pointers in (
            (inputs, tactic.kernel.inputs), (outputs, tactic.kernel.outputs))]  # fmt: skip
        launch = dataclasses.replace(tactic.launch, grid=geometry.grid)
        run(tactic.kernel, launch, own[0], geometry.scalars, own[1])
    return tuple(tensor.numpy() for tensor in outputs.values())


def executor(model: ModelProto, *, arch: int = 90) -> tuple[ReferenceEvaluator, list[str]]:
    """A session, and the list to which each plugin node adds its kernel's name when it runs."""
    launched: list[str] = []

    def operator(op: PluginOp) -> type[OpRun]:
        def _run(self: OpRun, *arrays: Array, **attributes: Any) -> tuple[Array, ...]:
            return serve(op, arch, launched, arrays, {name: attributes[name] for name in op.attributes})

        return type(op.name, (OpRun,), {"op_domain": DOMAIN, "_run": _run})

    return ReferenceEvaluator(model, new_ops=[operator(op) for op in (*ATTENTION_OPS, *EXPERTS_OPS)]), launched

"""Plain attention in the shapes, tiles and splits of ours: what the costs of reallocation are held against."""

import dataclasses

import kernels_plain_decode
import kernels_plain_prefill

from mosear.kernels.launch import Case, KernelOp, Kind
from mosear.kernels.reallocated_attention import launches

PREFILL = KernelOp(
    name="plain_prefill",
    function=kernels_plain_prefill.plain_prefill,
    inputs={"query_ptr": Kind.DATA, "key_ptr": Kind.DATA, "value_ptr": Kind.DATA}
    | {"query_position_ptr": Kind.I32, "key_length_ptr": Kind.I32},
    scalars=("heads", "kv_heads", "rows", "capacity"),
    outputs={"output_ptr": Kind.DATA},
)
SHARED = ("D", "SCALE", "CAUSAL", "BLOCK_M", "BLOCK_N")


def prefill_peer(case: Case) -> Case:
    """Plain flash attention with the same tile, warps and stages."""
    launch = dataclasses.replace(case.launch, constants={name: case.launch.constants[name] for name in SHARED})
    return dataclasses.replace(case, op=PREFILL, launch=launch)


def cases(arch: int) -> list[Case]:
    """The counterparts of all prefill and contiguous decode cases, in their order."""
    return [*map(prefill_peer, launches.cases(arch)), *kernels_plain_decode.cases(arch)]

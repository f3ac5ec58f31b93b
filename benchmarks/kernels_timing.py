"""Times of the kernels on this machine's GPU, beside PyTorch's SDPA and FlexAttention: CUDA events, cold L2, medians.

Nothing here has run yet: no GPU was at hand. Without one every time stays absent, and tables say 'not measured'.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from kernels_counts import layout
from torch import Tensor

from mosear.errors import KernelError
from mosear.kernels.catalogue import MODULES, cases
from mosear.kernels.chips import ARCHS
from mosear.kernels.launch import Case, Kind, run

WARM_UPS, REPEATS = 5, 50
FLUSH_BYTES = 512 << 20  # more than any L2
TYPE = torch.bfloat16


def device_arch() -> int | None:
    """The architecture of this machine's first GPU, if kernels are compiled for it."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor if 10 * major + minor in ARCHS else None


def add_times(rows: Sequence[dict[str, Any]], *, demanded: bool, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """The rows, those of this machine's chip with `times` (medians in us). Raises KernelError if demanded without a GPU."""
    arch = device_arch()
    if arch is None:
        if demanded:
            raise KernelError("--time: this machine has no GPU that kernels are compiled for")
        say("no GPU: times are not measured")
        return list(rows)
    found: dict[str, list[Case]] = {}
    for case in cases(arch, MODULES):
        found.setdefault(case.label, []).append(case)
    timed = []
    for row in rows:
        if row["arch"] == arch:
            mine = [case for case in found[row["case"]] if case.op.name in row["kernels"]]
            timed.append(row | {"device": torch.cuda.get_device_name(), "times": times(mine)})
            say(f"{row['op']} {row['case']}: {timed[-1]['times']}")
        else:
            timed.append(row)
    return timed


def times(launches: Sequence[Case]) -> dict[str, float]:
    """Median microseconds of a call, and for attention of its peers on the same shape."""
    arguments = [make_arguments(case) for case in launches]

    def call() -> None:
        for case, (inputs, scalars, outputs) in zip(launches, arguments, strict=True):
            run(case.op, case.launch, inputs, scalars, outputs)

    result = {"ours_us": median_us(call)}
    if "kv_heads" in launches[0].scalars:
        result |= {f"{name}_us": median_us(peer) for name, peer in attention_peers(launches[0]).items()}
    return result


def median_us(call: Callable[[], object]) -> float:
    """Median of REPEATS runs, each after the L2 cache was overwritten."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(WARM_UPS):
        call()
    spans: list[float] = []
    for _ in range(REPEATS):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        spans.append(1e3 * start.elapsed_time(end))
    return round(statistics.median(spans), 3)


def make_arguments(case: Case) -> tuple[list[Tensor], list[int], list[Tensor]]:
    """Arguments of a launch: full caches, rows in the prompt's layout, normal activations."""
    names = [(name, kind) for name, kind in case.op.inputs.items()]
    inputs = [_fill(case, name, kind) for name, kind in names]
    outputs = [
        torch.empty(_size(case, name), dtype=_type(kind), device="cuda") for name, kind in case.op.outputs.items()
    ]
    return inputs, [case.scalars[name] for name in case.op.scalars], outputs


def _type(kind: Kind) -> torch.dtype:
    return {Kind.DATA: TYPE, Kind.F32: torch.float32, Kind.I32: torch.int32}[kind]


def _fill(case: Case, name: str, kind: Kind) -> Tensor:
    size, scalars = _size(case, name), case.scalars
    keys = scalars.get("capacity", scalars.get("n_rows", 1))
    batch = case.launch.grid[2] if "capacity" in scalars else 1
    ids = torch.tensor(layout(keys), dtype=torch.int32, device="cuda")
    if name in ("key_group_ptr", "group_ptr"):
        return ids.repeat(batch)
    if name == "tile_group_ptr":
        block = int(case.launch.constants["BLOCK_N"])
        tiles = [set(layout(keys)[at : at + block]) for at in range(0, keys, block)]
        one = [next(iter(groups)) if len(groups) == 1 else -1 for groups in tiles]
        return torch.tensor(one, dtype=torch.int32, device="cuda").repeat(batch)
    if name == "query_position_ptr":
        rows = scalars.get("rows", 1)
        return torch.arange(keys - rows, keys, dtype=torch.int32, device="cuda").repeat(size // rows)
    if name == "key_length_ptr":
        return torch.full([size], keys, dtype=torch.int32, device="cuda")
    if name == "first_row_ptr":
        return torch.full([size], keys - 1, dtype=torch.int32, device="cuda")
    if name == "block_table_ptr":
        return torch.randperm(size, device="cuda").to(torch.int32)
    if name == "column_start_ptr":
        return torch.tensor([0, scalars["columns"] // 2, scalars["columns"]], dtype=torch.int32, device="cuda")
    if kind is Kind.I32:
        return torch.ones(size, dtype=torch.int32, device="cuda")
    if name in ("strength_ptr", "weight_ptr", "policy_params_ptr"):
        return torch.full([size], 0.5, device="cuda")
    if name == "group_bias_ptr":
        return torch.zeros(size, device="cuda")
    return torch.randn(size, device="cuda").to(_type(kind))


def _size(case: Case, name: str) -> int:
    """Elements of a tensor, from the scalars and constants of the launch."""
    s, c, grid = case.scalars, case.launch.constants, case.launch.grid
    if "n_rows" in s:
        return _experts_size(case, name)
    heads, size, groups = s["heads"], int(c["D"]), int(c["GROUPS"])
    batch = grid[1] if case.op.name == "decode_merge" else grid[2]
    rows, splits = s.get("rows", 1), s.get("splits", 1)
    cache = batch * s.get("kv_heads", 1) * s.get("capacity", 1) * size
    sizes: Mapping[str, int] = {
        "query_ptr": batch * heads * rows * size,
        "output_ptr": batch * heads * rows * size,
        "key_ptr": cache,
        "value_ptr": cache,
        "block_table_ptr": batch * s.get("capacity", 1) // int(c.get("PAGE", 1)),
        "query_position_ptr": batch * rows,
        "policy_params_ptr": heads * 8,
        "group_bias_ptr": batch * groups,
        "partial_output_ptr": batch * heads * splits * groups * size,
        "partial_max_ptr": batch * heads * splits * groups,
        "partial_sum_ptr": batch * heads * splits * groups,
        "partial_count_ptr": batch * splits * groups,
        "before_ptr": batch * heads * rows * groups,
        "after_ptr": batch * heads * rows * groups,
    }
    return sizes.get(name, batch)


def _experts_size(case: Case, name: str) -> int:
    s, c = case.scalars, case.launch.constants
    targets, groups, experts, rank = (int(c[key]) for key in ("TARGETS", "GROUPS", "EXPERTS", "RANK"))
    rows, width, columns = s["n_rows"], s.get("width", 1), s.get("columns", 1)
    sets = groups if "SHARE_A" in c and not c["SHARE_A"] else 1
    sizes: Mapping[str, int] = {
        "x_ptr": rows * width,
        "a_ptr": targets * sets * rank * width,
        "gate_ptr": targets * groups * experts * width,
        "partial_ptr": int(c["SPLITS"]) * rows * targets * (rank + experts),
        "base_ptr": rows * columns,
        "y_ptr": rows * columns,
        "gates_in_ptr": rows * targets * experts,
        "gates_ptr": rows * targets * experts,
        "b_ptr": groups * experts * rank * columns,
        "weight_ptr": groups,
    }
    return sizes.get(name, rows)


def attention_peers(case: Case) -> dict[str, Callable[[], object]]:
    """SDPA, and FlexAttention with a causal block mask: plain attention, no reallocation."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    s, size, batch = case.scalars, int(case.launch.constants["D"]), case.launch.grid[2]
    rows, keys = s.get("rows", 1), s["capacity"]
    query = torch.randn(batch, s["heads"], rows, size, device="cuda", dtype=TYPE)
    key, value = (torch.randn(batch, s["kv_heads"], keys, size, device="cuda", dtype=TYPE) for _ in range(2))
    grouped = s["heads"] != s["kv_heads"]
    compiled = torch.compile(flex_attention)
    mask = create_block_mask(lambda b, h, q, k: q + keys - rows >= k, None, None, rows, keys, device="cuda")
    return {
        "sdpa": lambda: torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=rows > 1, enable_gqa=grouped
        ),
        "flex_attention": lambda: compiled(query, key, value, block_mask=mask, enable_gqa=grouped),
    }

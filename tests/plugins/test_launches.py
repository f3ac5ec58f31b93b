"""A plugin's launch is the project's own launcher's: the same grid, scalars, constants and outputs for the same sizes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from plugin_cases import CASES, DECODE, DECODE_CALLS, LARGE, PREFILL, SMALL, TILE, NodeCase, attention

from mosear.config import Policy, Route, Select, Statistic
from mosear.errors import KernelError
from mosear.kernels.chips import ARCHS
from mosear.kernels.launch import Kind, Launch
from mosear.kernels.modality_experts import launcher
from mosear.kernels.modality_experts.launches import Shape, choose_launch
from mosear.kernels.modality_experts.plugin import MOST_PARTS
from mosear.kernels.plugins.op import Arithmetic, Site
from mosear.kernels.reallocated_attention import decode_run, prefill_run
from mosear.kernels.reallocated_attention.plugin import ATTENTION_FINISH, ATTENTION_FINISH_RUNS, ATTENTION_SPLIT

DTYPES = {Kind.DATA: torch.bfloat16, Kind.F32: torch.float32, Kind.I32: torch.int32}
EXPERTS = ("ExpertsShrink", "ExpertsExpand")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launched:
    """What a launcher asked of the device."""

    launch: Launch
    scalars: tuple[int, ...]
    outputs: tuple[tuple[int, ...], ...]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> dict[str, Launched]:
    """Launches by kernel, recorded in place of being made."""
    found: dict[str, Launched] = {}

    def run(op: Any, launch: Launch, tensors: Any, scalars: Any, outputs: Any) -> None:
        shapes = tuple(tuple(tensor.shape) for tensor in outputs)
        found[op.name] = Launched(launch=launch, scalars=tuple(scalars), outputs=shapes)

    for module in (decode_run, prefill_run, launcher):
        monkeypatch.setattr(module, "run", run)
    return found


def tensors_of(case: NodeCase, call: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Tensors of a call, their memory never touched."""
    shapes = case.at(call)
    return {n: torch.empty(shapes[n], dtype=DTYPES[kind]) for n, kind in case.op.inputs.items()}


def launch_of(case: NodeCase, call: Mapping[str, int]) -> None:
    """The project's own launcher on a call's tensors."""
    inputs, given = tensors_of(case, call), dict(case.attributes)
    if case.op.name in EXPERTS:
        columns = tuple(map(int, str(given["columns"]).split(",")))
        one = len(columns) == 1
        b, s, rows = call["B"], call["S"], case.at(call)["group"]
        size = {n: int(given[n]) for n in ("width", "groups", "experts", "rank", "share_a")}
        sets = 1 if size["share_a"] else size["groups"]
        per_group = size["groups"] * size["experts"]
        launcher.modality_experts_of(
            torch.empty(b, s, sum(columns), dtype=torch.bfloat16), torch.empty(b, s, size["width"], dtype=torch.bfloat16),
            torch.empty(rows, dtype=torch.int32), torch.empty(b, s, len(columns), size["experts"]),
            torch.empty(len(columns) * sets * size["rank"], size["width"], dtype=torch.bfloat16),
            torch.empty(len(columns) * per_group, size["width"], dtype=torch.bfloat16),
            torch.empty(per_group * size["rank"], sum(columns), dtype=torch.bfloat16), torch.empty(size["groups"]),
            columns=columns, scale=float(given["scale"]), select=Select.SOFT, route=Route.TOKEN,
        )  # fmt: skip
        assert one or len(columns) == 2
        return
    whole = attention(
        ATTENTION_FINISH, heads=case.axes["query"][1], kv_heads=case.axes["key"][1], size=case.axes["query"][3],  # type: ignore[arg-type]
        profile=case.profile, calls=case.calls,
    )  # fmt: skip
    all_tensors = tensors_of(whole, {"X": 1, **call}) | inputs
    names = (
        "query", "key", "value", "key_group", "query_position", "key_length", "first_row", "policy_params", "strength",
        "group_bias",
    )  # fmt: skip
    words = {"policy": Policy.BALANCE, "statistic": Statistic.MEAN, "scale": float(given["scale"])}
    if call["S"] == 1:
        decode_run.decode_attention(*(all_tensors[n] for n in names), **words, block_table=inputs.get("block_table"))  # type: ignore[arg-type]
    else:
        runs = (((call["L"], 0),),) * call["B"] if "tile_group" in case.axes else None
        prefill_run.reallocated_attention_prefill(*(all_tensors[n] for n in names), **words, runs=runs)  # type: ignore[arg-type]


def exact(call: Mapping[str, int], case: NodeCase) -> dict[str, tuple[int, int]]:
    """The profile that holds this call alone."""
    return {**case.profile, **{letter: (n, n) for letter, n in call.items()}}


def site_of(case: NodeCase, arch: int) -> Site:
    return Site(arch=arch, data="bf16", attributes=case.attributes)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", CASES)
def test_plugin_launches_as_the_launcher(
    name: str, arch: int, launched: dict[str, Launched], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (decode_run, prefill_run, launcher):
        monkeypatch.setattr(module, "arch_of", lambda device: arch)
    case, compared = CASES[name], 0
    for call in case.calls:
        launched.clear()
        launch_of(case, call)
        sizes = case.at(call)
        if "partial_max" in sizes and call["S"] == 1:  # what the split before it left
            made = launched["decode_split"].outputs
            sizes |= dict(zip(("partial_output", "partial_max", "partial_sum", "partial_count"), made))
        for tactic in case.op.tactics(case.ranges(exact(call, case)), site_of(case, arch)):
            if tactic.spare or tactic.kernel is None:
                continue
            wanted, found = launched[tactic.kernel.name], tactic.at(sizes, Arithmetic())
            if "tile" in case.attributes and wanted.launch.constants["BLOCK_N"] != TILE:
                continue
            assert found.grid == wanted.launch.grid
            assert found.scalars == wanted.scalars
            own, theirs = tactic.launch, wanted.launch
            assert (own.constants, own.warps, own.stages) == (theirs.constants, theirs.warps, theirs.stages)
            compared += 1
    nothing_to_do = name.startswith("AttentionSplit prefill")
    other_tile = "Runs" in name and arch in (90, 100)
    assert compared == 0 if nothing_to_do or other_tile else compared == len(case.calls)


@pytest.mark.parametrize("name", [n for n in CASES if "Split" not in n or "decode" in n])
def test_outputs_have_the_launchers_shapes(name: str, launched: dict[str, Launched]) -> None:
    case = CASES[name]
    for call in case.calls:
        launch_of(case, call)
        tactic = case.op.tactics(case.ranges(exact(call, case)), site_of(case, 90))[0]
        assert tactic.kernel
        shapes = case.op.shapes(case.at(call), site_of(case, 90), Arithmetic())
        wanted = launched[tactic.kernel.name].outputs
        if case.op.name == "ExpertsShrink":  # the launcher's is flat and no larger than its parts
            parts = int(launched[tactic.kernel.name].launch.constants["SPLITS"])
            assert shapes[0][0] >= parts and torch.Size(shapes[0][1:]).numel() * parts == wanted[0][0]
        elif case.op.name == "ExpertsExpand":
            assert [torch.Size(s).numel() for s in shapes] == [torch.Size(s).numel() for s in wanted]
        else:
            assert shapes == wanted


def test_a_profile_decides_the_kernel() -> None:
    """One row: split and merge. More: prefill alone, at one row of such a profile too."""
    both = {**PREFILL, "S": (1, 512)}
    site = {"bf16": 90}
    for profile, kernels in (
        (DECODE, ("decode_split", "decode_merge")), (PREFILL, (None, "prefill")), (both, (None, "prefill")),
    ):  # fmt: skip
        found = []
        for op in (ATTENTION_SPLIT, ATTENTION_FINISH):
            case = attention(op, **SMALL, profile=profile, calls=())
            tactics = case.op.tactics(case.ranges(), site_of(case, site["bf16"]))
            names = {tactic.kernel.name if tactic.kernel else None for tactic in tactics}
            assert len(names) == 1
            found += names
        assert tuple(found) == kernels


def test_partial_results_do_not_depend_on_the_rows() -> None:
    """So that one graph fits both profiles."""
    case = attention(ATTENTION_SPLIT, **SMALL, profile=DECODE, calls=())
    shapes = [
        case.op.shapes(case.at({**DECODE_CALLS[1], "S": rows}), site_of(case, 90), Arithmetic()) for rows in (1, 512)
    ]  # fmt: skip
    assert shapes[0] == shapes[1]


def test_parts_of_experts_agree_between_the_nodes() -> None:
    """Both kernels have them as a constant, and neither node sees the other's tensors."""
    for kind in ("decode", "prefill"):
        found = []
        for node in EXPERTS:
            case = CASES[f"{node} {kind} one"]
            tactics = case.op.tactics(case.ranges(), site_of(case, 90))
            found.append({tactic.launch.constants["SPLITS"] for tactic in tactics})
        most = CASES[f"{EXPERTS[0]} {kind} one"].calls[-1]  # the last call is the profile's largest
        shape = Shape(
            rows=most["B"] * most["S"], width=576, columns=(576,), groups=3, experts=4, rank=8, share_a=True
        )  # fmt: skip
        plan = choose_launch(shape, scale=1.0, select=Select.SOFT, route=Route.TOKEN, arch=90)
        assert found == [{plan.splits}] * 2 and plan.splits <= MOST_PARTS


def test_heads_that_vary_are_refused() -> None:
    case = attention(ATTENTION_SPLIT, **SMALL, profile={**DECODE, "H": (3, 9)}, calls=())
    loose = dataclasses.replace(case, axes={**case.axes, "query": ("B", "H", "S", 64)})
    with pytest.raises(KernelError, match="query has 3 to 9 at axis 1: heads must be one number in a profile"):
        loose.op.tactics(loose.ranges(), site_of(loose, 90))


def test_a_tile_that_nobody_has_is_refused() -> None:
    case = attention(ATTENTION_FINISH_RUNS, **LARGE, profile=PREFILL, calls=())
    with pytest.raises(KernelError, match="tile is 48: no configuration for sm_90"):
        case.op.tactics(case.ranges(), Site(arch=90, data="bf16", attributes={**case.attributes, "tile": 48}))


def test_a_scalar_that_varies_is_not_assumed_to_be_a_multiple_of_16() -> None:
    case = attention(ATTENTION_SPLIT, **SMALL, profile=DECODE, calls=())
    fixed = {**DECODE, "L": (4096, 4096)}
    scalars = [
        case.op.tactics(ranges, site_of(case, 90))[0].case(ranges).scalars
        for ranges in (case.ranges(), case.ranges(fixed))
    ]
    assert scalars[0] == {"heads": 9, "kv_heads": 3, "capacity": 1, "splits": 1}
    assert scalars[1] == {"heads": 9, "kv_heads": 3, "capacity": 4096, "splits": 1}

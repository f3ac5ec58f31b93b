"""PTX as TensorRT embeds it: assembled for each chip, parameters in a plugin's order; and what cannot be embedded."""

from typing import Any

import bindings
import pytest
from plugin_cases import CASES

from mosear.errors import KernelError
from mosear.kernels.chips import ARCHS
from mosear.kernels.compile import HIDDEN, Parameter
from mosear.kernels.launch import KernelOp
from mosear.kernels.modality_experts.kernel import EXPAND, SHRINK
from mosear.kernels.plugins import ptx
from mosear.kernels.plugins.op import Site, Tactic
from mosear.kernels.plugins.ptx import NOTHING, fitting, reordered
from mosear.kernels.reallocated_attention.decode import MERGE, SPLIT, SPLIT_PAGED
from mosear.kernels.reallocated_attention.kernel import PREFILL, PREFILL_RUNS

KERNELS = {op.name: op for op in (MERGE, SPLIT, SPLIT_PAGED, PREFILL, PREFILL_RUNS, EXPAND, SHRINK)}
DEFAULT_ARCH = 90


@pytest.fixture(
    scope="module", params=[a if a == DEFAULT_ARCH else pytest.param(a, marks=pytest.mark.full) for a in ARCHS]
)
def made(request: pytest.FixtureRequest) -> tuple[int, Any]:
    return request.param, bindings.child("assembled.py", str(request.param))


def test_every_kernel_assembles_with_a_plugins_parameters(made: tuple[int, Any]) -> None:
    """KPARAM_INFO: inputs, int32 scalars, outputs and nothing else, each at its own place."""
    arch, found = made
    seen = set()
    for name, rows in found.items():
        op = CASES[name].op
        for row in rows:
            kernel = KERNELS.get(row["kernel"])
            seen.add(row["kernel"])
            scalars = kernel.scalars if kernel else ()
            names = [*(f"{n}_ptr" for n in op.inputs), *scalars, *(f"{n}_ptr" for n in op.outputs)]
            assert row["parameters"] == names
            assert row["sizes"] == [4 if n in scalars else 8 for n in names]
            assert row["target"] == [f"sm_{arch}" + ("a" if arch >= 90 else "")]
            assert row["shared"] <= ptx.SHARED_WITHOUT_OPT_IN
            if kernel:
                assert places(row["declared"]) == own_places(kernel, names)
    assert seen == {*KERNELS, "nothing"}


def places(declared: list[str]) -> list[int | None]:
    """Which of the kernel's own parameters stands at each place, by the number in Triton's name for it."""
    return [int(n.rsplit("_", 1)[1]) if "_param_" in n else None for n in declared]


def own_places(kernel: KernelOp, names: list[str]) -> list[int | None]:
    own = [*kernel.inputs, *kernel.scalars, *kernel.outputs]
    return [own.index(n) if n in own else None for n in names]


TEXT = """.version 8.7
.visible .entry k(
	.param .u64 k_param_0,
	.param .u32 k_param_1,
	.param .u64 k_param_2,
	.param .u64 k_param_3,
	.param .u64 k_param_4
)
{
	ld.param.b64 %rd1, [k_param_0];
	ld.param.b32 %r1, [k_param_1];
	ld.param.b64 %rd2, [k_param_2];
	ret;
}
"""
OWN = tuple(
    Parameter(name=name, type=kind, size=8, aligned=False)
    for name, kind in (("x_ptr", "*fp32"), ("n", "i32"), ("y_ptr", "*fp32"), *((hidden, "*i8") for hidden in HIDDEN))
)


def test_parameters_are_put_in_the_nodes_order() -> None:
    text = reordered(TEXT, "k", OWN, ("other_ptr", "x_ptr", "n", "y_ptr"))
    entry = text[text.index("(") : text.index(")")]
    assert [line.split()[-1].rstrip(",") for line in entry.splitlines()[1:]] == [
        "k_unused_0", "k_param_0", "k_param_1", "k_param_2"
    ]  # fmt: skip
    assert text[text.index("{") :] == TEXT[TEXT.index("{") :]


def test_a_kernel_that_reads_its_scratch_memory_is_refused() -> None:
    text = TEXT.replace("\tret;", "\tld.param.b64 %rd3, [k_param_3];\n\tret;")
    with pytest.raises(KernelError, match="k uses global_scratch, memory that TensorRT gives no plugin"):
        reordered(text, "k", OWN, ("x_ptr", "n", "y_ptr"))


def test_a_parameter_that_the_node_lacks_is_refused() -> None:
    with pytest.raises(KernelError, match="k takes y_ptr, which the plugin's node does not have"):
        reordered(TEXT, "k", OWN, ("x_ptr", "n"))


def test_ptx_of_another_form_is_refused() -> None:
    with pytest.raises(KernelError, match="takes 5 parameters, its compiler stated 4"):
        reordered(TEXT, "k", OWN[:4], ("x_ptr", "n", "y_ptr"))
    with pytest.raises(KernelError, match="has not one entry of that name"):
        reordered(TEXT + TEXT, "k", OWN, ("x_ptr", "n", "y_ptr"))


class Sized:
    """`embed` with shared memory that a tile decides, in place of compiling."""

    def __init__(self, sizes: dict[int, int]) -> None:
        self.sizes = sizes

    def __call__(self, op: Any, tactic: Tactic, *_: Any) -> ptx.Embedded:
        block = int(tactic.launch.constants["BLOCK_N"])
        return ptx.Embedded(
            tactic=tactic, number=block, symbol="", ptx="", threads=1, shared_bytes=self.sizes[block], parameters=()
        )


def test_a_tile_above_the_limit_gives_way_to_the_first_spare_one_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["AttentionSplit decode D128"]
    site = Site(arch=90, data="bf16", attributes=case.attributes)
    monkeypatch.setattr(ptx, "embed", Sized({64: 70000, 32: 40000, 16: 20000}))
    assert [made.number for made in fitting(case.op, site, case.ranges())] == [32]
    monkeypatch.setattr(ptx, "embed", Sized({64: 49152, 32: 40000, 16: 20000}))
    assert [made.number for made in fitting(case.op, site, case.ranges())] == [64]
    monkeypatch.setattr(ptx, "embed", Sized({64: 70000, 32: 60000, 16: 49153}))
    with pytest.raises(
        KernelError, match="AttentionSplit for sm_90 in bf16 needs 49153 bytes of shared memory: a plugin may have"
    ):
        fitting(case.op, site, case.ranges())


def test_a_node_without_work_gets_a_kernel_of_its_parameters() -> None:
    case = CASES["AttentionSplit prefill D64"]
    found = fitting(case.op, Site(arch=100, data="fp16", attributes=case.attributes), case.ranges())
    assert [made.symbol for made in found] == [NOTHING] and ".target sm_100a" in found[0].ptx
    assert len(found[0].parameters) == len(case.op.inputs) + len(case.op.outputs)

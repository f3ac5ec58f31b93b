"""What the C++ plugin library embeds beside the catalogue: attention for any number of rows, caches of a multiple of 16 slots.

The catalogue's cases are compiled for the shapes that they name, of which the compiler may assume that a number of rows is a
multiple of 16. A plugin is called with what a prompt has.
"""

from mosear.config import Policy, Statistic
from mosear.kernels.launch import Case
from mosear.kernels.reallocated_attention import decode_launches, launches
from mosear.kernels.reallocated_attention.models import DEMO, GROUPS, LLAMA, Shape

ANY_ROWS, SLOTS = 1, 32  # a scalar of 1 is assumed to be anything, one of 32 to be a multiple of 16
ROWS = 512  # of the prefill whose tile is taken


def cases(arch: int) -> list[Case]:
    """Prefill in any order of groups, split and merge of both models, under each policy that one of them has."""
    return [
        case
        for shape, policies in ((DEMO, (Policy.TARGET, Policy.BALANCE)), (LLAMA, (Policy.BALANCE,)))
        for policy in policies
        for case in _cases(shape, policy, arch)
    ]


def _cases(shape: Shape, policy: Policy, arch: int) -> list[Case]:
    scale, label = shape.head_size**-0.5, f"{shape.name} plugin" + (" target" if policy is Policy.TARGET else "")
    plan = launches.choose_launch(
        batch=1, heads=shape.heads, head_size=shape.head_size, rows=ROWS, groups=GROUPS, policy=policy,
        statistic=Statistic.SUM, scale=scale, causal=True, arch=arch,
    )  # fmt: skip
    scalars = {"heads": ANY_ROWS, "kv_heads": ANY_ROWS, "rows": ANY_ROWS, "capacity": SLOTS}
    step = decode_launches.choose_launch(
        batch=1, heads=shape.heads, kv_heads=shape.kv_heads, head_size=shape.head_size, groups=GROUPS, longest=SLOTS,
        policy=policy, statistic=Statistic.SUM, scale=scale, causal=True, arch=arch,
    )  # fmt: skip
    decode = decode_launches.step_cases(label, step, heads=ANY_ROWS, kv_heads=ANY_ROWS, capacity=SLOTS)
    return [Case(label=label, op=plan.kernel.op, launch=plan.launch, scalars=scalars), *decode]

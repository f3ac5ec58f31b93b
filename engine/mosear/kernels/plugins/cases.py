"""What the C++ plugin library embeds beside the catalogue: kernels for any number of rows, caches of a multiple of 16 slots.

The catalogue's cases are compiled for the shapes that they name, of which the compiler may assume that a number of rows is a
multiple of 16. A plugin is called with what a prompt has.

Experts: one linear, as the graph has them; the parts of d are those for the widest. A label ends in the most rows that its
configuration is for, by which the library chooses.
"""

import dataclasses

from mosear.config import Policy, Statistic
from mosear.kernels.launch import Case
from mosear.kernels.modality_experts import launches as experts
from mosear.kernels.reallocated_attention import decode_launches, launches
from mosear.kernels.reallocated_attention.models import DEMO, GROUPS, LLAMA, Shape

ANY_ROWS, SLOTS = 1, 32  # a scalar of 1 is assumed to be anything, one of 32 to be a multiple of 16
ROWS = 512  # of the prefill whose tile is taken


def cases(arch: int) -> list[Case]:
    """Prefill in any order of groups, split and merge under each policy that a model has; shrink and expand of both models."""
    policies = ((DEMO, Policy.TARGET), (DEMO, Policy.BALANCE), (LLAMA, Policy.BALANCE))
    attention = [case for shape, policy in policies for case in _attention(shape, policy, arch)]
    return attention + [case for name in experts.MODELS for case in _experts(name, arch)]


def _experts(name: str, arch: int) -> list[Case]:
    """One configuration for each row of the launcher's table, the parts of d those for its most rows."""
    width, columns = experts.MODELS[name]
    found = []
    for row in experts.TABLE:
        shape = experts.shape_of(width, (max(columns),), rows=min(row.most_rows, ROWS))
        found += experts.cases_of(f"{name} plugin rows {row.most_rows}", shape, arch=arch)
    return [dataclasses.replace(case, scalars=dict(case.scalars) | {"n_rows": ANY_ROWS}) for case in found]


def _attention(shape: Shape, policy: Policy, arch: int) -> list[Case]:
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

"""Heads packed for an engine: fewer and larger calls for each token, the same numbers.

Linears that share their input (q, k and v; gate and up) share one product with all their A's and gates, side by side in
`down`; `up` is each one's B with the factor scale * w_m in it. Policy parameters are split into their columns. All are
made from the heads when an engine is built.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from mosear.config import ModelConfig, Route, Target
from mosear.contract import MODALITY_WEIGHT, Tensors, heads
from mosear_export import plain
from mosear_export.fuse import replace_nodes
from mosear_export.ops import ATTENTION, ATTENTION_INPUTS, DOMAIN, EXPERTS

# Linears that share x, their products side by side in `base`: `down` is [A's | gates] of all, `up` their B's with scale and
# modality weight in them, each beside its linear's columns.
_JOINT = """
    axis2 = Constant <value = int64[1] {{2}}> ()
    last = Constant <value = int64[1] {{-1}}> ()
    zero = Constant <value = float {{0.0}}> ()
    floor = Constant <value = float {{-1e30}}> ()
    owner = Constant <value = int32[{GE}] {{{owner}}}> ()
    down_split = Constant <value = int64[2] {{{TAR}, {TGE}}}> ()
    by_linear = Constant <value = int64[4] {{0, 0, {T}, {GE}}}> ()
    split_s = Constant <value = int64[5] {{0, 0, {TA}, {each}, 1}}> ()
    split_u = Constant <value = int64[5] {{0, 0, {TA}, 1, {R}}}> ()
    flat_mixed = Constant <value = int64[3] {{0, 0, {TGER}}}> ()

    group_column = Unsqueeze(group, last)
    is_own = Equal(group_column, owner)
    hidden_flat = Where(is_own, zero, floor)
    hidden = Unsqueeze(hidden_flat, axis2)
    low = MatMul(x, down)
    u_flat, logits_flat = Split <axis = -1> (low, down_split)
    logits = Reshape(logits_flat, by_linear)
    own_logits = Add(logits, hidden)
{select}
    coefficient = Reshape(s, split_s)
    u = Reshape(u_flat, split_u)
    mixed = Mul(coefficient, u)
    mixed_flat = Reshape(mixed, flat_mixed)
    delta = MatMul(mixed_flat, up)
    y = Add(base, delta)
"""
JOINT_INPUTS, JOINT_OUTPUTS = ("x", "group", "down", "base", "up"), ("y", "s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Joint:
    """The ModalityExperts nodes of one layer whose linears share their input, and where these linears' products come from."""

    nodes: tuple[NodeProto, ...]
    split: NodeProto | None  # of the joined products, whose outputs are the bases; None where there is one alone

    @property
    def prefixes(self) -> tuple[str, ...]:
        """`layers.<n>.<target>` of each."""
        return tuple(node.input[4].removesuffix(".a") for node in self.nodes)

    @property
    def name(self) -> str:
        layer, targets = self.prefixes[0].rsplit(".", 1)[0], (prefix.rsplit(".", 1)[1] for prefix in self.prefixes)
        return f"{layer}.{'_'.join(targets)}"

    @property
    def base(self) -> str:
        return str(self.split.input[0] if self.split else self.nodes[0].input[0])


# Linears whose products are joined where they share an input, in the order of their columns.
SIBLINGS = ((Target.Q_PROJ, Target.K_PROJ, Target.V_PROJ), (Target.GATE_PROJ, Target.UP_PROJ))
# Columns of contract.AR_PARAMS that a policy takes together.
PARAMS = {
    "tau": slice(0, 2),
    "ramp": slice(2, 4),
    "move": slice(4, 6),
    "sigma": slice(6, 7),
    "audio_share": slice(7, 8),
}
PACKED_ATTENTION = f"Packed{ATTENTION}"


def pack(model: ModelProto, config: ModelConfig, values: Tensors) -> Tensors:
    """Replace the decoder's mechanisms in place; returns the heads that its inputs now are, made from `values`.

    With route = modality a gate does not depend on its token: such experts stay as they are.
    """
    packed, known = dict(values), {spec.name for spec in heads(config)}
    _split_params(model, config, packed)
    if config.mose.route is Route.TOKEN and (joints := list(_joints(model))):
        for joint in joints:
            packed |= _packed(joint, config, values)
        packed = {name: value for name, value in packed.items() if name not in known}
        _join_experts(model, config, joints)
    kept = [value for value in model.graph.input if value.name not in known or value.name in packed]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    model.graph.input.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape)
        for name, value in packed.items()
        if name not in known
    )
    return packed


def _split_params(model: ModelProto, config: ModelConfig, packed: Tensors) -> None:
    """`ar_params` [H, P] of each layer become the columns of PARAMS, each [H, 1, n]."""
    at = ATTENTION_INPUTS.index("policy_params")
    for node in model.graph.node:
        if (node.domain, node.op_type) == (DOMAIN, ATTENTION):
            name = node.input[at]
            value, columns = packed.pop(name)[:, None], {f"{name}.{kind}": place for kind, place in PARAMS.items()}
            packed |= {column: np.ascontiguousarray(value[..., place]) for column, place in columns.items()}
            inputs = [*node.input[:at], *columns, *node.input[at + 1 :]]
            node.op_type = PACKED_ATTENTION
            del node.input[:]
            node.input.extend(inputs)
    model.functions.append(plain.attention(config, name=PACKED_ATTENTION, params=tuple(PARAMS)))


def _joints(model: ModelProto) -> Iterator[Joint]:
    by_input: dict[str, list[NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        if (node.domain, node.op_type) == (DOMAIN, EXPERTS):
            by_input[node.input[1]].append(node)
    splits = {output: node for node in model.graph.node if node.op_type == "Split" for output in node.output}
    return (Joint(nodes=tuple(nodes), split=splits.get(nodes[0].input[0])) for nodes in by_input.values())


def _packed(joint: Joint, config: ModelConfig, values: Tensors) -> Tensors:
    """down [d, T * A * R + T * G * E] and up [T * G * E * R, columns of the base]."""
    a, gates, b = (
        [np.asarray(values[f"{p}.{kind}"], np.float32) for p in joint.prefixes] for kind in ("a", "gate", "b")
    )
    weight = np.repeat(np.asarray(values[MODALITY_WEIGHT]), config.mose.experts * config.mose.rank)  # [G * E * R]
    factor = np.float32(config.mose.scale) * weight.astype(np.float32)[:, None]
    width = config.backbone.linear_size
    targets = [Target(prefix.rsplit(".", 1)[1]) for prefix in joint.prefixes]
    siblings = next((group for group in SIBLINGS if joint.split and targets[0] in group), tuple(targets))
    rows = [
        np.concatenate(
            [value * factor if other is target else np.zeros((len(value), width(other)[1])) for other in siblings],
            axis=1,
        )
        for target, value in zip(targets, b, strict=True)
    ]
    down = np.ascontiguousarray(np.concatenate([*a, *gates]).T)
    return {f"{joint.name}.down": down, f"{joint.name}.up": np.concatenate(rows).astype(np.float32)}


def _join_experts(model: ModelProto, config: ModelConfig, joints: list[Joint]) -> None:
    """One node for each joint, behind its linears' product; gates are folded to a row's own group once for all."""
    behind = {joint.base: joint for joint in joints}
    collected = {joint.nodes[0].output[1]: f"{joint.name}.gates" for joint in joints}
    folded = {node.output[1] for joint in joints for node in joint.nodes[1:]}
    result: list[NodeProto] = []
    for node in model.graph.node:
        if node.op_type == "Concat" and node.input[0] in collected:
            names = [collected.get(name, name) for name in node.input if name not in folded]
            every = f"{node.output[0]}_of_all_groups"
            result.append(helper.make_node("Concat", names, [every], axis=2))
            result.append(helper.make_node("MatMul", [every, "own_group"], list(node.output)))
        elif node.op_type != EXPERTS:
            result.append(node)
        if joint := next((behind[output] for output in node.output if output in behind), None):
            result.append(_joint_node(joint))
    model.graph.initializer.append(numpy_helper.from_array(plain.fold(config), "own_group"))
    model.functions.extend(_joint_function(config, size) for size in sorted({len(j.nodes) for j in joints}))
    replace_nodes(model, result)


def functions(config: ModelConfig) -> list[FunctionProto]:
    """The functions of packed experts, of one linear and of two, or the plain one where gates are state."""
    if config.mose.route is Route.TOKEN:
        return [_joint_function(config, size) for size in (1, 2)]
    return [function for function in plain.functions(config) if function.name == EXPERTS]


def _joint_node(joint: Joint) -> NodeProto:
    """The node of a joint; its sum takes the base's place for the split, or the place of the only linear's sum."""
    given, y = {node.input[0]: node.output[0] for node in joint.nodes}, f"{joint.name}.y"
    inputs = [*joint.nodes[0].input[1:3], f"{joint.name}.down", joint.base, f"{joint.name}.up"]
    if joint.split is None:
        y = joint.nodes[0].output[0]
    else:
        joint.split.input[0] = y
        joint.split.output[:] = [given.get(output, output) for output in joint.split.output]
    return helper.make_node(_joint_name(len(joint.nodes)), inputs, [y, f"{joint.name}.gates"], domain=DOMAIN)


def _joint_name(linears: int) -> str:
    return f"Joint{EXPERTS}{linears}"


def _joint_function(config: ModelConfig, linears: int) -> FunctionProto:
    """Experts of some linears with one input (route = token).

    The output s [B, S, linears, G * E] has the gates, 0 for other groups than the row's own.
    """
    mose, size = config.mose, len(config.groups)
    sets, experts = 1 if mose.share_a else size, size * mose.experts
    body = _JOINT.format(
        T=linears, TA=linears * sets, each=experts // sets, R=mose.rank, GE=experts, TAR=linears * sets * mose.rank,
        TGE=linears * experts, TGER=linears * experts * mose.rank, owner=plain.owners(config), select=plain.select(config),
    )  # fmt: skip
    return plain.function(_joint_name(linears), JOINT_INPUTS, JOINT_OUTPUTS, (), body)

"""The decoder: a LLaMA when its mechanisms are neutral, and the same answers however a sequence is cut into calls."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_reallocated_attention import attention64
from tolerance import assert_close, clear_rows
from torch import Tensor
from toy import AR, SHAPES, decoder_inputs, next_state, random_tensor, toy_config, toy_model
from transformers import LlamaConfig, LlamaForCausalLM

from mosear.config import BackboneConfig, ModelConfig, MoSEConfig, Policy, Route, Select, Statistic, Target
from mosear.contract import AR_PARAMS, DECODER, MODALITY_WEIGHT, parts
from mosear_export.demo.fetch import DemoFiles
from mosear_export.demo.smollm import GGUFModel
from mosear_export.model.decoder import (
    Decoder,
    ReferenceOps,
    empty_cache,
    rope_tables,
    rotate,
    write_cache,
    zero_heads,
)  # fmt: skip
from mosear_export.model.whole import ReferenceModel, run_decoder
from mosear_export.ops import ATTENTION_INPUTS

TEXT, VIDEO, AUDIO = 0, 1, 2
CAPACITY = 16
both_shapes = pytest.mark.parametrize("shape", SHAPES)


def transformers_config(shape: BackboneConfig) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        rms_norm_eps=shape.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=shape.tied_embeddings,
        max_position_embeddings=shape.max_positions,
        attn_implementation="eager",
    )


def transformers_twin(model: ReferenceModel) -> LlamaForCausalLM:
    """transformers' LLaMA with this model's backbone."""
    llama = LlamaForCausalLM(transformers_config(model.config.backbone)).eval().requires_grad_(False)
    left = llama.load_state_dict(model.files()["backbone"], strict=False)
    tied = ["lm_head.weight"] if model.config.backbone.tied_embeddings else []
    assert left.missing_keys == tied and not left.unexpected_keys
    return llama


def neutral(config: ModelConfig) -> dict[str, Tensor]:
    """Heads whose experts add nothing."""
    return zero_heads(config)


def run(model: ReferenceModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return model.run(DECODER, tensors)


def in_pieces(
    model: ReferenceModel, pieces: Sequence[int], *, batch: int = 2, seed: int = 0, **changes: Tensor
) -> dict[str, Tensor]:
    """Run the sequences in calls of so many rows each; outputs of all rows, and the cache as it is at the end."""
    part, outputs, start = parts(model.config)[DECODER], [], 0
    state: dict[str, Tensor] = {}
    for rows in pieces:
        call = decoder_inputs(
            model.config, batch=batch, rows=rows, capacity=CAPACITY, start=start, seed=seed, **changes, **state
        )
        outputs.append(run(model, call))
        state, start = next_state(part, outputs[-1]), start + rows
    row_axis = {o.name: o.axes.index("S" if "S" in o.axes else "Q") for o in part.outputs if {"S", "Q"} & set(o.axes)}
    return outputs[-1] | {name: torch.cat([o[name] for o in outputs], axis) for name, axis in row_axis.items()}


def off_the_jump(outputs: dict[str, Tensor], sigma: float) -> None:
    """No row of any layer may lie at the jump: it would move all that comes after it."""
    assert clear_rows(outputs["mass_before"][..., [VIDEO, AUDIO]].sum(-1), sigma).all()


@both_shapes
def test_a_full_pass_is_transformers(shape: str) -> None:
    model = toy_model(toy_config(backbone=SHAPES[shape]))
    model.heads = neutral(model.config)
    ids = torch.randint(0, 61, (3, CAPACITY), generator=torch.Generator().manual_seed(0))
    hidden = model.run("embedding", {"token_ids": ids.int()})["hidden"]
    quiet = {"strength": torch.zeros(3), "group_bias": torch.zeros(3, 3), "hidden": hidden}
    outputs = run(model, decoder_inputs(model.config, batch=3, rows=CAPACITY, capacity=CAPACITY) | quiet)
    assert_close(outputs["logits"], transformers_twin(model)(ids).logits, "toy")
    assert outputs["mass_before"].equal(outputs["mass_after"])


@both_shapes
def test_cached_decoding_of_a_ragged_batch_is_transformers(shape: str) -> None:
    """Prompts of 5, 3 and 1 tokens in one padded call, then six tokens each, every request at its own position."""
    model = toy_model(toy_config(backbone=SHAPES[shape]))
    model.heads = neutral(model.config)
    part, prompt, steps = parts(model.config)[DECODER], [5, 3, 1], 6
    quiet = {"strength": torch.zeros(3), "group_bias": torch.zeros(3, 3)}
    whole = decoder_inputs(model.config, batch=3, rows=CAPACITY, capacity=CAPACITY)["hidden"]
    llama = transformers_twin(model)
    expected = [llama(inputs_embeds=whole[b : b + 1, : n + steps]).logits[0] for b, n in enumerate(prompt)]
    outputs = run(model, decoder_inputs(model.config, batch=3, rows=5, capacity=CAPACITY, lengths=prompt, **quiet))
    for b, n in enumerate(prompt):
        assert_close(outputs["logits"][b, :n], expected[b][:n], "toy")
    for step in range(steps):
        start, state = [n + step for n in prompt], next_state(part, outputs)
        call = decoder_inputs(model.config, batch=3, rows=1, capacity=CAPACITY, start=start, **quiet, **state)
        outputs = run(model, call)
        for b, n in enumerate(prompt):
            assert_close(outputs["logits"][b, 0], expected[b][n + step], "toy")


def test_logits_come_for_the_rows_that_are_wanted() -> None:
    model = toy_model(toy_config())
    tensors = decoder_inputs(model.config, batch=2, rows=6, capacity=CAPACITY)
    every = run(model, tensors)["logits"]
    wanted = torch.tensor([[5, 0], [2, 2]]).int()
    some = run(model, tensors | {"logit_row": wanted})["logits"]
    assert_close(some, every.take_along_dim(wanted.long()[:, :, None], 1), "regrouped")


CHOICES = {
    "balance-sum": {"ar": AR},
    "balance-mean": {"ar": dataclasses.replace(AR, statistic=Statistic.MEAN)},
    "target": {"ar": dataclasses.replace(AR, policy=Policy.TARGET)},
}


@both_shapes
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("pieces", [(12,), (7, 5), (6, *[1] * 6), (1, 4, 2, 5), (1,) * 12], ids=str)
def test_any_cut_into_calls_is_one_full_pass(shape: str, choice: str, pieces: tuple[int, ...]) -> None:
    model = toy_model(toy_config(backbone=SHAPES[shape], **CHOICES[choice]))
    from_row = {"first_row": torch.tensor([0, 5]).int()}
    whole, cut = in_pieces(model, (12,), **from_row), in_pieces(model, pieces, **from_row)
    off_the_jump(whole, AR.sigma)
    assert (whole["mass_after"] != whole["mass_before"]).any()
    for spec in parts(model.config)[DECODER].outputs:
        used = slice(0, 12) if spec.name.endswith("_out") else slice(None)
        assert_close(cut[spec.name][:, :, used], whole[spec.name][:, :, used], "toy")


@pytest.mark.parametrize("select", Select)
def test_gates_of_a_modality_are_made_once_and_carried(select: Select) -> None:
    """Prefill makes them from the prompt's means; decode takes them as they are, whatever its rows hold."""
    mose = MoSEConfig(targets=(Target.Q_PROJ, Target.UP_PROJ), rank=2, route=Route.MODALITY, select=select)
    config = toy_config(mose=mose)
    model, part = toy_model(config), parts(config)[DECODER]
    kinds = torch.arange(CAPACITY, dtype=torch.int32).expand(2, -1) % 3  # every modality has rows
    prompt = decoder_inputs(config, batch=2, rows=8, capacity=CAPACITY, lengths=[8, 6], key_group=kinds)
    prompt["group"] = kinds[:, :8].contiguous()
    outputs = run(model, prompt)
    gates = outputs["gate_state_out"]  # [B, layers * targets, G, E]
    assert_close(gates.sum(-1), torch.ones(2, 4, 3), "op")
    # Made from the mean of each modality's rows, padding left out: layer 0's query sees the normalised inputs.
    normed = model.decoder.layers[0].input_layernorm(prompt["hidden"])
    for b, length in enumerate((8, 6)):
        for g in range(3):
            own = normed[b, :length][kinds[b, :length] == g]
            logits = model.heads["layers.0.q_proj.gate"].unflatten(0, (3, -1))[g] @ own.mean(0)
            expected = logits.softmax(0) if select is Select.SOFT else torch.eye(2)[logits.argmax()]
            assert_close(gates[b, 0, g], expected, "op")
    rows = outputs["expert_weights"][1, 0, :6]  # each row has the gates of its own modality
    assert rows.equal(gates[1, 0][kinds[1, :6].long()])

    step = decoder_inputs(config, batch=2, rows=1, capacity=CAPACITY, start=[8, 6], **next_state(part, outputs))
    first = run(model, step)
    assert first["gate_state_out"].equal(gates)
    again = run(model, step | {"hidden": 5 - step["hidden"]})
    assert again["gate_state_out"].equal(gates) and not again["logits"].equal(first["logits"])
    other = run(model, step | {"gate_state": gates.flip(-1)})
    assert not other["logits"].equal(first["logits"])


def test_a_modality_without_rows_is_gated_evenly() -> None:
    config = toy_config(mose=MoSEConfig(rank=2, experts=4, route=Route.MODALITY))
    tensors = decoder_inputs(config, batch=1, rows=4, capacity=CAPACITY)
    tensors |= {"group": torch.zeros(1, 4).int(), "key_group": torch.zeros(1, CAPACITY).int()}
    assert run(toy_model(config), tensors)["gate_state_out"][:, :, [VIDEO, AUDIO]].eq(0.25).all()


class Blindfolded(ReferenceOps):
    """Attention in float64 that hides the keys of one group, or of none."""

    def __init__(self, group: int | None) -> None:
        self.group = group

    def attend(self, *tensors: Tensor, policy: str, statistic: str, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        named, rule = dict(zip(ATTENTION_INPUTS, tensors, strict=True)), Policy(policy)
        answers = attention64(named, policy=rule, statistic=Statistic(statistic), scale=scale, hidden=self.group)
        output, before, after = (torch.from_numpy(part).float() for part in answers)
        return output, before, after


@both_shapes
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("muted", [None, TEXT, VIDEO, AUDIO])
def test_muting_is_hiding_those_keys_from_every_row_of_every_layer(shape: str, choice: str, muted: int | None) -> None:
    """With both modalities there the policy acts as well, and is the one of the configuration."""
    config = toy_config(backbone=SHAPES[shape], **CHOICES[choice])
    bias = torch.zeros(2, 3)
    tensors = decoder_inputs(config, batch=2, rows=12, capacity=CAPACITY, lengths=[12, 9], group_bias=bias.clone())
    tensors["first_row"][:] = 4
    hidden = run(toy_model(config, ops=Blindfolded(muted)), tensors)
    if muted is not None:
        bias[:, muted] = -torch.inf
    outputs = run(toy_model(config), tensors | {"group_bias": bias})
    off_the_jump(outputs, AR.sigma)
    assert outputs["mass_after"].equal(outputs["mass_before"]) == (muted in (VIDEO, AUDIO))
    for b, length in enumerate((12, 9)):
        assert_close(outputs["logits"][b, :length], hidden["logits"][b, :length], "toy")
    assert_close(outputs["mass_after"], hidden["mass_after"], "toy")


@both_shapes
@pytest.mark.parametrize("route", Route)
def test_what_a_muted_modality_says_changes_no_bit(shape: str, route: Route) -> None:
    """In prefill and in each decoded token after it."""
    mose = MoSEConfig(targets=tuple(Target), rank=2, route=route)
    config = toy_config(backbone=SHAPES[shape], mose=mose)
    model, part, mute = toy_model(config), parts(config)[DECODER], torch.tensor([[0.0, 0.0, -torch.inf]] * 2)
    prompt = decoder_inputs(config, batch=2, rows=10, capacity=CAPACITY, group_bias=mute)
    audio = (prompt["group"] == AUDIO)[:, :, None]
    noise = random_tensor(part.inputs[0], {"B": 2, "S": 10}, torch.Generator().manual_seed(9))
    other = prompt | {"hidden": torch.where(audio, 7 * noise, prompt["hidden"])}
    heard = [run(model, tensors | {"group_bias": torch.zeros(2, 3)})["logits"] for tensors in (prompt, other)]
    assert not heard[0].equal(heard[1])
    ours, theirs = run(model, prompt), run(model, other)
    rest = ~audio.expand_as(ours["logits"])
    assert ours["logits"][rest].equal(theirs["logits"][rest])
    for step in range(3):
        call: dict[str, Any] = {"batch": 2, "rows": 1, "capacity": CAPACITY, "start": 10 + step}
        text = {"group_bias": mute, "group": torch.zeros(2, 1).int()}
        kinds = prompt["key_group"].clone()
        kinds[:, 10:] = TEXT
        ours, theirs = (
            run(model, decoder_inputs(config, **call, **text, key_group=kinds, **next_state(part, last)))
            for last in (ours, theirs)
        )
        assert ours["logits"].equal(theirs["logits"])


def test_padding_rows_write_behind_the_sequence_only() -> None:
    model = toy_model(toy_config())
    tensors = decoder_inputs(model.config, batch=1, rows=4, capacity=CAPACITY, start=5, lengths=[7])
    outputs = run(model, tensors)
    for name, written in parts(model.config)[DECODER].state:
        old, new = tensors[name], outputs[written]
        assert new[:, :, :5].equal(old[:, :, :5]) and new[:, :, 9:].equal(old[:, :, 9:])
        assert (new[:, :, 5:7] != old[:, :, 5:7]).any(-1).all()
    assert not outputs["mass_before"][:, :, :, 2:].any()


def test_the_cache_is_written_at_each_requests_own_slot() -> None:
    rows = torch.arange(1.0, 13).view(2, 1, 3, 2)
    cache = write_cache(torch.zeros(2, 1, 6, 2), rows, torch.tensor([0, 3]).int())
    assert cache[0, 0, :3].equal(rows[0, 0]) and not cache[0, 0, 3:].any()
    assert cache[1, 0, 3:].equal(rows[1, 0]) and not cache[1, 0, :3].any()
    shape = SHAPES["grouped"]
    assert [c.shape for c in empty_cache(shape, batch=3, capacity=5)] == [(3, 2, 5, 8)] * 4


def test_rotation_keeps_length_and_depends_on_distance() -> None:
    cos, sin = rope_tables(SHAPES["grouped"])
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))

    def product(i: int, j: int) -> Tensor:
        return (rotate(q, cos, sin, torch.tensor([[i]])) * rotate(k, cos, sin, torch.tensor([[j]]))).sum()

    assert_close(product(3, 1), product(40, 38), "op")
    assert not product(3, 1).allclose(product(3, 2))
    assert_close(rotate(q, cos, sin, torch.tensor([[9]])).norm(), q.norm(), "op")


@pytest.mark.demo
def test_the_demo_backbone_is_transformers(demo_files: DemoFiles) -> None:
    """SmolLM2's real weights, all 30 layers: a prompt, then tokens one by one, mechanisms there but neutral."""
    gguf = GGUFModel(demo_files.gguf)
    state = gguf.tensors()
    config = toy_config(backbone=gguf.config(), mose=MoSEConfig())
    llama = LlamaForCausalLM(transformers_config(config.backbone)).eval().requires_grad_(False)
    llama.load_state_dict(state, strict=False, assign=True)
    llama.tie_weights()
    decoder, part = Decoder(config).eval().requires_grad_(False), parts(config)[DECODER]
    tied = {"lm_head.weight": state["model.embed_tokens.weight"]}
    decoder.load_state_dict({name.removeprefix("model."): t for name, t in (state | tied).items()}, assign=True)
    heads = neutral(config)
    ids = torch.tensor([gguf.tokenizer().encode("The face looks happy, but the voice sounds sad. Why?").ids])
    n, prompt = ids.shape[1], ids.shape[1] - 4
    expected = llama(ids).logits
    hidden, state_of = decoder.embed_tokens(ids), {}
    for start, rows in [(0, prompt), *((i, 1) for i in range(prompt, n))]:
        call = decoder_inputs(config, batch=1, rows=rows, capacity=n, start=start, strength=torch.zeros(1), **state_of)
        call |= {"hidden": hidden[:, start : start + rows], "group_bias": torch.zeros(1, 3)}
        outputs = run_decoder(decoder, part, call, heads)
        assert_close(outputs["logits"], expected[:, start : start + rows], "demo")
        state_of = next_state(part, outputs)
    assert outputs["logits"][0, -1].argmax() == expected[0, -1].argmax()
    assert zero_heads(config)[MODALITY_WEIGHT].eq(1).all() and heads["layers.29.ar_params"].shape == (9, len(AR_PARAMS))

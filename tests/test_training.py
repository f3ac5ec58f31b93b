"""Training of heads on a toy model: what is drawn, what regularises, where projectors start, and that a run can go on."""

import csv
import dataclasses
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from PIL import Image
from safetensors.torch import save_file
from tolerance import assert_close
from toy_engine import byte_tokenizer

from mosear.config import ARConfig, Policy
from mosear.contract import MODALITY_WEIGHT
from mosear.errors import ConfigError
from mosear.kernels.reallocated_attention.policy import params
from mosear.kernels.reallocated_attention.reference import reallocated_attention
from mosear.runtime.prompt import AUDIO, VIDEO, PromptBuilder, Task
from mosear_export.demo.assemble import plain_lora
from mosear_export.model.face import LABELS as FACE_LABELS
from mosear_export.model.projector import Projector
from mosear_export.training import evaluate as evaluation
from mosear_export.training import linear, regularise
from mosear_export.training.examples import Sampler, answer_of
from mosear_export.training.features import Features, Labelled, compute
from mosear_export.training.ops import TrainOps
from mosear_export.training.run import settings
from mosear_export.training.train import Start, TrainConfig, Trainer

LABELS = ("neutral", "happy", "sad", "angry", "fearful", "disgusted", "surprised", "bored")
SETTINGS = TrainConfig(steps=4, batch=3, warm_up=1, save_every=2, learning_rate=0.01, direct=0.5, reallocate=0.5)


def config() -> toy.ModelConfig:
    made = toy.toy_config(labels=LABELS, ar=ARConfig())
    return dataclasses.replace(made, backbone=dataclasses.replace(made.backbone, vocab_size=300, max_positions=512))


def features(made: toy.ModelConfig) -> Features:
    """Noise with labels: three voices and three faces of each, two variants, the speakers 1 and 14."""
    rng = np.random.default_rng(0)
    heard = [label for label in LABELS if label != "surprised"] * 3
    seen = [label for label in LABELS if label != "bored"] * 3
    voice = rng.standard_normal((len(heard), 2, made.voice.tokens, made.voice.feature_size)).astype(np.float32)
    face = rng.standard_normal((len(seen), 2, made.face.feature_size)).astype(np.float32)
    scenes = rng.standard_normal((5, made.scene.tokens, made.scene.feature_size)).astype(np.float32)
    return Features(
        voices=Labelled(values=voice, emotion=np.array(heard), origin=np.array(["1", "14"] * 20)[: len(heard)]),
        faces=Labelled(values=face, emotion=np.array(seen), origin=np.array(["train"] * len(seen))), scenes=scenes,
    )  # fmt: skip


def trainer(settings: TrainConfig = SETTINGS, made: toy.ModelConfig | None = None) -> Trainer:
    made = made or config()
    model = toy.toy_model(made, ops=TrainOps())
    for name, head in model.heads.items():
        if name.endswith(".b"):
            head.zero_()
    model.heads[MODALITY_WEIGHT].fill_(1.0)
    return Trainer(model, PromptBuilder(made, byte_tokenizer()), features(made), settings)


def run(kept: Path, settings: TrainConfig = SETTINGS, *, stop: int | None = None) -> dict[str, torch.Tensor]:
    made = trainer(settings)
    sampler = Sampler(features(made.model.config), seed=settings.seed, frames=3)
    if stop is not None:
        drawn = sampler.draw

        def draw(*arguments: object, **named: object):  # type: ignore[no-untyped-def]
            draw.calls += 1  # type: ignore[attr-defined]
            if draw.calls > stop * settings.batch:  # type: ignore[attr-defined]
                raise KeyboardInterrupt
            return drawn(*arguments, **named)  # type: ignore[arg-type]

        draw.calls = 0  # type: ignore[attr-defined]
        sampler.draw = draw  # type: ignore[method-assign]
    made.run(sampler, print, kept)
    return {name: tensor.detach().clone() for name, tensor in (made.trained | made.projected).items()}


def test_a_stopped_training_goes_on_to_the_same_heads(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "part.pt", stop=3)
    for name, tensor in run(tmp_path / "part.pt").items():
        assert torch.equal(tensor, whole[name]), name
    started = trainer()
    assert all(not torch.equal(whole[name], t) for name, t in started.trained.items() if name.endswith(".b"))


def test_another_trainings_state_is_refused(tmp_path: Path) -> None:
    short = dataclasses.replace(SETTINGS, steps=1, batch=1)
    run(tmp_path / "a.pt", short)
    with pytest.raises(ConfigError, match="other settings"):
        run(tmp_path / "a.pt", dataclasses.replace(short, seed=1))


def test_plain_lora_is_one_for_all_and_no_larger(tmp_path: Path) -> None:
    made = config()
    peer = plain_lora(made)
    sizes = []
    for plain, model in ((False, made), (True, peer)):
        found = trainer(dataclasses.replace(SETTINGS, plain=plain), model)
        sizes.append(sum(t.numel() for n, t in found.trained.items() if n != MODALITY_WEIGHT))
    assert 0.9 * sizes[0] < sizes[1] <= sizes[0] and peer.mose.scale == made.mose.scale
    found = trainer(dataclasses.replace(SETTINGS, plain=True), peer)
    found.run(Sampler(features(peer), seed=0, frames=3), print, tmp_path / "plain.pt")
    assert any(one.abs().max() > 0 for one in found.shared.values())


def test_attention_in_training_is_the_references() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, h, 6, 4, generator=generator) for h in (4, 2, 2))
    group = torch.tensor([[0, 1, 2, 0, 0, 0], [0, 2, 2, 1, 0, 0]], dtype=torch.int32)
    position, length = torch.arange(6, dtype=torch.int32).expand(2, -1), torch.tensor([6, 6], dtype=torch.int32)
    first, strength = torch.tensor([4, 5], dtype=torch.int32), torch.tensor([0.3, 1.0])
    ar = ARConfig(policy=Policy.TARGET, audio_share=0.8, move=1.0)
    for bias in (torch.zeros(2, 3), torch.tensor([[0.0, 0.0, -torch.inf], [0.0, -torch.inf, 0.0]])):
        given = params(ar, layer=0, heads=4)
        ops = TrainOps()
        ops.policy = Policy.TARGET
        tensors = (query, key, value, group, position, length, first, given, strength, bias)
        found = ops.attend(*tensors, policy="off", statistic="sum", scale=0.5)
        wanted = reallocated_attention(*tensors, policy=Policy.TARGET, statistic=ar.statistic, scale=0.5)
        for a, b in zip(found, wanted, strict=True):
            assert_close(a, b, kind="op")


def test_direct_examples_hide_face_and_voice_from_text_that_asks() -> None:
    made = trainer()
    example = dataclasses.replace(_example(made), direct=True)
    changed = dataclasses.replace(example, voice=None if example.voice is None else example.voice + 1)
    seen = []
    for direct in (True, False):
        pair = [dataclasses.replace(e, direct=direct) for e in (example, changed)]
        batch = made.batch(pair, noise=False)
        rows = batch.inputs["first_row"][0] - 1 + torch.zeros(2, 1, dtype=torch.int32)
        inputs = {**batch.inputs, "logit_row": rows}
        with torch.no_grad():
            logits = made.run_decoder(dataclasses.replace(batch, inputs=inputs), ar=None)["logits"]
        seen.append(bool(torch.equal(logits[0], logits[1])))
    assert seen == [True, False]


def _example(made: Trainer):  # type: ignore[no-untyped-def]
    sampler = Sampler(features(made.model.config), seed=0, frames=3)
    while True:
        example = sampler.draw(None, direct=0.0)
        if example.face is not None and example.voice is not None and not example.muted:
            return example


def test_open_conflicts_follow_what_reallocation_gives() -> None:
    sampler = Sampler(features(config()), seed=0, frames=3)
    for share, low, high in ((0.0, 0.20, 0.30), (0.5, 0.45, 0.55), (1.0, 0.70, 0.80)):
        strengths = sampler.rng.random(3000)
        heard = [sampler._joint("sad", "happy", 0.5 + s * (share - 0.5)) == "happy" for s in strengths]
        assert low < np.mean(heard) < high
    assert sampler._joint("neutral", "happy", 0.0) == "happy" and sampler._joint("sad", "neutral", 1.0) == "sad"
    drawn = [sampler.draw(0.9, direct=0.5) for _ in range(200)]
    assert {e.strength > 0 for e in drawn} == {True, False} and 60 < sum(e.direct for e in drawn) < 140
    for reasons, wanted in ((0.0, {Task.CLASSIFY}), (1.0, {Task.REASON})):
        assert {sampler.draw(None, direct=0.0, reasons=reasons).task for _ in range(20)} == wanted
    assert all(e.strength == 0 for e in (sampler.draw(None, direct=0.0) for _ in range(50)))


def test_reasons_name_face_voice_and_whether_they_agree() -> None:
    said = answer_of("sad", "happy", "happy", Task.REASON)
    assert said == "The face looks sad and the voice sounds happy. They disagree. The emotion is happy."


def test_load_is_one_where_experts_share_evenly() -> None:
    group, there = torch.tensor([[0, 1, 1, 2]]), torch.tensor([[True, True, True, False]])
    even = torch.full((1, 2, 4, 2), 0.5)
    assert regularise.load(even, group, there, groups=3) == 1
    one = torch.tensor([1.0, 0.0]).expand(1, 2, 4, 2)
    assert regularise.load(one, group, there, groups=3) == 2
    ignored = even.clone()
    ignored[:, :, 3] = torch.tensor([1.0, 0.0])
    assert regularise.load(ignored, group, there, groups=3) == 1
    by_turns = torch.stack([one[0, 0, 0], even[0, 0, 0], one[0, 0, 0], even[0, 0, 0]]).expand(1, 2, 4, 2)
    assert regularise.load(by_turns, group, there, groups=3) == pytest.approx((2 + 2 * (0.75**2 + 0.25**2)) / 2)


def test_entropy_and_balance() -> None:
    there = torch.tensor([[True, True, False]])
    even, one = torch.full((1, 1, 3, 2), 0.5), torch.tensor([1.0, 0.0]).expand(1, 1, 3, 2)
    assert regularise.entropy(even, there) == pytest.approx(1) and regularise.entropy(one, there) == pytest.approx(0)
    assert regularise.entropy(torch.ones(1, 1, 3, 1), there) == 0
    weight = torch.ones(3)
    assert regularise.balance(weight) == pytest.approx(0, abs=1e-6)
    weight[AUDIO], weight[VIDEO] = 3.0, 1.0
    assert regularise.balance(weight) == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5), rel=1e-5)


def test_a_linear_classifier_learns_what_is_linear() -> None:
    values = torch.eye(3).repeat(5, 1) + 0.05 * torch.randn(15, 3, generator=torch.Generator().manual_seed(0))
    weights = linear.fit(values, ["a", "b", "c"], ["b", "c", "a"] * 5, decay=1e-4)
    said = (torch.nn.functional.pad(values, (0, 1), value=1.0) @ weights.T).argmax(1)
    assert said.tolist() == [1, 2, 0] * 5


def test_projectors_start_at_the_words_of_the_nets_own_labels() -> None:
    """The token of a face lies nearest the word that the net's logits name."""
    generator = torch.Generator().manual_seed(0)
    size = 9 + len(FACE_LABELS)
    values = torch.randn(40, size, generator=generator) + 3
    projector, directions = Projector(size, 64), torch.linalg.qr(torch.randn(64, 8, generator=generator))[0].T
    projector.requires_grad_(False)
    projector.mean.copy_(values.mean(0))
    projector.deviation.copy_(values.std(0))
    standard = (values - projector.mean) / projector.deviation
    classifier = torch.zeros(len(LABELS), size + 1)  # the net's own: its logits are the last of its features
    for index, label in enumerate(FACE_LABELS, size - len(FACE_LABELS)):
        classifier[LABELS.index(label), index] = projector.deviation[index]
        classifier[LABELS.index(label), -1] = projector.mean[index]
    linear.start_from(projector, classifier, directions, standard)
    nearest = (projector(values) @ directions.T).argmax(1)
    net = torch.tensor([LABELS.index(FACE_LABELS[i]) for i in values[:, -len(FACE_LABELS) :].argmax(1)])
    assert (nearest == net).float().mean() > 0.8
    untouched = trainer(dataclasses.replace(SETTINGS, start=Start.RANDOM)).projected["face_projector.linear.weight"]
    assert not torch.equal(untouched, trainer().projected["face_projector.linear.weight"])


def test_a_trained_projector_reads_another_classifier_as_it_read_the_nets_logits() -> None:
    """The net's own logits, at any size, change nothing; others move only what was read of logits."""
    generator = torch.Generator().manual_seed(0)
    count, size = len(FACE_LABELS), 9 + len(FACE_LABELS)
    values = torch.randn(200, size, generator=generator)
    values = (values - values.mean(0)) / values.std(0)
    projector = Projector(size, 16).requires_grad_(False)
    before = projector.linear(values).clone()
    own = torch.cat([torch.zeros(count, size - count), torch.eye(count), torch.ones(count, 1)], dim=1)
    linear.reread(projector, 3 * own, values)
    assert_close(projector.linear(values), before, kind="op")
    turned = torch.cat([values[:, :-count], values[:, -count:].roll(1, dims=1)], dim=1)
    wanted = projector.linear(turned).clone()
    linear.reread(projector, own.roll(1, dims=0), values)
    assert_close(projector.linear(values), wanted, kind="op")


def test_heads_to_go_on_from_are_checked(tmp_path: Path) -> None:
    made = trainer()
    heads = {name: tensor.detach() for name, tensor in made.model.files()["heads"].items()}
    save_file(heads, tmp_path / "a.safetensors")
    found = trainer(dataclasses.replace(SETTINGS, base=str(tmp_path / "a.safetensors")))
    name = next(n for n in heads if n.endswith(".a"))
    assert torch.equal(found.model.heads[name].detach(), heads[name])
    del heads[name]
    save_file(heads, tmp_path / "b.safetensors")
    for file, message in (("b", "not this model's"), ("c", "cannot be read")):
        with pytest.raises(ConfigError, match=message):
            trainer(dataclasses.replace(SETTINGS, base=str(tmp_path / f"{file}.safetensors")))


def test_evaluation_gives_every_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "PAIRS", 2)
    monkeypatch.setattr(evaluation, "STRENGTHS", (0.0, 1.0))
    made = trainer()
    data = features(made.model.config)
    found = evaluation.evaluate(made, data.voices, data.faces, print)
    assert set(found) >= {"voice", "face", "pairs, strength 0", "pairs, strength 1"}
    assert all(0 <= value <= 1 for name in found for key, value in found[name].items() if key != "n")
    assert found["face"]["n"] == len(data.faces.values)


def test_settings_are_read_strictly(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text("steps = 7\nleft_out = ['03', '08']\n")
    found = settings(file, ["seed=3", "start='random'"])
    assert (found.steps, found.left_out, found.seed, found.start) == (7, ("03", "08"), 3, Start.RANDOM)
    for wrong, message in ((["step=3"], "did you mean 'steps'"), (["seed"], "not TOML"), (["direct=2"], "share")):
        with pytest.raises(ConfigError, match=message):
            settings(None, wrong)
    with pytest.raises(ConfigError, match="steps is 0"):
        TrainConfig(steps=0)


def test_features_are_computed_once(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for folder, name in (("voices", "a.wav"), ("faces/train", "a.png"), ("faces/dev", "b.png")):
        (data / folder).mkdir(parents=True)
        with (data / folder / "labels.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["file", "emotion", "speaker"], [name, "happy", "7"]])
        if name.endswith("png"):
            Image.fromarray(np.full((48, 48), 99, np.uint8)).save(data / folder / name)
    with wave.open(str(data / "voices" / "a.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes((3000 * np.sin(np.arange(8000) / 20)).astype(np.int16).tobytes())
    model = toy.toy_model(config())
    found = compute(model, data, tmp_path / "work" / "features.npz", print)
    assert found.voices.values.shape[:2] == (1, 4) and found.voices.origin.tolist() == ["7"]
    assert found.faces.origin.tolist() == ["train", "dev"] and len(found.scenes) == 1
    (data / "voices" / "labels.csv").unlink()
    assert np.array_equal(
        compute(model, data, tmp_path / "work" / "features.npz", print).faces.values, found.faces.values
    )

"""What is timed: classify and greedy decode on engines and peers. `python benchmarks/cases.py ENGINE CLIP N` is the memory run.

Nothing here imports torch before a peer is made, so the memory run counts the engine alone.
"""

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import machine
import numpy as np
from report import DECODE, SHARE
from safetensors import safe_open
from workload import STRENGTH, WORDS

from mosear.artifacts import HEADS
from mosear.backends.session import Backend
from mosear.config import ModelConfig
from mosear.engine import Engine
from mosear.errors import EngineError
from mosear.recipe import Precision
from mosear.runtime.encode import Stages, encode, project
from mosear.runtime.generate import Generation, Rows
from mosear.runtime.pipeline import Pipeline
from mosear.runtime.prompt import Prompt, Task
from mosear.runtime.request import Request
from mosear.runtime.sampling import FloatArray

MIN_PROMPT = 200
CHECKED_TOKENS = 8
EARLY = 20  # requests before the first look at the memory
PEER_TOLERANCE = 1e-3  # of the largest logit

Samples = dict[tuple[str, str], list[float]]  # (measure, unit)


class Subject(Protocol):
    """Something that is timed: its cases by name, and the bytes of weights that a decoded token needs."""

    name: str
    bytes_per_token: int
    cases: dict[str, Callable[[], Samples]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """Greedy tokens, the time to the first, and the time of each later one."""

    tokens: list[int]
    prefill_ms: float
    step_ms: list[float]

    @property
    def samples(self) -> Samples:
        rate = len(self.step_ms) / (sum(self.step_ms) / 1e3)
        return {
            ("prefill", "ms"): [self.prefill_ms],
            ("token", "ms"): self.step_ms,
            (DECODE, "tokens/s"): [rate],
        }


class Served:
    """A pipeline on some backend: our engines, and the PyTorch reference under the same runtime."""

    def __init__(
        self, name: str, pipeline: Pipeline, backend: Backend, clip: bytes, *, tokens: int, bytes_per_token: int
    ) -> None:
        """`backend`: the one that the pipeline runs on."""
        self.name, self.pipeline, self.backend, self.clip = name, pipeline, backend, clip
        self.tokens, self.bytes_per_token = tokens, bytes_per_token
        self.prompt, self.fields = reason_prompt(pipeline, clip)
        self.cases: dict[str, Callable[[], Samples]] = {
            "classify": self.classify,
            "first word": self.first_word,
            "reason": lambda: self.reason(STRENGTH).samples,
        }

    def label(self) -> tuple[str, int, dict[str, float]]:
        """The label, the prompt's tokens and the stages' times of one classify request."""
        request = Request(task=Task.CLASSIFY, video=self.clip, words=WORDS, strength=STRENGTH)
        answer = self.pipeline.answer(request)
        return answer.text, answer.prompt_tokens, dict(answer.timings_ms)

    def classify(self) -> Samples:
        return {(stage, "ms"): [ms] for stage, ms in self.label()[2].items()}

    def first_word(self) -> Samples:
        """From the clip's bytes to the first token of a streamed reason."""
        request = Request(task=Task.REASON, video=self.clip, words=WORDS, strength=STRENGTH, max_tokens=1)
        return {("total", "ms"): [self.pipeline.answer(request).timings_ms["total"]]}

    def reason(self, strength: float, tokens: int | None = None) -> Decoded:
        """Exactly that many greedy tokens, whatever they are."""
        count, rows = tokens or self.tokens, Rows(muted=((),), strength=strength)
        start = time.perf_counter()
        generation = Generation(self.backend, self.pipeline.config, self.prompt, rows, room=count)
        ids = [int(generation.prefill(self.fields)["logits"][0, 0].argmax())]
        prefill_ms, steps = _since_ms(start), []
        for step in range(count - 1):
            start = time.perf_counter()
            out = generation.extend(ids[-1:], len(self.prompt) + step)
            ids.append(int(out["logits"][0, 0].argmax()))
            steps.append(_since_ms(start))
        return Decoded(tokens=ids, prefill_ms=prefill_ms, step_ms=steps)

    def embedded(self) -> FloatArray:
        """The prompt's embeddings [S, d], projected tokens in their places."""
        ids = self.prompt.ids.clip(min=0)[None]
        hidden: FloatArray = np.array(self.backend.run("embedding", {"token_ids": ids})["hidden"][0], np.float32)
        self.prompt.fill(hidden, self.fields)
        return hidden


def reason_prompt(pipeline: Pipeline, clip: bytes) -> tuple[Prompt, dict[str, FloatArray]]:
    features, _ = encode(pipeline.backend, pipeline.config, pipeline.reader.read(clip, None), Stages())
    fields = project(pipeline.backend, features)
    counts = {name: len(values) for name, values in fields.items()}
    return pipeline.builder.build(Task.REASON, counts=counts, words=WORDS), fields


def engine_subject(engine: Engine, clip: bytes, *, tokens: int) -> Served:
    """Bytes per token: the file decoder.onnx.data, and four for each value of the layers' heads (used as fp32)."""
    heads = engine.folder / HEADS
    size = (engine.folder / "decoder.onnx.data").stat().st_size + head_bytes(heads)
    return Served(engine.folder.name, engine.pipeline, engine.backend, clip, tokens=tokens, bytes_per_token=size)


def decode_only(subject: Served) -> Served:
    """The subject with its decode case alone."""
    subject.cases = {"reason": subject.cases["reason"]}
    return subject


def head_bytes(path: Path) -> int:
    """Four bytes for each value in the file that is not 0: packed heads hold zeros, which are no weights.

    0 where the heads are baked into the graph (then they are in its data file).
    """
    if not path.exists():
        return 0
    with safe_open(str(path), "np") as file:
        return 4 * sum(int(np.count_nonzero(file.get_tensor(name))) for name in file.keys())  # noqa: SIM118


def reference_subject(checkpoint: Path, engine: Engine, clip: bytes, *, tokens: int) -> Served:
    """PyTorch eager under the engine's own runtime and media process. Every weight is four bytes."""
    from mosear_export.model.whole import ReferenceModel
    from mosear_export.reference_backend import ReferenceBackend

    model = ReferenceModel.load(checkpoint)
    backend = ReferenceBackend(model)
    size = 4 * sum(value.numel() for value in (*model.decoder.parameters(), *model.heads.values()))
    return Served("pytorch-eager", engine.on(backend), backend, clip, tokens=tokens, bytes_per_token=size)


class Llama:
    """transformers' LlamaForCausalLM on the same prompt embeddings: fp32, sdpa, its own cache; no AR, no MoSE."""

    name = "transformers-llama"

    def __init__(self, checkpoint: Path, config: ModelConfig, hidden: FloatArray, *, tokens: int) -> None:
        import torch
        from safetensors.torch import load_file
        from transformers import LlamaConfig, LlamaForCausalLM

        b = config.backbone
        settings = LlamaConfig(
            vocab_size=b.vocab_size, hidden_size=b.hidden_size, intermediate_size=b.intermediate_size,
            num_hidden_layers=b.layers, num_attention_heads=b.heads, num_key_value_heads=b.kv_heads,
            head_dim=b.head_size, rms_norm_eps=b.norm_eps, max_position_embeddings=b.max_positions,
            rope_parameters={"rope_type": "default", "rope_theta": b.rope_theta},
            tie_word_embeddings=b.tied_embeddings,
        )  # fmt: skip
        settings._attn_implementation = "sdpa"
        self.model = LlamaForCausalLM(settings).eval()  # fp32, torch's default
        lost, extra = self.model.load_state_dict(load_file(checkpoint / "backbone.safetensors"), strict=False)
        if extra or set(lost) - {"lm_head.weight"}:
            raise EngineError(f"{checkpoint}: transformers lacks {lost} and does not know {extra}")
        self.hidden, self.tokens = torch.from_numpy(hidden)[None], tokens
        self.bytes_per_token = 4 * sum(value.numel() for value in self.model.parameters())
        self.cases: dict[str, Callable[[], Samples]] = {"plain decode": lambda: self.decode(self.tokens).samples}

    def logits(self) -> FloatArray:
        """Of the prompt's last position [V]."""
        import torch

        with torch.inference_mode():
            found: FloatArray = self.model(inputs_embeds=self.hidden, logits_to_keep=1).logits[0, -1].numpy()
        return found

    def decode(self, count: int) -> Decoded:
        import torch

        with torch.inference_mode():
            start = time.perf_counter()
            out = self.model(inputs_embeds=self.hidden, use_cache=True, logits_to_keep=1)
            ids = [int(out.logits[0, -1].argmax())]
            prefill_ms, steps = _since_ms(start), []
            for _ in range(count - 1):
                start = time.perf_counter()
                token = torch.tensor([ids[-1:]])
                out = self.model(input_ids=token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
                ids.append(int(out.logits[0, -1].argmax()))
                steps.append(_since_ms(start))
        return Decoded(tokens=ids, prefill_ms=prefill_ms, step_ms=steps)


def _since_ms(start: float) -> float:
    return (time.perf_counter() - start) * 1e3


def check(engines: Sequence[tuple[Engine, Served]], reference: Served) -> dict[str, object]:
    """What was verified before timing. Raises EngineError where an fp32 engine differs from the reference."""
    label, _, _ = reference.label()
    tokens = reference.reason(STRENGTH, CHECKED_TOKENS).tokens
    found: dict[str, object] = {"reference label": label, "reference tokens": tokens}
    for engine, subject in engines:
        own, length, stages = subject.label()
        same = [a == b for a, b in zip(subject.reason(STRENGTH, CHECKED_TOKENS).tokens, tokens, strict=True)]
        if engine.recipe.precision is Precision.FP32 and (own != label or not all(same)):
            raise EngineError(
                f"{engine.folder}: label {own!r}, reference {label!r}; equal tokens {same}: nothing was timed"
            )
        shortest = min(length, len(subject.prompt))
        if shortest < MIN_PROMPT or not {"face", "scene", "voice"} <= stages.keys():
            raise EngineError(f"{engine.folder}: {shortest} prompt tokens, stages {sorted(stages)}: not the workload")
        found[subject.name] = {
            "label": own, "equal tokens": f"{sum(same)}/{len(same)}",
            "classify prompt": length, "reason prompt": len(subject.prompt),
        }  # fmt: skip
    return found


def check_llama(llama: Llama, reference: Served) -> float:
    """Largest logit error of the peer against the reference with its heads set to zero, over the largest logit.

    Raises EngineError above PEER_TOLERANCE: then the two do not run the same backbone.
    """
    from mosear_export.model.decoder import zero_heads
    from mosear_export.reference_backend import ReferenceBackend

    backend = reference.backend
    assert isinstance(backend, ReferenceBackend)
    kept, backend.model.heads = backend.model.heads, zero_heads(backend.model.config)
    try:
        wanted = _plain_logits(backend, reference)
    finally:
        backend.model.heads = kept
    error = float(np.abs(llama.logits() - wanted).max() / np.abs(wanted).max())
    if not error <= PEER_TOLERANCE:
        raise EngineError(f"{llama.name}: logits differ by {error:.2e} of the largest: it is not the same backbone")
    return error


def _plain_logits(backend: Backend, reference: Served) -> FloatArray:
    rows = Rows(muted=((),), strength=0.0)
    generation = Generation(backend, reference.pipeline.config, reference.prompt, rows, room=1)
    return np.array(generation.prefill(reference.fields)["logits"][0, 0], np.float32)


def due(round_: int, count: int, rounds: int) -> bool:
    """Whether one of `count` runs, spread evenly over `rounds`, falls into this round."""
    return round_ * count // rounds != (round_ - 1) * count // rounds


def time_all(
    counts: Sequence[tuple[Subject, int]], memory: machine.Memory, report: Callable[[str], None]
) -> tuple[dict[tuple[str, str], Samples], float]:
    """Samples of each (subject, case), and the best reading of the memory's bandwidth in bytes/s.

    In every round each subject's cases run once, the first subject changing. Beside each decode the bandwidth is read.
    """
    found: dict[tuple[str, str], Samples] = defaultdict(lambda: defaultdict(list))
    for subject, _ in counts:
        for case in subject.cases.values():
            case()  # a warm-up of each, not counted
        report(f"warm: {subject.name}")
    rounds, best = max(count for _, count in counts), 0.0
    for round_ in range(rounds):
        turn = round_ % len(counts)
        for subject, count in (*counts[turn:], *counts[:turn]):
            if not due(round_, count, rounds):
                continue
            for name, case in subject.cases.items():
                samples = found[subject.name, name]
                before, taken, after = memory.bytes_s(), case(), memory.bytes_s()
                best = max(best, before, after)
                for rate in taken.get((DECODE, "tokens/s"), ()):
                    share = rate * subject.bytes_per_token / ((before + after) / 2)
                    taken |= {("read bandwidth", "GB/s"): [(before + after) / 2e9], (SHARE, "1"): [share]}
                for measure, values in taken.items():
                    samples[measure] += values
        report(f"round {round_ + 1} of {rounds}")
    return found, best


def memory_run(folder: Path, clip: bytes, requests: int) -> dict[str, dict[str, int]]:
    """Proportional set size of each process of an engine after request 20 (or the last) and after the last."""
    found: dict[str, dict[str, int]] = {}
    request = Request(task=Task.CLASSIFY, video=clip, words=WORDS, strength=STRENGTH)
    with Engine(folder) as engine:
        for count in range(1, requests + 1):
            engine.pipeline.answer(request)
            if count in {min(EARLY, requests), requests}:
                found[str(count)] = machine.tree_pss_bytes()
    assert "torch" not in sys.modules
    return found


if __name__ == "__main__":
    print(json.dumps(memory_run(Path(sys.argv[1]), Path(sys.argv[2]).read_bytes(), int(sys.argv[3]))))

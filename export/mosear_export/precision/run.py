"""A decoder's graph behind the runtime's backend interface, and what it says of clips: logits, masses, label scores, text.

Label tokens and written tokens enter one by one, so that graphs which reallocate a call's last row alone (`masked`) are
asked what every other is asked.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from mosear.backends.session import Backend, Runner
from mosear.config import ModelConfig
from mosear.contract import DECODER, Tensors, parts
from mosear.runtime.encode import project
from mosear.runtime.generate import Generation, Rows
from mosear.runtime.prompt import PromptBuilder, Task
from mosear.runtime.sampling import FloatArray, log_softmax
from mosear_export.precision.clips import Case
from mosear_export.reference_backend import CopiedState


class GraphBackend:
    """A decoder's graph in a session of ONNX Runtime; all other parts are run by `others`."""

    device, provider = "cpu", "CPUExecutionProvider"

    def __init__(self, session: ort.InferenceSession, heads: Tensors, config: ModelConfig, others: Runner) -> None:
        self.session, self.config, self.others = session, config, others
        self.names = {value.name for value in session.get_inputs()}
        self.heads = {name: value for name, value in heads.items() if name in self.names}
        self.outputs = [spec.name for spec in parts(config)[DECODER].outputs]

    def run(self, part: str, tensors: Tensors) -> Tensors:
        if part != DECODER:
            return self.others.run(part, tensors)
        feeds = {name: np.ascontiguousarray(value) for name, value in tensors.items() if name in self.names}
        return dict(zip(self.outputs, self.session.run(self.outputs, feeds | self.heads), strict=True))

    def start(self, *, batch: int, capacity: int) -> CopiedState:
        return CopiedState(self, self.config, batch=batch, capacity=capacity)

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Said:
    """What a decoder says of a prompt: logits f32 [V] and masses f32 [layers, 2, H, G] of its last row, score of each label."""

    logits: FloatArray
    masses: FloatArray
    scores: FloatArray


class Asker:
    """Asks one decoder about cases."""

    def __init__(self, backend: Backend, config: ModelConfig, builder: PromptBuilder) -> None:
        self.backend, self.config, self.builder = backend, config, builder

    def generation(self, case: Case, task: Task, strength: float, *, room: int) -> tuple[Generation, Tensors]:
        """A request that is not read yet, and its prefill's outputs. room: tokens that may follow."""
        tokens = project(self.backend, case.features)
        counts = {field: len(values) for field, values in tokens.items()}
        prompt = self.builder.build(task, counts=counts, words=case.words)
        generation = Generation(self.backend, self.config, prompt, Rows(muted=((),), strength=strength), room=room)
        return generation, generation.prefill(tokens)

    def classify(self, case: Case, strength: float) -> Said:
        """A classify request's one prefill, and a short call for each further token of a label."""
        labels = self.builder.labels
        generation, out = self.generation(case, Task.CLASSIFY, strength, room=max(map(len, labels)))
        logits = np.array(out["logits"][0, -1], np.float32)
        masses = np.stack(
            [out[name][0, :, :, -1] for name in ("mass_before", "mass_after")], axis=1
        )  # [layers, 2, H, G]
        masses, first, scores = np.array(masses, np.float32), log_softmax(logits[None])[0], []
        for ids in labels:
            score, start = float(first[ids[0]]), len(generation.prompt)
            for place, (token, following) in enumerate(itertools.pairwise(ids)):
                row = generation.extend([token], start + place)["logits"][0, -1]
                score += float(log_softmax(np.array(row, np.float32)[None])[0, following])
            scores.append(score)
        return Said(logits=logits, masses=masses, scores=np.array(scores, np.float32))

    def choices(self, case: Case, strength: float, wanted: Sequence[int] | None, *, steps: int) -> list[int]:
        """The likeliest token at each of `steps` steps of a reason, fed with `wanted` (None: with its own choices)."""
        generation, out = self.generation(case, Task.REASON, strength, room=steps)
        found: list[int] = []
        for step in range(steps):
            found.append(int(np.asarray(out["logits"][0, -1]).argmax()))
            if step + 1 < steps:
                out = generation.extend(
                    [wanted[step] if wanted is not None else found[-1]], len(generation.prompt) + step
                )
        return found


class Captured:
    """A backend that keeps what a decoder is called with and answers nothing."""

    device, provider = "cpu", "none"

    def __init__(self, others: Runner, config: ModelConfig) -> None:
        self.others, self.config, self.calls = others, config, list[Tensors]()

    def run(self, part: str, tensors: Tensors) -> Tensors:
        if part != DECODER:
            return self.others.run(part, tensors)
        self.calls.append({name: np.array(value) for name, value in tensors.items()})
        return {}

    def start(self, *, batch: int, capacity: int) -> CopiedState:
        return CopiedState(self, self.config, batch=batch, capacity=capacity, written=False)

    def close(self) -> None: ...


def prompt_inputs(cases: Sequence[Case], others: Runner, config: ModelConfig, builder: PromptBuilder) -> list[Tensors]:
    """The decoder's inputs, cache included, for each case's prompt; tasks and strengths take turns."""
    captured = Captured(others, config)
    asker, tasks = Asker(captured, config, builder), (Task.CLASSIFY, Task.REASON)
    for i, case in enumerate(cases):
        asker.generation(case, tasks[i % 2], (0.0, 0.5, 1.0)[i % 3], room=1)
    return captured.calls


Report = Callable[[str], None]


def session(path: str, *, threads: int, integers: bool = True) -> ort.InferenceSession:
    """A session of a graph's file. Not with integers: quantised operands are widened and products are in fp32, as a runtime
    without those products does; the numbers are those of the stored format, without a CPU's own integer arithmetic."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, threads
    if not integers:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

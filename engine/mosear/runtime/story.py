"""What a decoder says, made words and judgements."""

from collections.abc import Mapping

from mosear.config import ModelConfig
from mosear.runtime.decode import Prefilled, Said, Scored, Work
from mosear.runtime.disagreement import disagree, disagreement
from mosear.runtime.prompt import PromptBuilder
from mosear.runtime.request import Answer, Judgement
from mosear.runtime.sampling import FloatArray

INCOMPLETE = "\ufffd"  # what the tokenizer writes for a character whose bytes are not all there yet


class Story:
    """What a decoder has said so far, as words and judgements."""

    def __init__(self, config: ModelConfig, builder: PromptBuilder) -> None:
        self.config, self.builder = config, builder
        self.first = {tokens[0]: index for index, tokens in enumerate(builder.labels)}
        self.ids: list[int] = []
        self.text = ""
        self.judgements: list[Judgement] = []
        self.prefilled: Prefilled | None = None

    def take(self, event: Said) -> str:
        """The words that this adds: whole characters only. A reason's label is the last one that it names."""
        if isinstance(event, Prefilled):
            self.prefilled = event
            return ""
        if isinstance(event, Scored):
            self.judgements = [self._judge(row) for row in event.scores]
            self.text = self.judgements[0].label
            return self.text
        self.ids.append(event.id)
        if event.scores is not None:
            self.judgements = [self._judge(event.scores, chosen=self.first[event.id])]
        text = self.builder.decode(self.ids)
        added = "" if text.endswith(INCOMPLETE) else text[len(self.text) :]
        self.text += added
        return added

    def answer(self, work: Work, *, timings_ms: Mapping[str, float], notes: tuple[str, ...]) -> Answer:
        assert self.prefilled is not None, "a decoder says Prefilled first"
        joint = self.judgements[0] if self.judgements else None
        face, voice = self.judgements[1:] or (None, None)
        return Answer(
            task=work.task,
            text=self.text,
            joint=joint,
            face=face,
            voice=voice,
            conflict=disagree(face, voice, self.config.conflict) if face and voice else None,
            conflict_score=disagreement(face, voice, self.config.conflict) if face and voice else None,
            modality_mass=self.prefilled.mass,
            expert_weights=self.prefilled.experts,
            groups=self.config.groups,
            tokens=len(self.ids) or 1,
            prompt_tokens=len(work.ids),
            timings_ms=timings_ms,
            notes=notes,
        )

    def _judge(self, scores: FloatArray, chosen: int | None = None) -> Judgement:
        """The scores of a reason's label are those of the step at which its first token was chosen."""
        labels = self.config.labels
        index = int(scores.argmax()) if chosen is None else chosen
        return Judgement(label=labels[index], scores=dict(zip(labels, map(float, scores), strict=True)))

"""The conflict benchmark: which questions are asked, and what the answers are worth."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import accuracy_metrics as metrics
import numpy as np
from accuracy_asking import Question, Record
from accuracy_metrics import Estimate
from accuracy_pairs import Encoded, Kind, Pair, Sample, truth

from mosear.config import ConflictConfig
from mosear.runtime.disagreement import disagreement
from mosear.runtime.prompt import Task
from mosear.runtime.request import Judgement, Request

Answers = Mapping[str, Record]
TEMPERATURES = (0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0)  # tried for face and voice


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that is asked. default: the strength at which conflict reports and reasons are asked."""

    voices: Sequence[Sample]
    faces: Sequence[Sample]
    pairs: Sequence[Pair]
    labels: tuple[str, ...]
    encoded: Encoded
    schema: str
    strengths: tuple[float, ...]
    default: float
    reasons: int  # pairs of each kind that are asked for reasons
    words: bool  # each voice and each face alone too

    def questions(self) -> list[Question]:
        """Every question, those about single clips first."""
        found = []
        if self.words:
            found += [self._ask(f"voice:{i}", i, None, Task.CLASSIFY, None) for i in range(len(self.voices))]
            found += [self._ask(f"face:{i}", None, i, Task.CLASSIFY, None) for i in range(len(self.faces))]
        found += [self._pair(i, Task.CONFLICT, self.default) for i in range(len(self.pairs))]
        for strength in self.strengths:
            if strength != self.default:
                found += [self._pair(i, Task.CLASSIFY, strength) for i in range(len(self.pairs))]
        found += [self._pair(i, Task.REASON, self.default) for i in self.reasoned()]
        return found

    def reasoned(self) -> list[int]:
        """Indices of the pairs that are asked for reasons: the first of each kind."""
        return [i for kind in Kind for i in self.of(kind)[: self.reasons]]

    def of(self, *kinds: Kind) -> list[int]:
        """Indices of the pairs of these kinds."""
        return [i for i, pair in enumerate(self.pairs) if pair.kind in kinds]

    def key(self, pair: int, strength: float) -> str:
        """Of the question whose joint label is the pair's at this strength."""
        task = Task.CONFLICT if strength == self.default else Task.CLASSIFY
        return f"{task}:{pair}@{strength:g}"

    def _pair(self, index: int, task: Task, strength: float) -> Question:
        pair = self.pairs[index]
        return self._ask(f"{task}:{index}@{strength:g}", pair.voice, pair.face, task, strength)

    def _ask(self, key: str, voice: int | None, face: int | None, task: Task, strength: float | None) -> Question:
        def make() -> Request:
            features = self.encoded.of(voice, face)
            return Request(task=task, features=features, feature_schema=self.schema, strength=strength)

        return Question(key=key, make=make)


class Evaluation:
    """Answers to a plan, as figures. Intervals of pairs draw whole voices: pairs of one voice are not independent."""

    def __init__(self, plan: Plan, answers: Answers) -> None:
        self.plan, self.answers = plan, answers

    def results(self) -> dict[str, object]:
        """Every figure, as plain data."""
        return {
            "words": self.words(),
            "labels": {f"{s:g}": self.labels(s) for s in self.plan.strengths},
            "best single modality on consistent pairs": self.best_single(),
            "strength": self.movement(),
            "detection": self.detection(),
            "reasons": self.reasons(),
            "masses": self.masses(),
            "experts": self.experts(),
        }

    def _said(self, pairs: Iterable[int], strength: float, who: str = "joint") -> list[tuple[int, str]]:
        keys = [(i, self.plan.key(i, strength)) for i in pairs]
        return [(i, self.answers[key][who]["label"]) for i, key in keys if key in self.answers]

    def _emotions(self, pair: int) -> tuple[str, str]:
        plan = self.plan
        return plan.voices[plan.pairs[pair].voice].emotion, plan.faces[plan.pairs[pair].face].emotion

    def _share(self, hits: Sequence[tuple[int, bool]]) -> dict[str, object]:
        """Of pairs' hits, drawn by voice."""
        return _plain(metrics.share([hit for _, hit in hits], [self.plan.pairs[i].voice for i, _ in hits]))

    def words(self) -> dict[str, object]:
        """The label of each voice and each face alone."""
        found: dict[str, object] = {}
        for name, samples in (("voice", self.plan.voices), ("face", self.plan.faces)):
            asked = [(s.emotion, self.answers.get(f"{name}:{i}")) for i, s in enumerate(samples)]
            pairs = [(emotion, record["joint"]["label"]) for emotion, record in asked if record]
            if not pairs:
                continue
            wanted, said = [a for a, _ in pairs], [b for _, b in pairs]
            hits = [a == b for a, b in pairs]
            found[name] = {
                "accuracy": _plain(metrics.share(hits, range(len(hits)))),
                "unweighted recall": metrics.unweighted_recall(wanted, said),
                "by emotion": {
                    e: float(np.mean([h for h, w in zip(hits, wanted) if w == e])) for e in sorted({*wanted})
                },
            }
        return found

    def labels(self, strength: float) -> dict[str, object]:
        """Accuracy where there is a truth; how often the label is the voice's, the face's, neither's."""
        found: dict[str, object] = {}
        for kind in Kind:
            said = self._said(self.plan.of(kind), strength)
            if not said:
                continue
            row: dict[str, object] = {}
            if kind is not Kind.OPEN:
                right = [(i, x == truth(self.plan.pairs[i], self.plan.voices, self.plan.faces)) for i, x in said]
                row["accuracy"] = self._share(right)
            if kind is not Kind.CONSISTENT:
                row["voice"] = self._share([(i, x == self._emotions(i)[0]) for i, x in said])
                row["face"] = self._share([(i, x == self._emotions(i)[1]) for i, x in said])
                row["neither"] = self._share([(i, x not in self._emotions(i)) for i, x in said])
            found[str(kind)] = row
        return found

    def best_single(self) -> dict[str, object]:
        """Accuracy on consistent pairs of the label from the voice alone (face muted), and from the face alone."""
        found: dict[str, object] = {}
        pairs = self.plan.of(Kind.CONSISTENT)
        for who in ("voice", "face"):
            said = self._said(pairs, self.plan.default, who)
            found[who] = self._share([(i, x == self._emotions(i)[0]) for i, x in said])
        return found

    def movement(self) -> dict[str, object]:
        """How the share of open conflicts whose label is the voice's, of those that follow one, moves with the strength."""
        strengths = list(self.plan.strengths)
        rows = []  # of pairs answered at every strength: -1 face, 1 voice, 0 neither
        pairs = [i for i in self.plan.of(Kind.OPEN) if all(self.plan.key(i, s) in self.answers for s in strengths)]
        for i in pairs:
            heard, seen = self._emotions(i)
            said = [label for s in strengths for _, label in self._said([i], s)]
            rows.append([(x == heard) - (x == seen) for x in said])
        lean = np.array(rows, np.float64).reshape(len(rows), len(strengths))

        def curve(index: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
            part = lean[index]
            return np.asarray((part > 0).sum(0) / np.maximum((part != 0).sum(0), 1))

        if len(strengths) < 2 or not rows:
            return {"strengths": strengths, "voice share": curve(np.arange(len(rows))).tolist()}
        clusters = [self.plan.pairs[i].voice for i in pairs]
        shares = curve(np.arange(len(rows)))
        return {
            "strengths": strengths,
            "voice share": shares.tolist(),
            "spearman": metrics.spearman(strengths, shares),
            "slope": _plain(metrics.bootstrap(lambda i: metrics.slope(strengths, curve(i)), clusters)),
            "end to end": _plain(metrics.bootstrap(lambda i: float(curve(i)[-1] - curve(i)[0]), clusters)),
            "labels that change": float(np.mean([len({*row}) > 1 for row in rows])),
        }

    def detection(self) -> dict[str, object]:
        """Is there a conflict: from the report's score (threshold, and with `calibrated` temperatures too, of the other half
        of the pairs), as the report says, and from whether both labels differ, beside what independent words of the
        measured confusions would give. fitted: what is best on all pairs."""
        pairs = [i for i in range(len(self.plan.pairs)) if self.plan.key(i, self.plan.default) in self.answers]
        records = [self.answers[self.plan.key(i, self.plan.default)] for i in pairs]
        grid = [ConflictConfig(face_temperature=f, voice_temperature=v) for f in TEMPERATURES for v in TEMPERATURES]
        table = np.array([[_disagreement(record, config) for record in records] for config in grid])
        scores = table[grid.index(ConflictConfig())]
        positive = np.array([self.plan.pairs[i].kind is not Kind.CONSISTENT for i in pairs])
        if positive.all() or not positive.any():
            return {}
        half = np.array([self.plan.pairs[i].voice % 2 == 0 for i in pairs])
        said, calibrated = (metrics.cross_fitted(rows, positive, half) for rows in (scores[None], table))
        best = metrics.best_row(table, positive)
        differ = np.array([record["face"]["label"] != record["voice"]["label"] for record in records])
        clusters = [self.plan.pairs[i].voice for i in pairs]
        found: dict[str, object] = {
            "auroc": _plain(metrics.bootstrap(_rank(scores, positive), clusters)),
            "threshold on the other half": _decided(said, positive, clusters),
            "calibrated on the other half": _decided(calibrated, positive, clusters),
            "as the report says": _decided(np.array([r["conflict"] for r in records]), positive, clusters),
            "labels differ": _decided(differ, positive, clusters),
        }
        found["fitted"] = dataclasses.asdict(
            dataclasses.replace(grid[best], threshold=metrics.best_threshold(table[best], positive))
        ) | {"auroc": metrics.auroc(table[best][positive], table[best][~positive])}
        if chance := self._independent(pairs):
            found["independent words"] = chance
        return found

    def _independent(self, pairs: Sequence[int]) -> float | None:
        tables = []
        for name, samples in (("voice", self.plan.voices), ("face", self.plan.faces)):
            asked = [(s.emotion, self.answers.get(f"{name}:{i}")) for i, s in enumerate(samples)]
            said = [(emotion, record["joint"]["label"]) for emotion, record in asked if record]
            if not said:
                return None
            tables.append(metrics.confusion([a for a, _ in said], [b for _, b in said], self.plan.labels))
        index = self.plan.labels.index
        kinds = [(index(heard), index(seen)) for heard, seen in map(self._emotions, pairs)]
        return metrics.chance_of_words(tables[0], tables[1], kinds)

    def reasons(self) -> dict[str, object]:
        """The words that a reason names: for voice and face by their places, and as an open-vocabulary set."""
        found: dict[str, list[tuple[int, bool]]] = {"voice word": [], "face word": [], "whether they agree": []}
        sets = []
        for i in self.plan.reasoned():
            record = self.answers.get(f"{Task.REASON}:{i}@{self.plan.default:g}")
            if record is None:
                continue
            heard, seen = self._emotions(i)
            text = record["text"].lower()
            found["voice word"].append((i, f"voice sounds {heard}" in text))
            found["face word"].append((i, f"face looks {seen}" in text))
            found["whether they agree"].append((i, ("disagree" in text) == (heard != seen) and "agree" in text))
            sets.append(metrics.set_scores(named(text, self.plan.labels), {heard, seen}))
        if not sets:
            return {}
        mean = [float(x) for x in np.mean(sets, axis=0)]
        return {name: self._share(hits) for name, hits in found.items()} | {
            "set accuracy": mean[0], "set recall": mean[1], "set average": mean[2], "n": len(sets),
        }  # fmt: skip

    def masses(self) -> list[list[list[float]]]:
        """[layers, 2, G]: attention masses before and after at the strongest reallocation, mean over pairs."""
        strength = max(self.plan.strengths)
        keys = [self.plan.key(i, strength) for i in range(len(self.plan.pairs))]
        found = [self.answers[key]["mass"] for key in keys if key in self.answers]
        return np.mean(found, axis=0).round(5).tolist() if found else []

    def experts(self) -> list[list[float]]:
        """[G, E]: how much each modality uses each expert, mean over pairs."""
        keys = [self.plan.key(i, self.plan.default) for i in range(len(self.plan.pairs))]
        found = [self.answers[key]["experts"] for key in keys if key in self.answers]
        return np.mean(found, axis=0).round(5).tolist() if found else []


def named(text: str, labels: Sequence[str]) -> set[str]:
    """The labels that a text names."""
    return {label for label in labels if re.search(rf"\b{re.escape(label)}\b", text.lower())}


def _disagreement(record: Record, config: ConflictConfig) -> float:
    face, voice = (Judgement(label=told["label"], scores=told["scores"]) for told in (record["face"], record["voice"]))
    return disagreement(face, voice, config)


def _rank(scores: metrics.Array, positive: np.ndarray):  # type: ignore[no-untyped-def, type-arg]
    return lambda index: metrics.auroc(scores[index][positive[index]], scores[index][~positive[index]])


def _decided(said: np.ndarray, positive: np.ndarray, clusters: Sequence[int]) -> dict[str, object]:  # type: ignore[type-arg]
    conflict, consistent = metrics.recalls(said, positive)
    balanced = metrics.bootstrap(lambda index: metrics.balanced(said[index], positive[index]), clusters)
    return {"balanced accuracy": _plain(balanced), "recall of conflict": conflict, "recall of consistent": consistent}


def _plain(estimate: Estimate) -> dict[str, object]:
    return dataclasses.asdict(estimate)

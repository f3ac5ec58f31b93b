"""Accuracy and emotion conflict of an engine: `python benchmarks/accuracy.py --data DIR` (see --help).

The engine runs in this process, or --url names a server of it. A run that is stopped goes on at the same call. Published
benchmarks, for who has their data: `--benchmark ca-mer --root DIR` (layouts: docs/conflict.md).
"""

import argparse
import dataclasses
import hashlib
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import accuracy_parity as parity
import accuracy_report as report
import machine
from accuracy_asking import Ask, Journal, Record, reference, served
from accuracy_bars import FACE_NET, bars
from accuracy_conflict import Evaluation, Plan
from accuracy_pairs import Encoded, Sample, encode_all, make_pairs, read_faces, read_voices
from accuracy_published import BENCHMARKS, run_published
from workload import say

from mosear.config import ARConfig, Policy
from mosear.engine import Engine
from mosear.errors import ConfigError, EngineError, MosearError

NAME = "accuracy"
SPEAKERS = ("14", "15")  # the demo heads have not heard them
STRENGTHS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--benchmark", choices=["conflict", *BENCHMARKS], default="conflict", help="default: %(default)s"
    )
    parser.add_argument("--data", type=Path, help="conflict: folder with voices/ and faces/")
    parser.add_argument("--root", type=Path, help="published benchmarks: their folder")
    parser.add_argument("--engine", type=Path, default=Path("build/engines/cpu-fp32"), help="default: %(default)s")
    parser.add_argument(
        "--url", help="ask this server (host:port of gRPC) of that engine; the folder still encodes clips"
    )
    parser.add_argument("--speakers", default=",".join(SPEAKERS), help="left out of training (default: %(default)s)")
    parser.add_argument("--split", default="dev", help="of the faces (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=60, help="of each kind (default: %(default)s)")
    parser.add_argument("--strengths", type=float, nargs="+", default=list(STRENGTHS), help="default: %(default)s")
    parser.add_argument(
        "--reasons", type=int, default=10, help="pairs of each kind asked for reasons (default: %(default)s)"
    )
    parser.add_argument("--words", action=argparse.BooleanOptionalAction, default=True, help="each clip alone too")
    parser.add_argument("--checkpoint", type=Path, help="of --policy and --parity")
    parser.add_argument(
        "--policy", action="append", default=[], metavar="NAME[:AUDIO_SHARE]",
        help="ask the PyTorch reference too, under this reallocation policy: balance, target:0.9 (an engine has one)",
    )  # fmt: skip
    parser.add_argument("--parity", action="store_true", help="ask the reference the same, and compare: a release gate")
    parser.add_argument("--retry-failed", action="store_true", help="ask again what failed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--work", type=Path, default=Path("build/accuracy"), help="answers so far (default: %(default)s)"
    )
    parser.add_argument("--name", default=NAME, help="of the result files (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results") / machine.slug())
    options = parser.parse_args(arguments)
    conflict = options.benchmark == "conflict"
    if (options.data if conflict else options.root) is None:
        parser.error("conflict needs --data" if conflict else f"{options.benchmark} needs --root")
    if (options.policy or options.parity) and not options.checkpoint:
        parser.error("--policy and --parity need --checkpoint")
    if options.pairs < 1 or options.reasons < 0 or not all(0 <= s <= 1 for s in options.strengths):
        parser.error("--pairs must be 1 or more, --reasons 0 or more, --strengths from 0 to 1")
    return options


def make_plan(options: argparse.Namespace, engine: Engine) -> Plan:
    """What is asked, with every clip encoded."""
    voices = read_voices(options.data, options.speakers.split(","))
    faces = read_faces(options.data, options.split)
    schema = engine.files.schema
    encoded = encode_all(engine.backend, engine.config, voices, faces, work=options.work, schema=schema, say=say)
    default = engine.config.ar.strength
    return Plan(
        voices=voices, faces=faces, labels=engine.config.labels, encoded=encoded, schema=schema, default=default,
        pairs=make_pairs(voices, faces, engine.config.labels, count=options.pairs, seed=options.seed),
        strengths=tuple(sorted({*options.strengths, default})), reasons=options.reasons, words=options.words,
    )  # fmt: skip


def settings_of(options: argparse.Namespace, engine: Engine, subject: str) -> dict[str, object]:
    """What answers depend on: a journal of other settings is not gone on with."""
    clips = hashlib.sha256("".join(p.name for p in sorted(options.data.rglob("*.*"))).encode()).hexdigest()[:12]
    return {
        "subject": subject, "engine": engine.files.manifest.key, "recipe": engine.recipe.name, "seed": options.seed,
        "speakers": options.speakers, "faces": options.split, "pairs of each kind": options.pairs, "data": clips,
    }  # fmt: skip


def policy_of(text: str, default: ARConfig) -> ARConfig:
    """`balance`, or `target:0.9` with the share of the voice; raises ConfigError."""
    name, _, share = text.partition(":")
    try:
        policy = Policy(name)
        if not share:
            return ARConfig(policy=policy, strength=default.strength)
        return ARConfig(policy=policy, strength=default.strength, audio_share=float(share), move=1.0)
    except ValueError:
        raise ConfigError(f"--policy is {text!r}: name one of {', '.join(Policy)}, such as target:0.9") from None


def face_net(encoded: Encoded, faces: list[Sample]) -> float:
    """How often the demo's face net alone is right: its logits are the last of its features."""
    from mosear_export.model.face import LABELS

    said = encoded.faces[:, -len(LABELS) :].argmax(1)
    return sum(LABELS[i] == face.emotion for i, face in zip(said, faces, strict=True)) / len(faces)


def run_conflict(options: argparse.Namespace, engine: Engine, stack: ExitStack) -> dict[str, dict[str, object]]:
    """Results of each subject: the engine (or server), then the reference under each policy."""
    plan = make_plan(options, engine)
    asks: dict[str, Ask] = {
        "served" if options.url else "engine": stack.enter_context(served(options.url))
        if options.url
        else engine.pipeline.answer
    }
    for name in options.policy:
        asks[f"reference, {name}"] = reference(engine, options.checkpoint, policy_of(name, engine.config.ar))
    if options.parity:
        asks["reference"] = reference(engine, options.checkpoint)
    results, answers = dict[str, dict[str, object]](), dict[str, Mapping[str, Record]]()
    for subject, ask in asks.items():
        say(f"{subject}: {len(plan.questions())} questions")
        part = dataclasses.replace(plan, words=False, reasons=0) if "," in subject else plan  # a policy
        settings = settings_of(options, engine, subject)
        file = f"{options.name}-{subject.replace(', ', '-').replace(':', '-')}.jsonl"
        journal = Journal(options.work / file, settings)
        journal.ask_all(part.questions(), ask, say, retry=options.retry_failed)
        answers[subject] = journal.answered(part.questions())
        results[subject] = {
            "machine": machine.stamp(), "settings": settings | {"default strength": plan.default},
            FACE_NET: face_net(plan.encoded, list(plan.faces)), "failed": journal.failed(),
            **Evaluation(part, answers[subject]).results(),
        }  # fmt: skip
    if options.parity:
        found = next(iter(answers.values()))
        compared = parity.compare(plan, engine.config, engine.pipeline.builder, found, answers["reference"])
        results[next(iter(results))]["parity"] = compared
    return results


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        with ExitStack() as stack:
            if options.benchmark != "conflict":
                return run_published(options, stack)
            engine = stack.enter_context(Engine(options.engine))
            results = run_conflict(options, engine, stack)
            judged = {name: bars(result, default=engine.config.ar.strength) for name, result in results.items()}
            for path in report.write(results, judged, options.out, name=options.name):
                say(f"wrote {path}")
            for name, result in results.items():
                print("\n".join(report.text(name, result, judged[name])))
            if options.parity:
                compared = next(iter(results.values()))["parity"]
                assert isinstance(compared, dict)
                if missed := parity.faults(compared, precision=str(engine.recipe.precision)):
                    raise EngineError("; ".join(missed))
    except MosearError as error:
        say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

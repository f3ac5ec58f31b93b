"""Precision recipes beside fp32 on real clips: `python benchmarks/precision.py --data DIR NAME...` (see --help).

A NAME is an engine folder (build/engines/cpu-int8), a TensorRT recipe (export/recipes/rtx-fp16.toml: its graph with narrow
types emulated by ONNX Runtime), or a decoder of `make quantise` (build/quantised/fp8). One result file each, and a table of
all that were measured on this machine. `--sensitivity` quantises a layer's products at a time.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import machine
import numpy as np
from workload import say

from mosear.artifacts import HEADS
from mosear.backends.session import Backend
from mosear.engine import KIND, Engine
from mosear.errors import ConfigError, MosearError
from mosear.recipe import Recipe
from mosear_export.model.whole import ReferenceModel
from mosear_export.precision import candidates, clips, compare, optimise
from mosear_export.precision.run import Asker, Said
from mosear_export.precision.sensitivity import MODES, measure
from mosear_export.reference_backend import ReferenceBackend

NAME = "precision"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", type=Path, metavar="NAME", help="what is measured")
    parser.add_argument("--data", type=Path, required=True, help="folder with voices/ and faces/ (docs/conflict.md)")
    parser.add_argument(
        "--each", type=int, default=40, help="clips with a voice, a face, both, words (default: %(default)s)"
    )
    parser.add_argument(
        "--reasons", type=int, default=10, help="clips whose reasons are compared (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=24, help="tokens of each reason (default: %(default)s)")
    parser.add_argument(
        "--engine", type=Path, default=Path("build/engines/cpu-fp32"), help="encodes (default: %(default)s)"
    )
    parser.add_argument("--checkpoint", type=Path, default=Path("build/checkpoints/demo"), help="default: %(default)s")
    parser.add_argument("--onnx", type=Path, default=Path("build/onnx/onnx"), help="default: %(default)s")
    parser.add_argument(
        "--sensitivity", choices=MODES, help="of the only NAME, a decoder of `make quantise`, or of cpu-int8"
    )
    parser.add_argument("--threads", type=int, default=0, help="of each session (default: the engine's)")
    parser.add_argument("--gate", action="store_true", help="fail where a bar is missed")
    parser.add_argument(
        "--work", type=Path, default=Path("build/precision"), help="the reference's answers (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results") / machine.slug())
    options = parser.parse_args(arguments)
    if not options.names:
        parser.error("name an engine, a recipe or a quantised decoder")
    return options


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Something to be measured."""

    name: str
    precision: str
    how: str
    opened: AbstractContextManager[Backend]


def candidate(path: Path, options: argparse.Namespace, engine: Engine) -> Candidate:
    """What a NAME is; raises ConfigError where it is nothing that we know."""
    threads = options.threads or engine.recipe.used_threads
    if path.suffix == ".toml":
        recipe = Recipe.load(path)
        opened = candidates.emulated(recipe, options.onnx, engine.backend, threads=threads)
        how = "the graph for TensorRT, narrow types emulated in fp32"
        return Candidate(name=recipe.name, precision=recipe.precision, how=how, opened=opened)
    kind = json.loads((path / "manifest.json").read_text())["kind"] if (path / "manifest.json").exists() else ""
    if kind == KIND:
        with Engine(path) as other:
            recipe = other.recipe
        opened = candidates.of_engine(path, threads=threads)
        return Candidate(name=recipe.name, precision=recipe.precision, how="the engine itself", opened=opened)
    if kind == optimise.KIND and (path / HEADS).exists():
        name = path.resolve().name.rsplit("-", 1)[0]
        opened = candidates.of_optimiser(path, engine.config, engine.backend, threads=threads)
        how = "the Model Optimizer's graph, quantised and widened again, products in fp32"
        return Candidate(name=f"modelopt-{name}", precision=name.split("-")[0], how=how, opened=opened)
    raise ConfigError(f"{path} is no engine, no recipe and no quantised decoder: build it first")


class Remembered(Asker):
    """Asks the reference, and keeps its answers in files: it is slow, and the same for every recipe."""

    def __init__(self, asker: Asker, folder: Path) -> None:
        super().__init__(asker.backend, asker.config, asker.builder)
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def _path(self, case: clips.Case, *more: object) -> Path:
        found = hashlib.sha256(repr((case.words, more)).encode())
        for name in sorted(case.features):
            found.update(name.encode() + case.features[name].tobytes())
        return self.folder / f"{found.hexdigest()[:20]}.npz"

    def classify(self, case: clips.Case, strength: float) -> Said:
        path = self._path(case, strength)
        if not path.exists():
            said = super().classify(case, strength)
            np.savez(path, **{name: getattr(said, name) for name in Said.__slots__})
        return Said(**np.load(path))

    def choices(self, case: clips.Case, strength: float, wanted: Sequence[int] | None, *, steps: int) -> list[int]:
        path = self._path(case, strength, wanted, steps)
        if not path.exists():
            np.savez(path, tokens=super().choices(case, strength, wanted, steps=steps))
        return [int(token) for token in np.load(path)["tokens"]]


def run_parity(options: argparse.Namespace, engine: Engine) -> list[str]:
    """Write a result for each name; returns the bars that were missed."""
    builder = engine.files.prompt_builder()
    say("clips are encoded")
    cases = clips.read_cases(options.data, clips.PARITY, engine.backend, engine.config, each=options.each)
    reference = Remembered(
        Asker(ReferenceBackend(ReferenceModel.load(options.checkpoint)), engine.config, builder),
        options.work / options.checkpoint.resolve().name,
    )
    say("the PyTorch reference is asked")
    wanted = compare.ask(reference, cases, say, reasons=options.reasons, steps=options.steps)
    missed = list[str]()
    for path in options.names:
        one, start = candidate(path, options, engine), time.monotonic()
        say(f"{one.name} is asked")
        with one.opened as backend:
            asker = Asker(backend, engine.config, builder)
            found = compare.ask(asker, cases, say, reasons=options.reasons, steps=options.steps, follow=wanted)
        result = {
            "machine": machine.stamp(), "name": one.name, "precision": one.precision, "run by": one.how,
            "clips": f"{options.each} each of voice, face, both, words; speakers {', '.join(clips.HELD_OUT)}, faces dev",
            "tokens of a text": options.steps, **compare.compare(cases, engine.config.labels, found, wanted),
        }  # fmt: skip
        faults = compare.faults(result, precision=one.precision)
        result["bars missed"] = faults
        missed += [f"{one.name}: {fault}" for fault in faults]
        _write(options.out / f"{NAME}-{one.name}.json", result)
        say(f"{one.name}: {result['labels that agree']:.1%} of labels agree ({time.monotonic() - start:.0f} s)")
    return missed


def _write(path: Path, result: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    say(f"wrote {path}")


def table(folder: Path) -> list[str]:
    """All results of a folder as Markdown."""
    columns = (
        "recipe", "run by", "questions", "labels agree", "RMS of logits: median", "largest", "error of a mass, largest",
        "texts equal", "voice share, furthest",
    )  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for path in sorted(folder.glob(f"{NAME}-*.json")):
        found = json.loads(path.read_text())
        if "labels that agree" in found:
            rms, mass = found["rms of logits"], found["error of masses"]
            cells = (
                f"`{found['name']}`", found["run by"], found["questions"], f"{found['labels that agree']:.1%}",
                f"{rms['median']:.2g}", f"{rms['max']:.2g}", f"{mass['max']:.2g}",
                f"{found['texts whose tokens are equal']} of {found['texts']}",
                f"{found['largest distance of the voice share']:.3f}",
            )  # fmt: skip
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def sensitivity_tables(folder: Path) -> Iterator[str]:
    """A table for each sensitivity file of a folder."""
    for path in sorted(folder.glob(f"{NAME}-sensitivity-*.json")):
        found = json.loads(path.read_text())
        yield f"\n{found['name']}: quantised alone, {found['clips']} clips, RMS error of logits relative to theirs\n"
        yield "| layers | median | largest | error of a mass, largest |"
        yield "|---|---|---|---|"
        for row in found["rows"]:
            yield f"| {row['layers']} | {row['median']:.4f} | {row['max']:.4f} | {row['mass']:.3f} |"


def run_sensitivity(options: argparse.Namespace, engine: Engine) -> list[str]:
    """Write the table of the only name; it has no bars."""
    cases = clips.read_cases(options.data, clips.CALIBRATION, engine.backend, engine.config, each=options.each, seed=5)
    result = measure(options.names[0], options.onnx, options.sensitivity, cases, engine, say)
    file = f"{NAME}-sensitivity-{options.sensitivity}-{result['name']}.json"
    _write(options.out / file, {"machine": machine.stamp()} | result)
    return []


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        with Engine(options.engine) as engine:
            missed = run_sensitivity(options, engine) if options.sensitivity else run_parity(options, engine)
            (options.out / f"{NAME}.md").write_text(
                "\n".join([*table(options.out), *sensitivity_tables(options.out), ""])
            )
    except MosearError as error:
        say(f"error: {error}")
        return 1
    for fault in missed:
        say(f"missed: {fault}")
    return int(options.gate and bool(missed))


if __name__ == "__main__":
    sys.exit(main())

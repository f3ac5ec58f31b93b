"""Latency of built engines beside peers, in process: `python benchmarks/latency.py` (see --help).

With --url: through a running server beside the same engine in process.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import bare
import cases
import machine
import report
import served
from workload import STRENGTH, make_demo_clip, say

from mosear.engine import Engine
from mosear.errors import MosearError

DEFAULT_ENGINES = (Path("build/engines/cpu-fp32"), Path("build/engines/cpu-int8"))
NOTES = (
    "bytes per token, of weights alone (cache and activations left out): engines: size of decoder.onnx.data + 4 x values "
    "other than 0 in heads.safetensors (heads and gates run in fp32); peers: 4 x parameters. share = tokens/s * bytes per "
    "token / read bandwidth, which is read before and after each run (best of 3 each; their mean).",
    "first word: from the clip's bytes to the first token of a reason. prefill: from the assembled prompt to the first "
    "token; tokens/s counts the tokens after the first.",
    "bare: the same backbone and recipe exported without experts and with policy off; it still reports the masses.",
    "transformers-llama runs the same prompt embeddings and as many tokens through the backbone alone: no AR, no MoSE.",
    "percentiles interpolate linearly between ranks; with few samples p99 is nearly the maximum.",
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", type=Path, action="append", help="engine folder (repeatable)")
    parser.add_argument("--checkpoint", type=Path, default=Path("build/checkpoints/demo"))
    parser.add_argument("--n", type=int, default=50, help="repeats of each engine's cases; peers: max(3, n // 10)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results") / machine.slug())
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--bare", type=Path, default=Path("build/bare"), help="where engines without AR and MoSE are kept"
    )
    parser.add_argument("--tokens", type=int, default=64, help="greedy tokens of a reason case")
    parser.add_argument("--memory-requests", type=int, default=200, help="0: no memory run")
    parser.add_argument(
        "--url", help="host:port of a running server's gRPC: time it beside the first engine, nothing else"
    )
    options = parser.parse_args()
    options.engine = options.engine or [folder for folder in DEFAULT_ENGINES if folder.exists()]
    if not options.engine:
        parser.error("there is no engine: build one with `python export/build_engine.py` or name one with --engine")
    if len({folder.name for folder in options.engine}) < len(options.engine):
        parser.error("two engine folders have the same name: results are kept by that name")
    if options.n < 1 or options.tokens < 2 or options.memory_requests < 0:
        parser.error("--n must be 1 or more, --tokens 2 or more, --memory-requests 0 or more")
    return options


def run(options: argparse.Namespace, clip_path: Path) -> report.Result:
    import torch

    clip = clip_path.read_bytes()
    with ExitStack() as stack:
        engines = [stack.enter_context(Engine(folder)) for folder in options.engine]
        folders = [bare.bare_engine(engine.recipe, options.checkpoint, options.bare, say) for engine in engines]
        plain = [stack.enter_context(Engine(folder)) for folder in folders]
        memory, stamp = machine.Memory(), machine.stamp()
        threads = engines[0].recipe.used_threads
        torch.set_num_threads(threads)
        subjects = [cases.engine_subject(engine, clip, tokens=options.tokens) for engine in engines]
        decoders = [cases.decode_only(cases.engine_subject(e, clip, tokens=options.tokens)) for e in plain]
        reference = cases.reference_subject(options.checkpoint, engines[0], clip, tokens=options.tokens)
        checks = cases.check(list(zip(engines, subjects, strict=True)), reference)
        counts: list[tuple[cases.Subject, int]] = [(subject, options.n) for subject in (*subjects, *decoders)]
        if options.peers:
            few, config = max(3, options.n // 10), engines[0].config
            llama = cases.Llama(options.checkpoint, config, reference.embedded(), tokens=options.tokens)
            checks[llama.name] = f"logit error {cases.check_llama(llama, reference):.1e} of the largest, heads zero"
            counts += [(reference, few), (llama, few)]
        say("checked; timing")
        timed, best = cases.time_all(counts, memory, say)
    limits = {"read_bytes_s_best": best, "multiply_adds_s": machine.multiply_adds_s()}
    rows, shares = tabulate(timed, counts, best)
    stamp["load_average_after"] = machine.stamp()["load_average"]
    return report.Result(
        machine=stamp,
        limits=limits,
        settings={"n": options.n, "tokens": options.tokens, "threads": threads, "strength": STRENGTH},
        checks=checks,
        rows=rows,
        shares=shares,
        notes=NOTES,
    )


def tabulate(
    timed: Mapping[tuple[str, str], cases.Samples], counts: Sequence[tuple[cases.Subject, int]], best: float
) -> tuple[list[report.Row], list[report.Share]]:
    repeats = {subject.name: count for subject, count in counts}
    rows = [
        report.summarise(subject, case, measure, unit, values, repeats=repeats[subject])
        for (subject, case), samples in timed.items()
        for (measure, unit), values in samples.items()
    ]
    sizes = {subject.name: subject.bytes_per_token for subject, _ in counts}
    return rows, report.shares_of_bandwidth(rows, sizes, best)


def measure_memory(engine: Path, clip: Path, requests: int) -> dict[str, object]:
    """In a fresh process, so that torch and the peers are not counted."""
    say(f"memory: {requests} requests in a process of their own")
    command = [sys.executable, cases.__file__, str(engine), str(clip), str(requests)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, dict[str, int]] = json.loads(done.stdout)
    totals = {f"PSS bytes after request {count}": sum(parts.values()) for count, parts in found.items()}
    return {"engine": engine.name, **totals, "by process": found}


def main() -> int:
    options = parse_arguments()
    try:
        with tempfile.TemporaryDirectory() as folder:
            clip = make_demo_clip(Path(folder))
            if options.url:
                result = served.compare(options.url, options.engine[0], clip, n=options.n, tokens=options.tokens)
                return finish(result, report.write_tables(result, options.out, name=served.NAME))
            result = run(options, clip)
            report.write(result, options.out)  # kept if the memory run fails
            if options.memory_requests:
                memory = measure_memory(options.engine[0], clip, options.memory_requests)
                result = dataclasses.replace(result, memory=memory)
    except MosearError as error:
        say(f"error: {error}")
        return 1
    return finish(result, report.write(result, options.out))


def finish(result: report.Result, paths: Sequence[Path]) -> int:
    print(report.text(result))
    for path in paths:
        say(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

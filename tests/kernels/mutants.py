"""Seeded mistakes: each is one change of a kernel's source, and some check must see it.

`python tests/kernels/mutants.py` runs them all and writes benchmarks/results/kernel_mutants.json, the committed table.
"""

import contextlib
import importlib
import importlib.abc
import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from executor import HERE, Verdict, sanitise

ROOT = HERE.parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "kernel_mutants.json"
KERNELS = "mosear.kernels."
RELOADED = ("mutant_checks", "decode_inputs", "prefill_inputs")  # modules of this folder that hold launchers
NUMBERS, MEMORY = "numbers", "memory"  # the interpreter beside float64; ttsem


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """`old`, which stands `times` times in the module's source, becomes `new`; `check` of mutant_checks.py sees it.

    `how`: NUMBERS, a comparison fails; or MEMORY, the sanitizer reports a fault. `often`: in the default run too.
    """

    name: str
    module: str  # below mosear.kernels
    old: str
    new: str
    check: str
    how: str = NUMBERS
    times: int = 1
    often: bool = False


MOSE, DECODE, POLICY = "modality_experts.kernel", "reallocated_attention.decode", "reallocated_attention.policy_kernel"
PREFILL = "reallocated_attention.kernel"
MUTANTS = (
    Mutant(
        name="experts: B of the wrong stride", module=MOSE, check="experts",
        old="b_at = (m * EXPERTS * RANK + c)", new="b_at = (m * RANK + c)",
    ),
    Mutant(
        name="experts: gates of swapped groups", module=MOSE, check="experts",
        old="gate_owner = gate_column // EXPERTS % GROUPS", new="gate_owner = GROUPS - 1 - gate_column // EXPERTS % GROUPS",
    ),
    Mutant(
        name="experts: A of any group", module=MOSE, check="experts_own_a",
        old="own = own & (group[:, None] == a_owner)", new="own = own & (a_owner == 0)",
    ),
    Mutant(
        name="experts: modality weight missing", module=MOSE, check="experts",
        old="(SCALE * weight)[:, None]", new="(SCALE + 0.0 * weight)[:, None]",
    ),
    Mutant(
        name="experts: softmax without its maximum", module=MOSE, check="experts_large_logits",
        old="tl.exp(logits - top)", new="tl.exp(logits)",
    ),
    Mutant(
        name="experts: ties to the last", module=MOSE, check="experts_ties", often=True,
        old="tl.min(tl.where(logits == top, expert, EXPERTS), 1)", new="tl.max(tl.where(logits == top, expert, -1), 1)",
    ),
    Mutant(
        name="experts: partial sums left out", module=MOSE, check="experts_in_parts",
        old="tl.range(0, SPLITS, loop_unroll_factor=8)", new="tl.range(0, SPLITS - 1, loop_unroll_factor=8)",
    ),
    Mutant(
        name="experts: rows of another group mixed in", module=MOSE, check="experts",
        old="mine = active & (group == m)", new="mine = active & (group >= m)",
    ),
    Mutant(
        name="experts: the last group of a tile left out", module=MOSE, check="experts",
        old="tl.range(low, high + 1)", new="tl.range(low, high)",
    ),
    Mutant(
        name="experts: mask of x's rows dropped", module=MOSE, check="experts_memory", how=MEMORY,
        old="mask=live[:, None] & inside, other=0.0)\n        a = ",
        new="mask=(row >= 0)[:, None] & inside, other=0.0)\n        a = ",
    ),
    Mutant(
        name="experts: parts of d write one sum", module=MOSE, check="experts_memory", how=MEMORY,
        old="out = ((split * n_rows.to(tl.int64) + row) * TARGETS * pitch)", new="out = (row * TARGETS * pitch)",
    ),
    Mutant(
        name="experts: unmasked store of y", module=MOSE, check="experts_memory", how=MEMORY,
        old="tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=mask)",
        new="tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=inside[None, :] & (row >= 0)[:, None])",
    ),
    Mutant(
        name="experts: an id of no group indexes weights", module=MOSE, check="experts_stray_ids", how=MEMORY,
        old="mask=(group >= 0) & (group < GROUPS), other=0.0", new="mask=live, other=0.0",
    ),
    Mutant(
        name="decode: sum not rescaled", module=DECODE, check="decode",
        old="total = total * rescale + tl.sum(weight, 1)", new="total = total + tl.sum(weight, 1)",
    ),
    Mutant(
        name="decode: values not rescaled", module=DECODE, check="decode", old="acc * rescale[:, None]", new="acc",
    ),
    Mutant(
        name="decode: wrong head map", module=DECODE, check="decode",
        old="head = batch * heads + kv_head * shared + row_head", new="head = batch * heads + row_head * kv_heads + kv_head",
    ),
    Mutant(
        name="decode: causal off by one", module=DECODE, check="decode", often=True, old="position + 1)", new="position)",
    ),
    Mutant(
        name="decode: first_row compared strictly", module=DECODE, check="decode",
        old="tl.load(query_position_ptr + batch) >= tl.load(first_row_ptr + batch)",
        new="tl.load(query_position_ptr + batch) > tl.load(first_row_ptr + batch)",
    ),
    Mutant(
        name="decode: splits merged without their maxima", module=DECODE, check="decode_splits",
        old="tl.exp2(top - base) + tl.sum(scaled, 1)", new="1.0 + tl.sum(scaled, 1)",
    ),
    Mutant(
        name="decode: bias left out of the masses", module=DECODE, check="decode",
        old="level = tl.where(visible, top + bias, -float(\"inf\"))", new="level = tl.where(visible, top, -float(\"inf\"))",
    ),
    Mutant(
        name="decode: averages merged as sums", module=DECODE, check="decode",
        old="weight = row_share * sums * tl.exp2(", new="weight = row_share * tl.exp2(",
    ),
    Mutant(
        name="decode: keys of no group left out", module=DECODE, check="decode_stray_ids",
        old="(ids > 0) & (ids < GROUPS), ids, 0)", new="(ids >= 0) & (ids < GROUPS), ids, -1)",
    ),
    Mutant(
        name="decode: page of the wrong stride", module=DECODE, check="decode_paged", times=1,
        old="at = (page.to(tl.int64) * kv_heads + kv_head) * PAGE", new="at = (page.to(tl.int64) + kv_head) * PAGE",
    ),
    Mutant(
        name="decode: mask of the keys dropped", module=DECODE, check="decode_memory", how=MEMORY,
        old="inside = start + slot < high", new="inside = start + slot >= 0",
    ),
    Mutant(
        name="prefill: causal off by one", module=PREFILL, check="prefill", often=True, times=2,
        old="inside = tl.arange(0, BLOCK_N)[None, :] <= (reach", new="inside = tl.arange(0, BLOCK_N)[None, :] < (reach",
    ),
    Mutant(
        name="prefill: values not rescaled", module=PREFILL, check="prefill_unmoved", old="acc * fade[:, None]", new="acc",
    ),
    Mutant(
        name="prefill: sums not rescaled", module=PREFILL, check="prefill",
        old="sums[g] * fade + tl.sum(p * members[g][None, :], 1)", new="sums[g] + tl.sum(p * members[g][None, :], 1)",
    ),
    Mutant(
        name="prefill: wrong head map", module=PREFILL, check="prefill",
        old="batch * kv_heads + head // (heads // kv_heads)", new="batch * kv_heads + head % kv_heads",
    ),
    Mutant(
        name="prefill: first_row compared strictly", module=PREFILL, check="prefill",
        old="(position >= first_row)", new="(position > first_row)",
    ),
    Mutant(
        name="prefill: mass moved the wrong way", module=PREFILL, check="prefill",
        old="masses[g] + flow if g == VIDEO else (masses[g] - flow", new="masses[g] - flow if g == VIDEO else (masses[g] + flow",
    ),
    Mutant(
        name="prefill: tiles of the first request for all", module=PREFILL, check="prefill_runs",
        old="tile_group_ptr += batch * tl.cdiv(capacity, BLOCK_N)", new="tile_group_ptr += 0 * tl.cdiv(capacity, BLOCK_N)",
    ),
    Mutant(
        name="prefill: mask of the keys dropped", module=PREFILL, check="prefill_memory", how=MEMORY,
        old="tl.load(at, mask=(slots < length)[None, :], other=0.0) if MASKED", new="tl.load(at) if MASKED",
    ),
    Mutant(
        name="prefill: unmasked store of the masses", module=PREFILL, check="prefill_memory", how=MEMORY,
        old="tl.store(ptr + row * GROUPS + g, masses[g], mask=inside)", new="tl.store(ptr + row * GROUPS + g, masses[g])",
    ),
    Mutant(
        name="policy: strength missing", module=POLICY, check="decode", often=True, old="strength * flow, 0.0)", new="flow, 0.0)",
    ),
    Mutant(
        name="policy: video and audio swapped", module=POLICY, check="decode",
        old="flow = audio * tl.load(row_ptr + MOVE_AUDIO)", new="flow = video * tl.load(row_ptr + MOVE_AUDIO)",
    ),
)  # fmt: skip


class _Finder(importlib.abc.MetaPathFinder):
    """Serves one module from another file."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return importlib.util.spec_from_file_location(name, self.path) if name == self.name else None


def source_of(mutant: Mutant) -> str:
    """The mutant's source; fails where the text to replace is not there as often as stated."""
    path = ROOT.joinpath("engine", *f"{KERNELS}{mutant.module}".split(".")).with_suffix(".py")
    text = path.read_text()
    found = text.count(mutant.old)
    assert found == mutant.times, f"{mutant.name}: {path.name} holds {mutant.old!r} {found} times, not {mutant.times}"
    return text.replace(mutant.old, mutant.new)


@contextlib.contextmanager
def seeded(mutant: Mutant | None) -> Iterator[None]:
    """While it lasts, kernels that are imported anew come with the mutant's mistake (None: as they are)."""
    kept = {
        n: m for n, m in sys.modules.items() if n in RELOADED or (n.startswith(KERNELS) and not hasattr(m, "__path__"))
    }
    with tempfile.TemporaryDirectory() as folder:
        if mutant is not None:
            path = Path(folder) / f"{mutant.module.rpartition('.')[2]}.py"
            path.write_text(source_of(mutant))
            sys.meta_path.insert(0, _Finder(KERNELS + mutant.module, path))
        _forget()
        try:
            yield
        finally:
            if mutant is not None:
                sys.meta_path.pop(0)
            _forget()
            sys.modules.update(kept)
            for name, module in kept.items():
                package, _, leaf = name.rpartition(".")
                if package:
                    setattr(sys.modules[package], leaf, module)


def _forget() -> None:
    for name in [n for n, m in sys.modules.items() if n.startswith(KERNELS) and not hasattr(m, "__path__")]:
        del sys.modules[name]
    for name in RELOADED:
        sys.modules.pop(name, None)


def run(mutant: Mutant | None, check: str) -> str:
    """What a check says of a mutant in this process; empty where it finds nothing wrong."""
    with seeded(mutant):
        try:
            getattr(importlib.import_module("mutant_checks"), check)()
        except AssertionError as error:
            return str(error).splitlines()[0] if str(error) else "assertion"
    return ""


def run_check(check: str) -> None:
    """A check on the kernels as they are: for a process under ttsem."""
    getattr(importlib.import_module("mutant_checks"), check)()


def run_mutant(name: str) -> None:
    """A mutant's check on the mutant: for a process under ttsem."""
    mutant = next(mutant for mutant in MUTANTS if mutant.name == name)
    with seeded(mutant):
        run_check(mutant.check)


def memory_faults(mutants: Sequence[Mutant], cache: Path) -> dict[str, Verdict]:
    """ttsem's verdict of each mutant, by name."""
    if not mutants:
        return {}
    programs = {mutant.name: f"mutants:run_mutant:{mutant.name}" for mutant in mutants}
    found = sanitise(list(programs.values()), cache=cache)
    return {name: found[program] for name, program in programs.items()}


def main() -> int:
    """Run all and write the table; 1 where one lives."""
    import executor

    executor.interpret()
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        faults = memory_faults([m for m in MUTANTS if m.how == MEMORY], Path(cache))
    for mutant in MUTANTS:
        if mutant.how == MEMORY:
            verdict = faults[mutant.name]
            said = "" if verdict.clean or verdict.kind in ("ok", "failed") else f"{verdict.kind}: {verdict.line}"
        else:
            said = run(mutant, mutant.check)
        rows.append(
            {
                "mutant": mutant.name,
                "module": mutant.module,
                "old": mutant.old,
                "new": mutant.new,
                "check": mutant.check,
            }
            | {"caught_by": mutant.how if said else "", "said": said}
        )
        print(f"{'caught ' if said else 'LIVES  '} {mutant.name}: {said}")
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if all(row["caught_by"] for row in rows) else 1


if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parent), str(ROOT / "engine"), str(ROOT / "export")]
    sys.exit(main())

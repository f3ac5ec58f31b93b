"""Cycles of a kernel's code on each pipe of a multiprocessor, loop by loop, from the disassembly.

An instruction of a warp holds a pipe for 32 / rate cycles (chips.py has the rates), and one of four schedulers for one.
Waiting (latency, barriers, bank conflicts, cache misses) is left out: the sum is a lower bound, for ranking and rejecting.
"""

import ast
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mosear.kernels.chips import SCHEDULERS, WARP, Chip, chip_of
from mosear.kernels.launch import Case
from mosear.kernels.sass import Code, Instruction, innermost

PIPES = ("tensor", "fp32", "int", "special", "shared", "issue")
FP32 = re.compile(r"F(FMA|MUL|ADD)(2?)(32I)?")
# IMAD goes through the multiply-add pipe at half its rate where that has 128 lanes.
MULTIPLY = re.compile(r"IMAD|IDP")
ALU = re.compile(
    r"IADD\w*|LOP3|LEA|SHF|SEL|PRMT|ISETP|IMNMX|VIADD\w*|VIMNMX\w*|FMNMX\w*|FSEL|FSETP|FSET|PLOP3|P2R|R2P|IABS|POPC|BMSK|"
    r"SGXT|FLO|F2FP|F2F|F2I|I2F\w*|I2FP|HADD2|HMUL2|HFMA2|HMNMX2|HSETP2|MOV|CSEL"
)
SHARED = re.compile(r"LDS|STS|LDSM|STSM|SHFL|LDGSTS|ATOMS")
FLAG_INSTRUCTIONS = 8  # fewer lines of a constant's side in a copy of a loop are strays that the optimiser shared
WIDTH = {"64": 2, "128": 4}
MATRICES = {"2": 2, "4": 4}  # of 8 x 8 halves that LDSM and STSM move: one a cycle


@dataclass(slots=True)
class Work:
    """Cycles that one warp's pass through a piece of code takes of each pipe."""

    cycles: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PIPES, 0.0))
    instructions: int = 0
    products: float = 0.0  # multiply-adds on tensor cores; sm_100's are not in the code's text

    def add(self, instruction: Instruction, chip: Chip) -> None:
        self.instructions += 1
        self.cycles["issue"] += 1 / SCHEDULERS
        base = instruction.base
        products = tensor_products(instruction)
        self.products += products
        self.cycles["tensor"] += products / chip.tensor_rate
        if match := FP32.fullmatch(base):
            self.cycles["fp32"] += WARP / chip.fp32_rate * (2 if match[2] else 1)
        elif MULTIPLY.fullmatch(base):
            self.cycles["fp32"] += WARP / min(chip.fp32_rate, 64)
        elif base == "MUFU":
            self.cycles["special"] += WARP / chip.special_rate
        elif ALU.fullmatch(base):
            self.cycles["int"] += WARP / chip.int_rate
        elif SHARED.fullmatch(base):
            parts = instruction.opcode.split(".")
            table = MATRICES if base in ("LDSM", "STSM") else WIDTH
            self.cycles["shared"] += max([table.get(part, 1) for part in parts]) * WARP / chip.shared_rate


def tensor_products(instruction: Instruction) -> float:
    """Multiply-adds of a warp's share of a tensor-core instruction (HGMMA is a warp group's: a quarter)."""
    if match := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", instruction.opcode):
        return int(match[1]) * int(match[2]) * int(match[3]) / 4
    if match := re.match(r"HMMA\.(16816|1688)\b", instruction.opcode):
        return float(16 * 8 * (16 if match[1] == "16816" else 8))
    return 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One side of an `if`: source lines first..last."""

    name: str
    first: int
    last: int


@dataclass(frozen=True, slots=True, kw_only=True)
class For:
    """A `for` of the source. `header`: its function and its text, such as `_sweep: tile in tl.range(first, last)`.

    `flags`: what stands under `if CONSTANT`, which a copy of the loop holds or not; `arms`: of ifs decided at run time.
    """

    header: str
    first: int
    last: int
    flags: tuple[Arm, ...]
    arms: tuple[Arm, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What a kernel's file says of lines: its loops, and first and last line of each function that a loop calls: what it
    computes may stand in the loop or beside it."""

    loops: tuple[For, ...]
    called: tuple[tuple[int, int], ...]


def read_source(text: str) -> Source:
    """Loops of a source file, and the ifs in them. A name in capitals is a constant; `tl.static_range` is no loop."""
    loops, called = [], set()
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    for function in functions:
        for node in ast.walk(function):
            if isinstance(node, ast.For) and "static_range" not in ast.unparse(node.iter):
                called |= {
                    n.func.id for n in ast.walk(node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
                }
                ifs = [child for child in node.body if isinstance(child, ast.If)]
                loops.append(
                    For(
                        header=f"{function.name}: {ast.unparse(node.target)} in {ast.unparse(node.iter)}",
                        first=node.lineno,
                        last=_end(node.body),
                        flags=tuple(
                            _arms(child)[0] for child in ifs if isinstance(child.test, ast.Name) and _constant(child)
                        ),
                        arms=tuple(arm for child in ifs if not _constant(child) for arm in _arms(child)),
                    )
                )
    return Source(
        loops=tuple(sorted(loops, key=lambda loop: loop.first)),
        called=tuple((f.lineno, _end(f.body)) for f in functions if f.name in called),
    )


def _constant(node: ast.If) -> bool:
    return all(name.id.isupper() for name in ast.walk(node.test) if isinstance(name, ast.Name))


def _arms(node: ast.If) -> list[Arm]:
    test = ast.unparse(node.test)
    arms = [Arm(name=test, first=node.body[0].lineno, last=_end(node.body))]
    if node.orelse:
        arms.append(Arm(name=f"not {test}", first=node.orelse[0].lineno, last=_end(node.orelse)))
    return arms


def _end(body: Sequence[ast.stmt]) -> int:
    return body[-1].end_lineno or body[-1].lineno


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopWork:
    """A loop of the machine code. `header[FLAGS]#n`: the n-th copy with these flags; what is in an arm is not in `common`."""

    header: str
    key: str
    common: Work
    arms: Mapping[str, Work]


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """Code outside loops. `loops`: keys of those that lie on some way through it; `header` and `arm`: of which loop's source
    it is a part (a prologue, a peeled turn), and of which side of an `if` in it."""

    loops: tuple[str, ...]
    header: str
    arm: str
    work: Work


def analyse(code: Code, source: Source, chip: Chip) -> tuple[list[Passage], list[LoopWork]]:
    """Code outside loops, and each innermost loop in order of address."""
    owner = innermost(code.loops, len(code.instructions))
    copies, found = Counter[str](), []
    for index in range(len(code.loops)):
        inside = [at for at in range(len(code.instructions)) if owner[at] == index]
        lines = [code.instructions[at].line for at in inside]
        voters = Counter(loop for line in lines for loop in source.loops if loop.first <= line <= loop.last)
        nothing = For(header="?", first=0, last=0, flags=(), arms=())
        loop = voters.most_common(1)[0][0] if voters else nothing
        flags = [f.name for f in loop.flags if sum(f.first <= line <= f.last for line in lines) >= FLAG_INSTRUCTIONS]
        key = f"{loop.header}[{' '.join(flags)}]"
        work = LoopWork(
            header=loop.header, key=f"{key}#{copies[key]}", common=Work(), arms={a.name: Work() for a in loop.arms}
        )
        copies[key] += 1
        for block in _blocks(code, inside):
            arm = _arm_of([code.instructions[at].line for at in block], loop)
            for at in block:
                (work.arms[arm] if arm else work.common).add(code.instructions[at], chip)
        found.append(work)
    passages: dict[tuple[tuple[str, ...], str, str], Work] = {}
    outside = [at for at in range(len(code.instructions)) if owner[at] < 0 and at in code.reached]
    for block in _blocks(code, outside):
        keys = tuple(found[index].key for index in sorted(code.beside[block[0]]))
        lines = [code.instructions[at].line for at in block]
        home = _home_of(lines, source)
        arm = _arm_of(lines, home) if home else None
        passage = passages.setdefault((keys, home.header if home else "", arm or ""), Work())
        for at in block:
            passage.add(code.instructions[at], chip)
    return [Passage(loops=k, header=h, arm=a, work=w) for (k, h, a), w in passages.items()], found


def _home_of(lines: Sequence[int], source: Source) -> For | None:
    """The loop of the source that most of a block's lines stand in, functions that a loop calls left out."""
    votes = Counter(
        next((loop for loop in source.loops if loop.first <= line <= loop.last), None)
        for line in lines
        if line and not any(first <= line <= last for first, last in source.called)
    )
    return votes.most_common(1)[0][0] if votes else None


def _blocks(code: Code, inside: Sequence[int]) -> list[list[int]]:
    """Basic blocks among instructions: a label begins one, a branch ends one."""
    starts = set(code.labels.values())
    blocks: list[list[int]] = []
    fresh, last = True, -1
    for at in inside:
        if fresh or at in starts or at != last + 1:
            blocks.append([])
        blocks[-1].append(at)
        last = at
        fresh = code.instructions[at].base in ("BRA", "BRX", "EXIT")
    return blocks


def _arm_of(lines: Sequence[int], loop: For) -> str | None:
    """The arm that most of a block's lines stand in, of those that stand in the loop at all."""
    votes = Counter(
        next((arm.name for arm in loop.arms if arm.first <= line <= arm.last), None)
        for line in lines
        if loop.first <= line <= loop.last
    )
    return votes.most_common(1)[0][0] if votes else None


def task(group: Sequence[Case], arch: int, data: str, folder: Path | None) -> dict[str, Any]:
    """A worker's task (catalogue.Order): compile a variant and analyse it."""
    from mosear.kernels.compile import compile_case
    from mosear.kernels.resources import measure
    from mosear.kernels.sass import disassemble

    del folder
    case = group[0]
    compiled = compile_case(case, arch=arch, data=data, lines=True)
    path = Path(case.op.function.fn.__code__.co_filename)
    passages, loops = analyse(disassemble(compiled.cubin, path.name), read_source(path.read_text()), chip_of(arch))
    found = measure(compiled)
    return {
        "kernel": case.op.name,
        "arch": arch,
        "name": compiled.name,
        "labels": [case.label for case in group],
        "warps": compiled.warps,
        "ctas": found.ctas,
        "spills": found.spills,
        "passages": [asdict(passage) for passage in passages],
        "loops": [asdict(loop) for loop in loops],
    }

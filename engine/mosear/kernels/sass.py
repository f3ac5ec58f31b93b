"""A binary's machine code, read from nvdisasm's text: instructions, their source lines, and loops."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from mosear.kernels.compile import call, on_disk, tool

LABEL = re.compile(r"^(\.L_x?_?\w+|\$\w+):")
# `@P0 LDG.E R1, [R2] ;`, behind the instruction's address.
INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)\s*(.*?)\s*;?\s*\}?\s*;?\s*$"
)
LINE = re.compile(r'^\s*//## File "([^"]+)", line (\d+)')
PREDICATE = re.compile(r"\bU?P\d\b")
SHORT_WAIT, WAITS = 8, ("SYNCS", "NANOSLEEP")
TARGET = re.compile(r"`\((\.?\$?[\w.]+)\)")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction of a warp. `line`: where in the kernel's source, 0 unknown (no line information)."""

    opcode: str
    operands: str
    predicated: bool
    line: int

    @property
    def base(self) -> str:
        return self.opcode.split(".", 1)[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """A kernel's instructions in order of address, its labels, its loops (sets of instructions) by first address, and
    the instructions that some way from the start leads to."""

    instructions: Sequence[Instruction]
    loops: Sequence[frozenset[int]] = ()
    labels: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    reached: frozenset[int] = frozenset()
    beside: Sequence[frozenset[int]] = ()

    def counts(self) -> Counter[str]:
        """How often each base opcode stands in the code."""
        return Counter(i.base for i in self.instructions)


def disassemble(cubin: bytes, source: str = "") -> Code:
    """Read a binary that holds one kernel; `source` as in `parse`."""
    with on_disk(cubin, ".cubin") as path:
        text, _ = call(tool("nvdisasm"), "-gi", "-c", path)
    return parse(text, source)


def parse(text: str, source: str = "") -> Code:
    """Read nvdisasm's text. A line is where the innermost function's source stands; 0 outside the file `source`."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    jumps: dict[int, str] = {}
    line = 0
    for row in text.splitlines():
        if match := LINE.match(row):
            line = int(match[2]) if match[1].endswith(source) else 0
        elif match := LABEL.match(row):
            labels[match[1]] = len(found)
        elif match := INSTRUCTION.match(row):
            # BRA.DIV is taken by warps whose threads have parted, which none here do: what it leads to never runs.
            if match[2].startswith("BRA") and match[2] != "BRA.DIV" and (target := TARGET.search(match[3])):
                jumps[len(found)] = target[1]
            conditional = match[1] is not None or (
                match[2].startswith("BRA") and PREDICATE.search(match[3]) is not None
            )
            found.append(Instruction(match[2], match[3], conditional or match[2] == "BRA.DIV", line))
    blocks, after = _flow(found, labels, jumps)
    dominators = _dominators(after)
    # What is never reached may still jump into a loop: it is no part of it.
    after = [following if come else [] for following, come in zip(after, dominators, strict=True)]
    loops = _loops(found, blocks, after, dominators)
    reached = frozenset(at for i, come in enumerate(dominators) if come for at in blocks[i])
    return Code(
        instructions=found, loops=loops, labels=labels, reached=reached, beside=_beside(blocks, after, loops)
    )  # fmt: skip


def _flow(
    code: Sequence[Instruction], labels: Mapping[str, int], jumps: Mapping[int, str]
) -> tuple[list[range], list[list[int]]]:
    """Basic blocks, and for each those that may follow it."""
    starts = sorted({0, *labels.values(), *(at + 1 for at in jumps), *_ends(code)} & set(range(len(code))))
    blocks = [range(a, b) for a, b in zip(starts, [*starts[1:], len(code)], strict=True)]
    block_at = {block[0]: i for i, block in enumerate(blocks)}
    after: list[list[int]] = []
    for i, block in enumerate(blocks):
        last = block[-1]
        falls = not (code[last].base in ("BRA", "EXIT") and not code[last].predicated)
        following = [i + 1] if falls and i + 1 < len(blocks) else []
        if last in jumps and labels.get(jumps[last], -1) in block_at:
            following.append(block_at[labels[jumps[last]]])
        after.append(following)
    return blocks, after


def _loops(
    code: Sequence[Instruction], blocks: Sequence[range], after: Sequence[Sequence[int]], dominators: Sequence[set[int]]
) -> list[frozenset[int]]:
    """Natural loops: a jump back to what every way to it passes. Loops with one head, or that overlap without nesting, are
    one.

    Left out: waits of a few instructions for a barrier (their turns are time, not work), and jumps back into the middle
    from code that was moved out of line.
    """
    loops: list[set[int]] = []
    for tail, following in enumerate(after):
        for head in following:
            if head in dominators[tail]:
                body = {at for i in _body(after, head, tail) for at in blocks[i]}
                wait = len(body) <= SHORT_WAIT and any(code[at].base in WAITS for at in body)
                padding = len(body) == 1
                if not wait and not padding:
                    _join(loops, body)
    return sorted((frozenset(body) for body in loops), key=lambda body: (min(body), -len(body)))


def _beside(
    blocks: Sequence[range], after: Sequence[Sequence[int]], loops: Sequence[frozenset[int]]
) -> list[frozenset[int]]:
    """For each instruction the loops that it leads to or that lead to it."""
    before: list[list[int]] = [[] for _ in after]
    for i, following in enumerate(after):
        for j in following:
            before[j].append(i)
    found: list[set[int]] = [set() for _ in blocks]
    for index, loop in enumerate(loops):
        inside = [i for i, block in enumerate(blocks) if block and block[0] in loop]
        for ways in (before, after):
            come, waiting = set(inside), inside[:]
            while waiting:
                new = [i for i in ways[waiting.pop()] if i not in come]
                come.update(new)
                waiting += new
            for i in come:
                found[i].add(index)
    return [frozenset(found[i]) for i, block in enumerate(blocks) for _ in block]


def _ends(code: Sequence[Instruction]) -> set[int]:
    return {at + 1 for at, instruction in enumerate(code) if instruction.base == "EXIT"}


def _join(loops: list[set[int]], body: set[int]) -> None:
    """Add a loop; what begins where it does, or overlaps it without one holding the other, becomes one with it."""
    for other in loops[:]:
        nested = (other < body or body < other) and min(other) != min(body)
        if other & body and not nested:
            loops.remove(other)
            body = body | other
    loops.append(body)


def _dominators(after: Sequence[Sequence[int]]) -> list[set[int]]:
    """For each block those that every way from the first passes, itself among them; for what is not reached: none."""
    reached, waiting = {0}, [0]
    while waiting:
        new = [i for i in after[waiting.pop()] if i not in reached]
        reached.update(new)
        waiting += new
    before: list[list[int]] = [[] for _ in after]
    for i in reached:
        for j in after[i]:
            before[j].append(i)
    found = [set(reached) if i in reached else set() for i in range(len(after))]
    found[0] = {0}
    changed = True
    while changed:
        changed = False
        for i in sorted(reached - {0}):
            new_set = {i} | set.intersection(*(found[j] for j in before[i]))
            changed |= new_set != found[i]
            found[i] = new_set
    return found


def _body(after: Sequence[Sequence[int]], head: int, tail: int) -> set[int]:
    """Blocks from which `tail` is reached without passing `head`, and both."""
    before: dict[int, list[int]] = {}
    for i, following in enumerate(after):
        for j in following:
            before.setdefault(j, []).append(i)
    found, waiting = {head, tail}, [tail]
    while waiting:
        at = waiting.pop()
        if at != head:
            new = [i for i in before.get(at, []) if i not in found]
            found.update(new)
            waiting += new
    return found


def innermost(loops: Sequence[frozenset[int]], size: int) -> list[int]:
    """For each of `size` instructions the index of the smallest loop around it, or -1."""
    owner = [-1] * size
    for index in sorted(range(len(loops)), key=lambda i: -len(loops[i])):  # widest first
        for at in loops[index]:
            owner[at] = index
    return owner

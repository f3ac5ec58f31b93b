"""Run by test_compile.py in a process of its own, where Triton compiles: prints JSON of what the compiler's side says."""

import dataclasses
import json
import sys
from pathlib import Path

import tiny_kernels
from tiny_kernels import SPILLING, WRONG, tiny

from mosear.errors import MosearError
from mosear.kernels import compile as compiler
from mosear.kernels.chips import ARCHS
from mosear.kernels.resources import measure
from mosear.kernels.sass import disassemble


def refused(call: object) -> str:
    """The message of the error that a call raises."""
    try:
        call()  # type: ignore[operator]
    except MosearError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def main() -> None:
    compiler.fix_addresses()
    found: dict[str, object] = {"addresses_are_fixed": compiler.addresses_are_fixed()}
    rows = {}
    for arch in ARCHS:
        made = compiler.compile_case(tiny(), arch=arch, data="bf16")
        rows[arch] = dataclasses.asdict(measure(made)) | {
            "symbol": made.symbol,
            "target": next(line for line in made.ptx.splitlines() if line.startswith(".target")),
            "says_where": "tiny_kernels.py" in made.ptx or b"tiny_kernels.py" in made.cubin,
            "again": compiler.assemble(made.ptx, arch)[0] == made.cubin,
        }
    found["rows"] = rows
    plain = [compiler.compile_case(case, arch=80, data="bf16") for case in (tiny(rows=56), tiny(rows=48))]
    found["aligned"] = ["".join("y" if p.aligned else "n" for p in made.parameters) for made in plain]
    found["aligned_differs"] = plain[0].ptx != plain[1].ptx
    found["spilling"] = dataclasses.asdict(measure(compiler.compile_case(SPILLING, arch=90, data="bf16")))
    code = disassemble(compiler.compile_case(tiny(), arch=80, data="bf16", lines=True).cubin)
    source = Path(tiny_kernels.__file__).read_text().splitlines()
    inside = [code.instructions[i] for i in sorted(code.loops[0])]
    found["loop"] = {
        "loops": len(code.loops),
        "HMMA inside": sum(i.base == "HMMA" for i in inside),
        "HMMA": code.counts()["HMMA"],
        "lines": sorted({source[i.line - 1].strip() for i in inside if i.base == "HMMA"}),
    }
    wrong = compiler.Parameter(name="x", type="i32", size=4, aligned=False)
    made = dataclasses.replace(plain[0], parameters=(wrong, *plain[0].parameters[1:]))
    found["refused"] = {
        "order": refused(lambda: compiler.compile_case(dataclasses.replace(tiny(), op=WRONG), arch=80, data="bf16")),
        "arch": refused(lambda: compiler.compile_case(tiny(), arch=75, data="bf16")),
        "data": refused(lambda: compiler.compile_case(tiny(), arch=80, data="i32")),
        "int32": refused(lambda: compiler.compile_case(tiny(rows=2**31), arch=80, data="bf16")),
        "parameters": refused(lambda: measure(made)),
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()

"""Table and images of the launcher library, from a folder of `mosear export kernels`: generate.py FOLDER OUT.

Every binary's parameter sizes are read from the binary and compared with those that the table states.
"""

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from mosear.errors import KernelError, MosearError
from mosear.kernels.compile import HIDDEN
from mosear.kernels.resources import parameter_sizes
from mosear_export.kernels import read

MAX_PARAMETERS = 64  # bits of Variant::aligned


def generate(folder: Path, out: Path) -> int:
    """Write kernels_table.cc and kernels_images.S into `out`; returns the number of kernels.

    Raises EngineError for an altered folder, KernelError where a binary disagrees with its manifest.
    """
    rows = read(folder)
    for row in rows:
        check(row, folder / row["cubin"])
    out.mkdir(parents=True, exist_ok=True)
    images = {
        row["cubin"]: f"mosear_image_{i}" for i, row in enumerate(sorted(rows, key=lambda row: str(row["cubin"])))
    }
    (out / "kernels_images.S").write_text(assembly(folder.resolve(), images))
    kernels: dict[tuple[str, str, str], list[tuple[dict[str, Any], dict[str, Any]]]] = defaultdict(list)
    for row in rows:
        for case in row["cases"]:
            kernels[row["kernel"], row["data"], case["label"]].append((row, case))
    (out / "kernels_table.cc").write_text(table(kernels, images))
    return len(kernels)


def check(row: dict[str, Any], cubin: Path) -> None:
    """Raise KernelError unless a binary takes the parameters that its row states, the hidden ones last."""
    stated = tuple(parameter["size"] for parameter in row["parameters"])
    found = parameter_sizes(cubin.read_bytes())
    if found != stated:
        raise KernelError(f"{cubin.name} takes parameters of {found} bytes, its manifest states {stated}")
    names = [parameter["name"] for parameter in row["parameters"]]
    if tuple(names[-len(HIDDEN) :]) != HIDDEN or len(names) > MAX_PARAMETERS:
        raise KernelError(
            f"{cubin.name}: parameters {names} do not end with {HIDDEN}, or are more than {MAX_PARAMETERS}"
        )


def assembly(folder: Path, images: dict[str, str]) -> str:
    """The binaries as they are, in read-only memory."""
    lines = ["  .section .rodata"]
    for file, symbol in images.items():
        lines += [f"  .balign 64\n  .hidden {symbol}\n  .globl {symbol}", f'{symbol}:\n  .incbin "{folder / file}"']
    return "\n".join([*lines, '  .section .note.GNU-stack,"",%progbits']) + "\n"


def table(
    kernels: dict[tuple[str, str, str], list[tuple[dict[str, Any], dict[str, Any]]]], images: dict[str, str]
) -> str:
    """The C++ table."""
    lines = ['#include "kernels_table.h"\n\nnamespace mosear {\nnamespace {\n']
    lines += ['extern "C" {', *(f"extern const unsigned char {symbol}[];" for symbol in images.values()), "}\n"]
    entries = []
    for i, ((name, data, label), members) in enumerate(sorted(kernels.items())):
        own = members[0][0]["parameters"][: -len(HIDDEN)]
        for row, _ in members:
            if [(p["name"], p["type"]) for p in row["parameters"][: -len(HIDDEN)]] != [
                (p["name"], p["type"]) for p in own
            ]:
                raise KernelError(f"{name}, {label!r}: architectures disagree on the parameters")
        parameters = ", ".join(
            f'{{"{p["name"]}", {p["size"]}, {"true" if p["type"].startswith("*") else "false"}}}' for p in own
        )
        lines.append(f"constexpr Parameter kParameters{i}[] = {{{parameters}}};")
        ordered = sorted(members, key=lambda member: int(member[0]["arch"]))
        for row, _ in ordered:
            constants = ", ".join(f'{{"{name}", {float(value)!r}}}' for name, value in row["constants"].items())
            lines.append(f"constexpr Constant kConstants{i}_{row['arch']}[] = {{{constants}}};")
        lines.append(f"constexpr Variant kVariants{i}[] = {{")
        for row, case in ordered:
            aligned = sum(1 << bit for bit, p in enumerate(own) if row["parameters"][bit]["aligned"])
            lines.append(
                f'    {{{row["arch"]}, {images[row["cubin"]]}, "{row["symbol"]}", '
                f"{{{', '.join(map(str, case['grid']))}}}, {32 * row['warps']}, {row['shared_bytes']}, {aligned:#x}, "
                f"kConstants{i}_{row['arch']}, {len(row['constants'])}}},"
            )
        lines.append("};")
        entries.append(
            f'    Kernel("{name}", "{data}", "{label}", kParameters{i}, {len(own)}, kVariants{i}, {len(members)}),'
        )
    lines += ["\n}  // namespace\n", "const Kernel kKernels[] = {", *entries, "};"]
    return "\n".join([*lines, f"const size_t kKernelCount = {len(entries)};\n", "}  // namespace mosear"]) + "\n"


if __name__ == "__main__":
    try:
        print(f"{generate(Path(sys.argv[1]), Path(sys.argv[2]))} kernels")
    except MosearError as error:
        sys.exit(f"generate.py: {error}")

"""Tables of what kernels take and cost: JSON that is the same in every run, and text to read."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mosear.kernels.chips import CHIPS

NOT_MEASURED = "not measured"
TIMES = ("ours_us", "sdpa_us", "flex_attention_us")


def aligned(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns under their heads: text to the left, numbers to the right."""
    table = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    numeric = [all(_is_number(row[i]) for row in table[1:]) for i in range(len(header))]
    lines = ["  ".join(f"{t:>{w}}" if n else f"{t:<{w}}" for t, w, n in zip(row, widths, numeric)) for row in table]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def _is_number(text: str) -> bool:
    return text in ("-", NOT_MEASURED) or text[:1].isdigit()


def resources(rows: Sequence[Mapping[str, Any]]) -> str:
    """Registers, spills, shared memory and occupancy of every binary."""
    header = (
        "kernel",
        "first case",
        "sm",
        "data",
        "warps",
        "regs",
        "spill B",
        "smem B",
        "of B",
        "CTA/SM",
        "limit",
        "tensor",
        "copies",
    )
    lines = []
    for row in rows:
        counts = row["counts"]
        tensor = " ".join(f"{name}:{counts[name]}" for name in ("HMMA", "HGMMA", "UTCMMA") if name in counts)
        copies = " ".join(f"{name}:{counts[name]}" for name in ("LDGSTS", "TMA") if name in counts)
        lines.append(
            (
                row["kernel"], row["cases"][0], str(row["arch"]), row["data"], str(row["warps"]), str(row["registers"]),
                f"{row['spill_store_bytes']}/{row['spill_load_bytes']}", str(row["shared_bytes"]),
                str(row["shared_limit_bytes"]), str(row["ctas"]), "+".join(row["limits"]), tensor or "none", copies or "none",
            )
        )  # fmt: skip
    return aligned(header, lines)


def write_cost(path: Path, rows: Sequence[Mapping[str, Any]], versions: Mapping[str, str]) -> None:
    """Write the rows, one a line, with the chips' peaks and where these come from."""
    chips = {
        chip.name: {
            "tensor_tflops": chip.tensor_flops_s / 1e12, "memory_gb_s": chip.memory_bytes_s / 1e9,
            "multiprocessors": chip.multiprocessors, "source": chip.source,
        }
        for chip in CHIPS
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    body = ",\n".join(json.dumps(row) for row in rows)
    head = f'{{"versions": {json.dumps(dict(versions))},\n"chips": {json.dumps(chips)},\n'
    path.write_text(f'{head}"calls": [\n{body}\n]}}\n')


def cost(rows: Sequence[Mapping[str, Any]]) -> str:
    """One table for each op. Times of a roofline are computed; measured ones say so."""
    parts = []
    for op in dict.fromkeys(row["op"] for row in rows):
        mine = [row for row in rows if row["op"] == op]
        header = (
            "case", "chip", "MB", "of it workspace", "x peer's bytes", "GFLOP", "roofline us (computed)", "bound by",
            "kcycles (computed)", "busiest pipe", "x peer's cycles", "x peer's work", "ours us", "SDPA us", "Flex us",
        )  # fmt: skip
        lines = [
            (
                row["case"], row["chip"], f"{row['bytes'] / 1e6:.3f}", f"{row['workspace_bytes'] / row['bytes']:.1%}",
                f"{row['peer']['byte_ratio']:.3f}", f"{row['operations'] / 1e9:.3f}", f"{row['roofline_us']:.2f}",
                row["bound"], f"{row['cycles'] / 1e3:.1f}", "+".join(dict.fromkeys(row["bottleneck"])),
                f"{row['peer']['cycle_ratio']:.3f}" if "cycle_ratio" in row["peer"] else "-",
                f"{row['peer']['work_ratio']:.3f}" if "work_ratio" in row["peer"] else "-",
                *(_time(row.get("times", {}).get(name)) for name in TIMES),
            )
            for row in mine
        ]  # fmt: skip
        parts.append(f"{op}, beside {mine[0]['peer']['name']}\n{aligned(header, lines)}")
    return "\n\n".join(parts)


def _time(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.2f}"

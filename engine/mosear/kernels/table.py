"""The committed table of resources: a row for each binary of the catalogue, in its order, nothing in it that varies."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

# What a row of the table takes of the binary's resources as it is.
MEASURED = (
    "registers", "spill_store_bytes", "spill_load_bytes", "stack_bytes", "shared_bytes", "shared_limit_bytes",
    "tensor_columns", "ctas", "limits", "instructions", "counts", "parameter_sizes",
)  # fmt: skip


def row_of(described: Mapping[str, Any]) -> dict[str, Any]:
    """A table's row from what `catalogue.describe` says of a binary."""
    return {
        **{name: described[name] for name in ("kernel", "arch", "data", "name", "warps", "stages")},
        "constants": described["constants"],
        "cases": [case["label"] for case in described["cases"]],
        "parameters": [f"{p['name']}: {p['type']}{' /16' if p['aligned'] else ''}" for p in described["parameters"]],
        **{name: described["resources"][name] for name in MEASURED},
    }


def key_of(row: Mapping[str, Any]) -> tuple[str, int]:
    """What names a binary: its variant and its arch."""
    return str(row["name"]), int(row["arch"])


def write(path: Path, rows: Iterable[Mapping[str, Any]], versions: Mapping[str, str]) -> None:
    """Write a table, one line to a row, so that a change shows as one line."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"versions": {json.dumps(dict(versions))},\n"kernels": [\n{lines}\n]}}\n')


def read(path: Path) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Versions and rows of a table."""
    table = json.loads(path.read_text())
    return table["versions"], table["kernels"]


def differences(found: Sequence[Mapping[str, Any]], table: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each figure of `found` that is not the table's: a new spill, a lost CTA, a binary that it lacks."""
    known = {key_of(row): row for row in table}
    lines = []
    for row in found:
        name = f"{row['name']} sm_{row['arch']} ({row['cases'][0]})"
        expected = known.get(key_of(row))
        if expected is None:
            lines.append(f"{name}: not in the table")
            continue
        plain = json.loads(json.dumps(row))  # tuples as lists
        lines += [
            f"{name}: {k} is {v}, the table has {expected.get(k)}" for k, v in plain.items() if v != expected.get(k)
        ]
    return lines

"""Kernels compiled ahead of time: a folder of binaries (cubin) and PTX for each architecture, no GPU needed."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mosear.artifacts import MANIFEST, existing, folder_hashes, publish
from mosear.errors import ConfigError
from mosear.hashes import file_hash

KIND, NAME = "kernels", "kernels"
# Of a row of the catalogue, what is not the same in every run.
UNREPEATABLE = ("seconds",)


def parse_archs(text: str | None) -> tuple[int, ...]:
    """`80,90` as numbers, None as all; raises ConfigError naming one that is unknown, or where none is left."""
    from mosear.kernels.chips import ARCHS

    if text is None:
        return ARCHS
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if not name.isdecimal() or int(name) not in ARCHS:
            raise ConfigError(f"--arch names {name!r}: kernels are compiled for {', '.join(map(str, ARCHS))}")
    if not names:
        raise ConfigError(f"--arch is empty: name some of {', '.join(map(str, ARCHS))}")
    return tuple(sorted({int(name) for name in names}))


def export_kernels(
    archs: Sequence[int],
    root: Path,
    say: Callable[[str], None],
    *,
    labels: Sequence[str] = (),
    data: Sequence[str] = (),
    modules: Sequence[str] = (),
    paths: Sequence[str] = (),
) -> Path:
    """Compile every kernel of the catalogue for `archs` into `<root>/kernels-<key>`; returns that folder.

    `labels` keeps the cases so named, `data` the element types; `modules` (found in `paths`) replaces the catalogue.
    The manifest's note `kernels` has a row for each binary: parameters, launch geometry, resources, file names.
    Raises ConfigError for an unknown arch, KernelError where a kernel cannot be compiled.
    """
    from mosear.kernels.catalogue import DATA, MODULES, Order, make
    from mosear.kernels.chips import chip_of
    from mosear.kernels.compile import versions

    for arch in archs:
        chip_of(arch)
    order: dict[str, Any] = {
        "archs": tuple(archs), "labels": tuple(labels), "data": tuple(data) or DATA, "modules": tuple(modules) or MODULES,
    }  # fmt: skip
    inputs: dict[str, object] = {**order, "sources": _sources(paths), **versions()}
    if folder := existing(root, kind=KIND, name=NAME, inputs=inputs):
        say(f"kernels: {folder} is up to date")
        return folder
    say(f"kernels: compiling for {', '.join(f'sm_{arch}' for arch in archs)}")
    with publish(root, kind=KIND, name=NAME, inputs=json.loads(json.dumps(inputs))) as draft:
        rows = make(Order(**order, folder=str(draft.folder.resolve()), paths=tuple(paths)), say=say)
        draft.notes["kernels"] = [_row(row) for row in rows]
    folder = (root / NAME).resolve()
    say(f"kernels: {folder}: {len(rows)} binaries")
    return folder


def _row(row: dict[str, Any]) -> dict[str, Any]:
    stem = f"{row['name']}-sm_{row['arch']}"
    return {k: v for k, v in row.items() if k not in UNREPEATABLE} | {"cubin": f"{stem}.cubin", "ptx": f"{stem}.ptx"}


def _sources(paths: Sequence[str]) -> dict[str, str]:
    """Hashes of the kernels' source, and of the Python files in `paths`."""
    import mosear.kernels

    here = Path(mosear.kernels.__file__).parent
    found = {name: digest for name, digest in folder_hashes(here).items() if name.endswith(".py")}
    for path in paths:
        found |= {file.name: file_hash(file) for file in sorted(Path(path).glob("*.py"))}
    return found


def read(folder: Path) -> list[dict[str, Any]]:
    """Rows of an exported folder, its files checked against their hashes; raises EngineError where they differ."""
    from mosear.artifacts import Manifest

    remedy = "export it again with `mosear export kernels`"
    manifest = Manifest.load(folder, kind=KIND, remedy=remedy)
    manifest.verify(folder, remedy=remedy)
    return list(json.loads((folder / MANIFEST).read_text())["notes"]["kernels"])

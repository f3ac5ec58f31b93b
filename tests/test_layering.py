"""The arrows between the packages, read from the source, and what answering really imports."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENGINE, EXPORT = ROOT / "engine" / "mosear", ROOT / "export" / "mosear_export"
# Each may import itself and what stands before it.
RANKS = (
    ("errors", "hashes", "config", "contract", "recipe"),
    ("artifacts",),
    ("backends",),
    ("runtime",),
    ("engine",),
    ("serving",),
    ("ask", "doctor"),
    ("commands",),
    ("cli",),
)
BASE = {"errors": (), "hashes": (), "config": ("errors",), "contract": ("config",), "recipe": ("config", "errors")}
HEAVY = ("torch", "onnx", "onnxscript", "transformers", "triton", "mosear_export", "mosear.kernels")


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Absolute names that a file imports, and whether at the top (not inside a function)."""

    def walk(node: ast.AST, top: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno}: relative import"
                assert child.module
                # `from package import module` imports the module too.
                yield child.module, top
                yield from ((f"{child.module}.{alias.name}", top) for alias in child.names)
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, top and not inside)

    yield from walk(ast.parse(path.read_text()), True)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def layer_of(path: Path) -> str:
    return path.relative_to(ENGINE).with_suffix("").parts[0]


def sources(root: Path) -> list[Path]:
    found = sorted(root.rglob("*.py"))
    assert found
    return found


ENGINE_FILES = [path for path in sources(ENGINE) if layer_of(path) not in ("__init__", "kernels")]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_module_has_a_rank() -> None:
    assert {layer_of(path) for path in ENGINE_FILES} <= {name for rank in RANKS for name in rank}


@pytest.mark.parametrize("path", ENGINE_FILES, ids=name_of)
def test_arrows_point_down(path: Path) -> None:
    own = layer_of(path)
    rank = next(i for i, names in enumerate(RANKS) if own in names)
    allowed = {own, *(name for names in RANKS[:rank] for name in names), *BASE.get(own, ())}
    for name, _ in imports(path):
        if within(name, "mosear") and name != "mosear":
            assert name.split(".")[1] in allowed, f"{name_of(path)} imports {name}"


@pytest.mark.parametrize("path", ENGINE_FILES, ids=name_of)
def test_answering_knows_nothing_of_building(path: Path) -> None:
    """mosear_export only inside functions of the commands; torch and onnx and the kernels nowhere."""
    commands = layer_of(path) == "commands"
    for name, top in imports(path):
        if within(name, "mosear_export"):
            assert commands and not top, f"{name_of(path)} imports {name}"
        else:
            assert not any(within(name, heavy) for heavy in HEAVY), f"{name_of(path)} imports {name}"


def test_kernels_know_the_configuration_alone() -> None:
    for path in sources(ENGINE / "kernels"):
        for name, _ in imports(path):
            if within(name, "mosear") or within(name, "mosear_export"):
                known = any(within(name, f"mosear.{own}") for own in ("kernels", "config", "contract", "errors"))
                assert known, f"{name_of(path)} imports {name}"


def test_only_the_export_and_tests_use_the_kernels() -> None:
    users = [p for folder in ("engine", "export", "scripts", "benchmarks") for p in (ROOT / folder).rglob("*.py")]
    users = [p for p in users if EXPORT not in p.parents and ENGINE / "kernels" not in p.parents]
    # What measures the kernels, and what embeds their binaries in a library, work on them by name.
    about = (ROOT / "benchmarks", "kernels"), (ENGINE.parent / "native", "generate")
    users = [p for p in users if not any(p.parent == folder and p.stem.startswith(stem) for folder, stem in about)]
    for path in users:
        for name, _ in imports(path):
            assert not within(name, "mosear.kernels"), f"{name_of(path)} imports {name}"


def test_an_import_that_breaks_the_rule_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text("if True:\n    import torch.nn\ndef f():\n    from mosear import kernels\n")
    assert list(imports(path)) == [("torch.nn", True), ("mosear", False), ("mosear.kernels", False)]


def test_loading_the_engine_brings_no_building_tool() -> None:
    """In a process of its own: every module of the runtime and the backends, and the engine above them."""
    modules = ["mosear.engine", "mosear.ask", "mosear.doctor", "mosear.cli", "mosear.commands"]
    for package in ("runtime", "backends"):
        modules += [
            f"mosear.{package}.{p.stem}" for p in sorted((ENGINE / package).glob("*.py")) if p.stem != "__init__"
        ]
    optional = [m for m in modules if m.endswith(("tensorrt", "_cuda"))]  # may need packages that are not here
    code = (
        "import importlib, sys\n"
        f"for name in {[m for m in modules if m not in optional]!r}: importlib.import_module(name)\n"
        f"print([n for n in {HEAVY!r} if n in sys.modules])"
    )
    path = f"import sys; sys.path[:0] = {[str(ROOT / 'engine'), str(ROOT / 'export')]!r}\n"
    found = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "[]"
    assert importlib.util.find_spec("torch")  # it was there to be imported

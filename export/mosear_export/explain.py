"""Would an engine be rebuilt, and why: what it was made from beside what there is now."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from mosear.artifacts import ONNX, Manifest, existing
from mosear.backends.tensorrt_builder import MODULES, PLAN, PLANS
from mosear.contract import parts
from mosear.engine import REMEDY, EngineFolder
from mosear.recipe import Recipe
from mosear_export.inputs import GRAPH, GRAPHS, engine_inputs, part_inputs

MISSING = "nothing"


def explain(folder: Path, onnx_folder: Path, recipe_path: Path | None) -> Iterator[str]:
    """Lines: each input that differs (expected: the engine's; found: now), and what that means.

    recipe_path: the recipe file to compare with (none: the engine's own recipe). Raises EngineError for no such folder.
    """
    engine = EngineFolder(folder)
    recipe = Recipe.load(recipe_path) if recipe_path else engine.recipe
    source = Manifest.load(onnx_folder, kind=ONNX, remedy="export it with `python export/export_onnx.py`")
    found = engine_inputs(recipe, source)
    differences = list(differing(engine.manifest.inputs, found))
    for name, was, now in differences:
        yield f"{name}: expected {_shown(was)}, found {_shown(now)}"
    missing = [name for name in engine.manifest.files if not (folder / name).is_file()]
    for name in missing:
        yield f"{name}: expected in the folder, found nothing"
    if not differences and not missing:
        yield f"{folder} is fresh: `mosear build` would do nothing"
        return
    yield from _parts(folder, engine, recipe, source)
    yield f"{folder} would be rebuilt; {REMEDY} --recipe {recipe_path or f'export/recipes/{recipe.name}.toml'}"


def _parts(folder: Path, engine: EngineFolder, recipe: Recipe, source: Manifest) -> Iterator[str]:
    """Which plans or graphs would be built: the others are linked as they are."""
    word, kind, below = ("plan", PLAN, PLANS) if recipe.target in MODULES else ("graph", GRAPH, GRAPHS)
    root = folder.resolve().parent / below
    fresh: list[str] = []
    stale: list[str] = []
    for part in sorted(parts(engine.config)):
        found = existing(root, kind=kind, name=part, inputs=part_inputs(recipe, source, part))
        (fresh if found else stale).append(part)
    yield f"{word}s to build: {', '.join(stale) or 'none'}; {word}s that stay: {', '.join(fresh) or 'none'}"


def differing(was: object, now: object, name: str = "") -> Iterator[tuple[str, object, object]]:
    """Leaves of two nested tables that are not equal, with their dotted names; JSON's lists are tuples' equals."""
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        for key in sorted(was.keys() | now.keys()):
            yield from differing(was.get(key, MISSING), now.get(key, MISSING), f"{name}.{key}" if name else str(key))
    elif (list(was) if isinstance(was, tuple) else was) != (list(now) if isinstance(now, tuple) else now):
        yield name, was, now


def _shown(value: object) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text  # a hash

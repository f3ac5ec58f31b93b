"""The whole chain, checkpoint to engine. Whether all is there already is answered before anything heavy is imported."""

import contextlib
import errno
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from mosear.artifacts import CHECKPOINT, ENGINE, ONNX, Manifest, existing
from mosear.errors import EngineError
from mosear.hashes import HashMemory, HashOf, file_hash
from mosear.recipe import ON_TENSORRT, Recipe
from mosear_export.demo.fetch import DemoFiles, default_cache, fetch
from mosear_export.inputs import DEMO, DEMO_HEADS, checkpoint_inputs, engine_inputs, onnx_inputs

Report = Callable[[str], None]


def hashes(root: Path, *, verify: bool) -> contextlib.AbstractContextManager[HashOf]:
    """How files below `root` are hashed: from memory where they look as they did, or each read (`verify`)."""
    return contextlib.nullcontext(file_hash) if verify else HashMemory(root / "hashes.json")


def export(root: Path, checkpoint: Path | None, report: Report, *, hash_of: HashOf) -> Path:
    """The exported model below `root`, of a checkpoint folder or (none named) of the demo's; made where it is not fresh."""
    with written(root):
        return _export(root, checkpoint, _demo(checkpoint, report, hash_of), report, hash_of)


@contextlib.contextmanager
def written(root: Path) -> Iterator[None]:
    """Raises EngineError where the disk is full, or something there may not be written. What was begun is gone."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        free = shutil.disk_usage(root).free >> 20 if root.exists() else 0
        raise EngineError(
            f"the build cannot be written below {root} ({error.strerror}; {free} MB are free): free some space there, or name "
            "another folder with --out"
        ) from error


def build(
    recipe: Recipe, root: Path, checkpoint: Path | None, report: Report, *, hash_of: HashOf, heads: Path = DEMO_HEADS
) -> Path:
    """The engine of a recipe below `root`; what of the chain is not fresh is made. heads: of the demo's checkpoint."""
    demo = _demo(checkpoint, report, hash_of)
    if found := fresh_engine(recipe, root, checkpoint=checkpoint, demo=demo, hash_of=hash_of, heads=heads):
        report(f"engine: {found} is fresh")
        return found
    from mosear_export import build, build_tensorrt

    with written(root):
        exported = _export(root, checkpoint, demo, report, hash_of, heads)
        build_engine = build_tensorrt.build_engine if recipe.target in ON_TENSORRT else build.build_engine
        made = build_engine(recipe, exported, root / "engines", report, hash_of=hash_of)
    # Asked once more, so that the hashes of what was just written are known when the next build asks.
    fresh_engine(recipe, root, checkpoint=checkpoint, demo=demo, hash_of=hash_of, heads=heads)
    return made


def fresh_engine(
    recipe: Recipe,
    root: Path,
    *,
    checkpoint: Path | None,
    demo: DemoFiles | None,
    hash_of: HashOf,
    heads: Path = DEMO_HEADS,
) -> Path | None:
    """The engine folder that a build below `root` would end with, if it and all before it are fresh and whole.

    checkpoint: its folder; else `demo` names the files of the demo's, `heads` its heads. Nothing is written but the links to
    the newest.
    """
    if checkpoint is None:
        assert demo is not None, "a build has a checkpoint, or makes the demo's"
        inputs = checkpoint_inputs(demo.gguf, heads, hash_of)
        checkpoint = existing(root / "checkpoints", kind=CHECKPOINT, name=DEMO, inputs=inputs, hash_of=hash_of)
    if checkpoint is None:
        return None
    try:
        source = Manifest.load(checkpoint, kind=CHECKPOINT, remedy="")
        source.verify(checkpoint, remedy="", hash_of=hash_of)
    except EngineError:
        return None  # the build says what is wrong
    exported = existing(root / "onnx", kind=ONNX, name="onnx", inputs=onnx_inputs(source.files), hash_of=hash_of)
    if exported is None:
        return None
    inputs = engine_inputs(recipe, Manifest.load(exported, kind=ONNX, remedy=""))
    return existing(root / "engines", kind=ENGINE, name=recipe.name, inputs=inputs, hash_of=hash_of)


def _demo(checkpoint: Path | None, report: Report, hash_of: HashOf) -> DemoFiles | None:
    """The demo's parts, where no checkpoint is named."""
    return None if checkpoint else fetch(default_cache(), report, hash_of=hash_of)


def _export(
    root: Path,
    checkpoint: Path | None,
    demo: DemoFiles | None,
    report: Report,
    hash_of: HashOf,
    heads: Path = DEMO_HEADS,
) -> Path:
    from mosear_export.demo.assemble import assemble
    from mosear_export.export import export_checkpoint

    if checkpoint is None:
        assert demo is not None, "a build has a checkpoint, or makes the demo's"
        checkpoint = assemble(demo, root / "checkpoints", report, heads=heads, hash_of=hash_of)
    return export_checkpoint(checkpoint, root / "onnx", report, hash_of=hash_of)

"""Which layers a recipe hurts: a layer's products quantised at a time, all else in fp32, and what becomes of the logits.

Both graphs have the same tensor names, so a product of the quantised one, with what feeds it, is put in the place of the
fp32 one.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from mosear.backends.session import Runner
from mosear.config import ModelConfig
from mosear.contract import DECODER, Tensors
from mosear.engine import Engine
from mosear.recipe import Recipe
from mosear.runtime.prompt import PromptBuilder
from mosear_export import fuse, quantise
from mosear_export.golden import relative_errors
from mosear_export.precision.clips import Case
from mosear_export.precision.graph import Linear, whole_graph
from mosear_export.precision.run import Asker, GraphBackend, Said, session

STRENGTH = 0.5
Report = Callable[[str], None]


class Transplant:
    """Variants of an fp32 graph with some products of a quantised one."""

    def __init__(self, plain: Path, quantised: Path) -> None:
        """Two graphs with the same tensor names; weights may lie in files beside them."""
        self.plain, self.folder = onnx.load(plain, load_external_data=False), plain.parent
        donor = onnx.load(quantised, load_external_data=False)
        self.opsets = list(donor.opset_import)
        self.donors = {output: node for node in donor.graph.node for output in node.output}
        self.tensors, self.beside = {tensor.name: tensor for tensor in donor.graph.initializer}, quantised.parent
        self.known = {output for node in self.plain.graph.node for output in node.output}
        self.known |= {value.name for value in self.plain.graph.input} | {t.name for t in self.plain.graph.initializer}

    def variant(self, outputs: Sequence[str], path: Path) -> None:
        """Write the graph whose tensors `outputs` are the quantised products; `path` lies beside the fp32 graph."""
        model, wanted = ModelProto.FromString(self.plain.SerializeToString()), set(outputs)
        nodes, brought = list[NodeProto](), dict[str, TensorProto]()
        for node in model.graph.node:
            if wanted.intersection(node.output):
                nodes += self._brought(node.output[0], brought)
            else:
                nodes.append(node)
        fuse.replace_nodes(model, nodes)
        model.graph.initializer.extend(brought.values())
        del model.opset_import[:]
        model.opset_import.extend(self.opsets)
        onnx.save_model(model, path)

    def _brought(self, output: str, tensors: dict[str, TensorProto]) -> Iterator[NodeProto]:
        """The donor's node of this output behind all that feeds it and is not known; its tensors go to `tensors`."""
        node = self.donors[output]
        for name in node.input:
            if name in self.known or name in tensors or not name:
                continue
            if name in self.tensors:
                tensors[name] = self._whole(self.tensors[name])
            else:
                yield from self._brought(name, tensors)
        yield node

    def _whole(self, tensor: TensorProto) -> TensorProto:
        """A tensor that needs no file beside it."""
        if tensor.data_location != TensorProto.EXTERNAL:
            return tensor
        return numpy_helper.from_array(numpy_helper.to_array(tensor, str(self.beside)), tensor.name)


def sensitivity(
    plain: Path, quantised: Path, groups: dict[str, list[Linear]], heads: Tensors, cases: Sequence[Case], others: Runner,
    config: ModelConfig, builder: PromptBuilder, report: Report, *, threads: int, integers: bool,
) -> list[dict[str, object]]:  # fmt: skip
    """For each group of linear layers, quantised alone: median and largest RMS error of logits, largest error of a mass."""

    def said(path: Path) -> list[Said]:
        backend = GraphBackend(session(str(path), threads=threads, integers=integers), heads, config, others)
        asker = Asker(backend, config, builder)
        return [asker.classify(case, STRENGTH) for case in cases]

    transplant, wanted, rows = Transplant(plain, quantised), said(plain), list[dict[str, object]]()
    outputs = {node.name: node.output[0] for node in transplant.plain.graph.node}
    for name, group in groups.items():
        with tempfile.NamedTemporaryFile(dir=plain.parent, suffix=".onnx") as file:
            transplant.variant([outputs[linear.node] for linear in group], Path(file.name))
            found = said(Path(file.name))
        rms = [relative_errors(a.logits, b.logits)[1] for a, b in zip(found, wanted)]
        mass = max(float(np.abs(a.masses - b.masses).max()) for a, b in zip(found, wanted))
        rows.append({"layers": name, "median": float(np.median(rms)), "max": max(rms), "mass": mass})
        report(f"sensitivity: {name}: {rows[-1]['median']:.4f}")
    return rows


def measure(
    quantised: Path, onnx_folder: Path, mode: str, cases: Sequence[Case], engine: Engine, report: Report
) -> dict[str, object]:
    """The table of a decoder of `optimise`, or of a recipe for ONNX Runtime in 8 bits (a TOML file); mode: a key of MODES."""
    with tempfile.TemporaryDirectory() as aside:
        model, linears, heads = whole_graph(onnx_folder)
        plain, narrow, integers = Path(aside, "plain.onnx"), quantised / f"{DECODER}.onnx", False
        name = quantised.resolve().name.rsplit("-", 1)[0]
        if quantised.suffix == ".toml":
            recipe = Recipe.load(quantised)
            name, narrow, integers = recipe.name, Path(aside, "narrow.onnx"), True
            copy = ModelProto.FromString(model.SerializeToString())
            _save(quantise.quantise_linears(copy, [x.weight for x in linears], recipe), narrow)
        _save(model, plain)
        del model
        rows = sensitivity(
            plain, narrow, MODES[mode](linears), heads, cases, engine.backend, engine.config,
            engine.files.prompt_builder(), report, threads=engine.recipe.used_threads, integers=integers,
        )  # fmt: skip
    return {"name": name, "mode": mode, "clips": len(cases), "strength": STRENGTH, "rows": rows}


def _save(model: ModelProto, path: Path) -> None:
    onnx.save_model(model, path, save_as_external_data=True, location=f"{path.stem}.data", size_threshold=1024)


def by_layer(linears: Sequence[Linear]) -> dict[str, list[Linear]]:
    """All products of a layer together."""
    found: dict[str, list[Linear]] = {}
    for linear in linears:
        found.setdefault(linear.kind if linear.layer < 0 else f"layers.{linear.layer}", []).append(linear)
    return found


def by_kind(linears: Sequence[Linear]) -> dict[str, list[Linear]]:
    """All products of a kind together, of every layer."""
    found: dict[str, list[Linear]] = {}
    for linear in linears:
        found.setdefault(linear.kind, []).append(linear)
    return found


def by_product(linears: Sequence[Linear]) -> dict[str, list[Linear]]:
    """Each product alone."""
    return {linear.name: [linear] for linear in linears}


MODES = {"layer": by_layer, "kind": by_kind, "product": by_product}

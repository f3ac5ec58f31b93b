"""Runs under the quantising environment's Python, not under ours: NVIDIA's Model Optimizer on a decoder's graph.

    python modelopt_child.py JOB.json

The job names the graph, a folder of calls (`*.npz`, the graph's inputs), the method and the nodes to quantise, and where
the result goes. Needs nothing of this project, which lives in another environment with another onnx.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Call = dict[str, NDArray[np.generic]]


class Calls:
    """Calibration calls from files, one at a time, as ONNX Runtime's calibrators read them; `heads` are in every call."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.files, self.names = sorted(folder.glob("call-*.npz")), names
        self.heads = dict(np.load(folder / "heads.npz"))
        self.rewind()

    def get_next(self) -> Call | None:
        path = next(self.left, None)
        if path is None:
            return None
        found = {**self.heads, **np.load(path)}
        return {name: found[name] for name in self.names}

    def get_first(self) -> Call | None:
        self.rewind()
        found = self.get_next()
        self.rewind()
        return found

    def rewind(self) -> None:
        self.left: Iterator[Path] = iter(self.files)

    def __iter__(self) -> "Calls":
        return self

    def __next__(self) -> Call:
        found = self.get_next()
        if found is None:
            raise StopIteration
        return found

    def __len__(self) -> int:
        return len(self.files)

    def set_range(self, start_index: int, end_index: int) -> None:
        self.left = iter(self.files[start_index:end_index])


class Remembered:
    """A session that runs each call once. The Optimizer's search for int4 runs the whole decoder anew for each of its weights
    and calls, 121 times as often as it need, to take one activation from it."""

    def __init__(self, session: Any) -> None:  # Any: ONNX Runtime's, which this file cannot import to be checked
        self.session, self.known = session, dict[int, Call]()
        self.names = [value.name for value in session.get_outputs()]

    def __getattr__(self, name: str) -> Any:  # as above
        return getattr(self.session, name)

    def run(self, names: list[str], feeds: Call) -> list[NDArray[np.generic]]:
        call = id(feeds["hidden"])  # the Optimizer holds every call until its search ends
        if call not in self.known:
            self.known[call] = dict(zip(self.names, self.session.run(self.names, feeds)))
        return [self.known[call][name] for name in names]


def main(path: str) -> None:
    import modelopt
    import onnx
    from modelopt.onnx.quantization import int4, quantize
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    job = json.loads(Path(path).read_text())
    graph = onnx.load(job["graph"], load_external_data=False).graph
    names = [value.name for value in graph.input]
    everything = {node.name for node in graph.node}
    kept = sorted(everything - set(job["nodes"]))
    CalibrationDataReader.register(Calls)  # by duck: the base class brings nothing
    settings = {"mode": job["mode"], "method": job["method"]}
    common = {
        "quantize_mode": job["mode"], "calibration_method": job["method"], "calibration_eps": ["cpu"],
        "calibration_data_reader": Calls(Path(job["calls"]), names), "output_path": job["result"],
        "use_external_data_format": True, "log_level": "WARNING",
        # Our rule says which products are quantised. The Optimizer's own would leave out all that it sees with one row
        # (a decoded token), and a pattern of names is a regular expression there.
        "nodes_to_exclude": [f"^{name}$" for name in kept],
    }  # fmt: skip
    if job["mode"] == "int4":
        make = int4.create_inference_session
        int4.create_inference_session = lambda *given, **more: Remembered(make(*given, **more))
        quantize(job["graph"], block_size=job["block"], awqclip_bsz_col=1024, **common)
    else:
        quantize(
            job["graph"], nodes_to_quantize=[f"^{name}$" for name in job["nodes"]], op_types_to_quantize=["MatMul"],
            high_precision_dtype="fp32", enable_gemv_detection_for_trt=False, disable_mha_qdq=True, passes=[], **common,
        )  # fmt: skip
    Path(job["record"]).write_text(json.dumps(settings | {"modelopt": modelopt.__version__, "onnx": onnx.__version__}))


if __name__ == "__main__":
    main(sys.argv[1])

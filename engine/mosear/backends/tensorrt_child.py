"""One build in a process of its own: `python -m mosear.backends.tensorrt_child JOB`. Started by `tensorrt_builder` alone.

TensorRT's builder may end its process (segmentation fault, std::terminate), and a failed build spoils the next one in the
same process. The job is a JSON file; what happens is told on standard output, a JSON object a line: `log` (severity, text),
`progress` (phase, step, steps), at the end `built` or `refused`. Written against what tensorrt 10, 11 and tensorrt_rtx share.
"""

import importlib
import json
import resource
import sys
from pathlib import Path
from typing import Any

Trt = Any  # the module tensorrt or tensorrt_rtx: neither has types
CPU_ONLY_NOISE = ("cudaError 35", "has Int64 binding", "Cuda Runtime (")  # said of every build without a driver


def tell(**said: object) -> None:
    print(json.dumps(said), flush=True)


def build(job: dict[str, Any]) -> int:  # Any: JSON
    """Build a plan; 0 where it was, 1 where the builder refused (and said why in its log)."""
    bound = job["memory_mb"] << 20
    resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))  # what it allocates, not what it maps of files
    trt = importlib.import_module(job["module"])
    logger, monitor = _logger(trt), _monitor(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(0)  # strongly typed from tensorrt 11 on; in 10 by a flag
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job["onnx"]):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        tell(refused="parser", errors=[error.desc() for error in errors])
        return 1
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # names of ONNX nodes in the plan
    config.progress_monitor = monitor
    if job["compute_capabilities"]:
        _target(trt, config, job["compute_capabilities"])
    for ranges in job["profiles"]:
        profile = builder.create_optimization_profile()
        for name, (low, usual, high) in ranges.items():
            profile.set_shape(name, low, usual, high)
        if config.add_optimization_profile(profile) < 0:
            tell(refused="profile", errors=[f"the builder does not take the profile {ranges}"])
            return 1
    return _write(trt, builder, network, config, Path(job["plan"]))


def _write(trt: Trt, builder: Trt, network: Trt, config: Trt, plan: Path) -> int:
    failed: list[str] = []
    try:
        with plan.open("wb") as file:
            built = builder.build_serialized_network_to_stream(network, config, _stream(trt, file, failed))
    except OSError as error:  # what was kept back until the file was closed
        failed.append(str(error))
    if failed:  # the builder calls a plan built whose writing failed
        tell(refused="disk", errors=failed[:1])
        return 1
    if not built:
        tell(refused="builder", errors=[])
        return 1
    tell(built=plan.stat().st_size, version=trt.__version__, memory_mb=_peak_mb(), **_tensors(network))
    return 0


def _target(trt: Trt, config: Trt, capabilities: list[str]) -> None:
    config.num_compute_capabilities = len(capabilities)
    for at, capability in enumerate(capabilities):
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}"), at)


def _tensors(network: Trt) -> dict[str, dict[str, list[object]]]:
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    return {
        title: {tensor.name: [str(tensor.dtype).rsplit(".", 1)[-1], list(tensor.shape)] for tensor in tensors}
        for title, tensors in (("inputs", inputs), ("outputs", outputs))
    }


def _peak_mb() -> float:
    """Largest resident memory of this program (getrusage would count that of the parent, before the child became it)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


def _logger(trt: Trt) -> Trt:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Trt, message: str) -> None:
            if severity <= trt.ILogger.Severity.WARNING and not any(noise in message for noise in CPU_ONLY_NOISE):
                tell(log=[str(severity).rsplit(".", 1)[-1], message])

    return Logger()


def _monitor(trt: Trt) -> Trt:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            tell(progress=[phase_name, step + 1, self.steps.get(phase_name, 0)])
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


def _stream(trt: Trt, file: Any, failed: list[str]) -> Trt:  # Any: a binary file
    class Stream(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            try:
                return int(file.write(data))
            except OSError as error:
                failed.append(str(error))
                return 0

    return Stream()


if __name__ == "__main__":
    sys.exit(build(json.loads(Path(sys.argv[1]).read_text())))

"""One build in a process of its own: `python -m mosear.backends.tensorrt_child JOB`. Started by `tensorrt_builder` alone.

TensorRT's builder may end its process (segmentation fault, std::terminate), and a failed build spoils the next one in the
same process. The job is a JSON file; what happens is told on standard output, a JSON object a line: `log` (severity, text),
`progress` (phase, step, steps), at the end `built` or `refused`. Written against what tensorrt 10, 11 and tensorrt_rtx share.
"""

import ctypes
import importlib
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

Trt = Any  # the module tensorrt or tensorrt_rtx: neither has types
PR_SET_PDEATHSIG = 1
CPU_ONLY_NOISE = ("cudaError 35", "has Int64 binding", "Cuda Runtime (")  # said of every build without a driver


def tell(**said: object) -> None:
    print(json.dumps(said), flush=True)


def build(job: dict[str, Any]) -> int:  # Any: JSON
    """Build a plan; 0 where it was, 1 where the builder refused (and said why in its log)."""
    try:
        trt = importlib.import_module(job["module"])
    except ImportError as error:
        tell(refused="library", errors=[str(error)])
        return 1
    on_gpu = job["module"] == "tensorrt"
    if not on_gpu:
        bound = job["memory_mb"] << 20
        resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))  # what it allocates, not what it maps of files
    if job["plugins"]:  # before the parser sees nodes of their names
        importlib.import_module(job["plugins"].pop("module")).register(**job["plugins"])
    logger, monitor = _logger(trt), _monitor(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job["onnx"]):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        tell(refused="parser", errors=[error.desc() for error in errors])
        return 1
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # names of ONNX nodes in the plan
    config.progress_monitor = monitor
    if on_gpu:
        configure(trt, config, job)
    else:
        _target(trt, config, job["compute_capabilities"])
    for ranges in job["profiles"]:
        profile = builder.create_optimization_profile()
        for name, (low, usual, high) in ranges.items():
            profile.set_shape(name, low, usual, high)
        if config.add_optimization_profile(profile) < 0:
            tell(refused="profile", errors=[f"the builder does not take the profile {ranges}"])
            return 1
    status = _write(trt, builder, network, config, Path(job["plan"]))
    if status:
        return status
    if on_gpu and job["timing_cache"]:
        _keep_timings(config, Path(job["timing_cache"]))
    read_back = _read_back(trt, logger, Path(job["plan"])) if on_gpu else {}
    if read_back is None:
        tell(refused="read back", errors=["the plan that was built cannot be loaded again"])
        return 1
    size = Path(job["plan"]).stat().st_size
    tell(built=size, version=trt.__version__, memory_mb=_peak_mb(), read_back=read_back, **_tensors(network))
    return 0


def network_flags(trt: Trt) -> int:
    """Types as the graph has them: a flag in tensorrt 10, taken and ignored in 11. Plugins ahead of time, where there are any."""
    known = trt.NetworkDefinitionCreationFlag.__members__
    wanted = ("STRONGLY_TYPED", "PREFER_AOT_PYTHON_PLUGINS")
    return sum(1 << int(known[name]) for name in wanted if name in known)


def configure(trt: Trt, config: Trt, job: dict[str, Any]) -> None:  # Any: JSON
    """What tensorrt is told and tensorrt_rtx is not: memory of the GPU, compatibility, timings of earlier builds."""
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job["memory_mb"] << 20)
    level = trt.HardwareCompatibilityLevel.__members__[job["compatibility"].upper()]
    config.hardware_compatibility_level = level
    if not job["timing_cache"]:
        return
    path = Path(job["timing_cache"])
    known = path.read_bytes() if path.exists() else b""
    if not config.set_timing_cache(config.create_timing_cache(known), False):  # of another GPU or version, or damaged
        tell(log=["WARNING", f"{path} is of another GPU or TensorRT: timings are taken anew"])
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _keep_timings(config: Trt, path: Path) -> None:
    """Write the timings for the next build, in one step. Without them it takes longer, and no plan is worse for it."""
    aside = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        aside.write_bytes(bytes(config.get_timing_cache().serialize()))
        aside.replace(path)
    except OSError as error:
        tell(log=["WARNING", f"{path} cannot be written ({error}): the next build takes timings anew"])


def _read_back(trt: Trt, logger: Trt, plan: Path) -> dict[str, object] | None:
    """What the plan says of itself; None where it cannot be loaded."""
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        return None
    told = json.loads(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))
    return {
        "compatibility": str(engine.hardware_compatibility_level).rsplit(".", 1)[-1].lower(),
        "profiles": engine.num_optimization_profiles, "device_memory": engine.device_memory_size_v2,
        "layers": told.get("Layers", []),
    }  # fmt: skip


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
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a build that was killed goes on building nothing
    sys.exit(build(json.loads(Path(sys.argv[1]).read_text())))

"""A real Triton Server with tiny models: started, refused, watched and stopped, with nothing left behind."""

import contextlib
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from test_onnx_backend import write_linear
from tritonclient import grpc
from tritonclient.utils import InferenceServerException

from mosear.errors import ConfigError, ServingError
from mosear.serving import installation
from mosear.serving.installation import Installation
from mosear.serving.observe import reason_in
from mosear.serving.ports import free_ports
from mosear.serving.scratch import SHARED_MEMORY, Scratch
from mosear.serving.server import Server, ServerOptions, models_of

ECHO = """
class TritonPythonModel:
    def execute(self, requests):
        return [pb.InferenceResponse([pb.Tensor("OUT", pb.get_input_tensor_by_name(r, "IN").as_numpy())]) for r in requests]
"""
# A stream of N responses, 50 ms apart, from a thread of its own; says of itself how many requests it has.
TICKS = """
class TritonPythonModel:
    def initialize(self, args):
        family = pb.MetricFamily(name="mosear_running", description="requests", kind=pb.MetricFamily.GAUGE)
        self.family, self.gauge = family, family.Metric(labels={"model": "ticks"})
        self.lock = threading.Lock()  # metrics are not safe from two threads at once

    def execute(self, requests):
        for request in requests:
            threading.Thread(target=self.tick, args=(request,), daemon=True).start()

    def tick(self, request):
        self.count(1)
        sender, n = request.get_response_sender(), int(pb.get_input_tensor_by_name(request, "IN").as_numpy()[0])
        for i in range(n):
            sender.send(pb.InferenceResponse([pb.Tensor("OUT", np.array([i], np.float32))]))
            time.sleep(0.05)
        sender.send(flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        self.count(-1)

    def count(self, change):
        with self.lock:
            self.gauge.increment(change)
"""
BROKEN = """
class TritonPythonModel:
    def initialize(self, args):
        raise RuntimeError('the weights of "broken" are not here')
"""
PREFIX = re.compile(r"mosear-serve-\w{8}-")
HEAD = "import threading, time\nimport numpy as np\nimport triton_python_backend_utils as pb\n"
PYTHON_CONFIG = """
backend: "python"
input {{ name: "IN" data_type: TYPE_FP32 dims: [ -1 ] }}
output {{ name: "OUT" data_type: TYPE_FP32 dims: [ -1 ] }}
instance_group {{ kind: KIND_CPU }}
model_transaction_policy {{ decoupled: {decoupled} }}
"""
ONNX_CONFIG = """
backend: "onnxruntime"
max_batch_size: {batch}
input {{ name: "x" data_type: TYPE_FP32 dims: [ {dims}, 4 ] }}
output {{ name: "y" data_type: TYPE_FP32 dims: [ {dims}, 3 ] }}
instance_group {{ kind: KIND_CPU }}
parameters {{ key: "intra_op_thread_count" value {{ string_value: "1" }} }}
dynamic_batching {{ max_queue_delay_microseconds: 20000 }}
"""


def write_python(repository: Path, name: str, code: str, *, decoupled: bool = False) -> None:
    (repository / name / "1").mkdir(parents=True)
    (repository / name / "1" / "model.py").write_text(HEAD + code)
    (repository / name / "config.pbtxt").write_text(PYTHON_CONFIG.format(decoupled=str(decoupled).lower()))


def write_onnx(repository: Path, name: str, *, batch: int) -> Path:
    path = write_linear(repository / name / "1", external=batch > 0)
    config = ONNX_CONFIG.format(batch=batch, dims="-1" if batch else "-1, -1")
    (repository / name / "config.pbtxt").write_text(
        config if batch else "\n".join(line for line in config.splitlines() if "dynamic_batching" not in line)
    )
    return path


def options(folder: Path, **more: Any) -> ServerOptions:
    return ServerOptions(
        repository=folder / "models", log=folder / "triton.log", ready_s=60, **{**free_ports(), **more}
    )


def traces(folder: Path) -> set[str]:
    """What the servers of a folder left behind: shared memory, temporary folders, processes."""
    logs = "".join(path.read_text() for path in folder.glob("*.log"))
    found = {str(path) for prefix in set(PREFIX.findall(logs)) for path in SHARED_MEMORY.glob(f"{prefix}*")}
    found |= {str(path) for path in folder.glob("mosear-serve-*")}
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):
                command = (process / "cmdline").read_text().replace("\0", " ")
                if "triton" in command.partition(" ")[0] and str(folder) in command:
                    found.add(f"{process} {command}")
    return found


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    assert not traces(tmp_path)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the tests that leave it well."""
    folder = tmp_path_factory.mktemp("served")
    write_python(folder / "models", "echo", ECHO)
    write_onnx(folder / "models", "batched", batch=8)
    write_onnx(folder / "models", "plain", batch=0)
    with Server(options(folder)) as running:
        assert traces(folder)  # so that the check after it means something
        yield running
        start = time.monotonic()
        assert running.close()
        assert time.monotonic() - start < 15
    assert not traces(folder)


@pytest.fixture
def client(server: Server) -> Iterator[grpc.InferenceServerClient]:
    with grpc.InferenceServerClient(f"127.0.0.1:{server.options.grpc_port}") as made:
        yield made


def infer(client: grpc.InferenceServerClient, model: str, name: str, array: np.ndarray[Any, Any], output: str) -> Any:
    given = grpc.InferInput(name, list(array.shape), {"f": "FP32", "d": "FP64"}[array.dtype.char])
    given.set_data_from_numpy(array)
    return client.infer(model, [given], client_timeout=20).as_numpy(output)


def x_of(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def test_every_model_is_ready(server: Server, client: grpc.InferenceServerClient) -> None:
    assert server.models == ["batched", "echo", "plain"]
    assert all(client.is_model_ready(model) for model in server.models)
    assert infer(client, "echo", "IN", x_of(5), "OUT").tolist() == x_of(5).tolist()
    assert server.alive() and not server.lost()


def test_it_listens_on_loopback_only(server: Server) -> None:
    ours = {f"{port:04X}" for port in server.options.ports.values()}
    tables = "".join(Path(f"/proc/net/{table}").read_text() for table in ("tcp", "tcp6"))
    rows = [line.split() for line in tables.splitlines()]
    listening = [row[1] for row in rows if row[3] == "0A" and row[1][-4:] in ours]
    assert {address[-13:] for address in listening} == {f"0100007F:{port}" for port in ours}
    assert len(listening) == len(ours)


def test_metrics_have_latency_quantiles(server: Server, client: grpc.InferenceServerClient) -> None:
    infer(client, "echo", "IN", x_of(5), "OUT")
    url = f"http://127.0.0.1:{server.options.metrics_port}/metrics"
    assert 'nv_inference_request_summary_us{model="echo",version="1",quantile="0.99"}' in (
        urllib.request.urlopen(url, timeout=5).read().decode()
    )


@pytest.mark.parametrize("model", ["batched", "plain"])
def test_onnx_answers_are_onnx_runtimes(server: Server, client: grpc.InferenceServerClient, model: str) -> None:
    session = ort.InferenceSession(str(server.options.repository / model / "1" / "model.onnx"))
    for shape in ((1, 1, 4), (2, 7, 4), (8, 3, 4)):
        expected = session.run(["y"], {"x": x_of(*shape)})[0]
        np.testing.assert_array_equal(infer(client, model, "x", x_of(*shape), "y"), expected)


def test_onnx_requests_are_batched(server: Server, client: grpc.InferenceServerClient) -> None:
    def counts() -> tuple[int, int]:
        stats = client.get_inference_statistics("batched").model_stats[0]
        return stats.inference_count, stats.execution_count

    before = counts()
    session = ort.InferenceSession(str(server.options.repository / "batched" / "1" / "model.onnx"))
    with ThreadPoolExecutor(8) as pool:
        inputs = [x_of(1, 3 + i % 2, 4) for i in range(32)]
        for x, y in zip(inputs, pool.map(lambda x: infer(client, "batched", "x", x, "y"), inputs), strict=True):
            np.testing.assert_allclose(y, session.run(["y"], {"x": x})[0], rtol=1e-6, atol=1e-6)
    inferences, executions = np.subtract(counts(), before)
    assert inferences == 32 and executions < 32


def test_a_bad_request_is_refused_and_the_next_one_answered(client: grpc.InferenceServerClient) -> None:
    for bad in (x_of(1, 2, 4).astype(np.float64), x_of(1, 2, 9), x_of(9, 2, 4), x_of(4)):
        with pytest.raises(InferenceServerException) as refused:
            infer(client, "batched", "x", bad, "y")
        assert "INVALID_ARGUMENT" in refused.value.status()
    assert infer(client, "batched", "x", x_of(1, 2, 4), "y").shape == (1, 2, 3)


@pytest.mark.parametrize("what", ["http", "grpc", "metrics"])
def test_a_taken_port_is_named(server: Server, tmp_path: Path, what: str) -> None:
    write_python(tmp_path / "models", "echo", ECHO)
    port = server.options.ports[what]
    with pytest.raises(ServingError, match=f"{what} port {port} of 127.0.0.1 cannot be had .*--{what}-port"):
        Server(options(tmp_path, **{f"{what}_port": port}))


def test_a_repository_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="is no model repository"):
        Server(options(tmp_path))
    (tmp_path / "models" / "notes").mkdir(parents=True)
    with pytest.raises(ServingError, match="holds no model"):
        Server(options(tmp_path))
    (tmp_path / "models" / "bare" / "1").mkdir(parents=True)
    assert models_of(tmp_path / "models") == ["bare"]


def test_ports_are_checked() -> None:
    with pytest.raises(ConfigError, match="--http-port 0"):
        ServerOptions(repository=Path(), http_port=0)
    with pytest.raises(ConfigError, match="the same"):
        ServerOptions(repository=Path(), http_port=8001)


def test_what_the_machine_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Installation.find()
    found.check_machine()
    with monkeypatch.context() as patch, pytest.raises(ServingError, match="apt-get install bash"):
        patch.setattr(shutil, "which", lambda _: None)
        found.check_machine()
    with monkeypatch.context() as patch, pytest.raises(ServingError, match=r"apt-get install libpython3\.11"):
        patch.setattr(installation, "_libpython", lambda: None)
        found.check_machine()
    with monkeypatch.context() as patch, pytest.raises(ServingError, match=r"numpy 2\.1\.0 .*empty tensors.*numpy<2"):
        patch.setattr(installation.importlib.metadata, "version", lambda _: "2.1.0")
        found.check_machine()
    with monkeypatch.context() as patch, pytest.raises(ServingError, match="shm-size"):
        patch.setattr(installation, "SHARED_MEMORY_MB", 1 << 40)
        found.check_machine()
    with monkeypatch.context() as patch, pytest.raises(ServingError, match="make an environment"):
        patch.setattr(installation, "_executables", lambda: tmp_path)
        found.check_machine()
    with monkeypatch.context() as patch, pytest.raises(ServingError, match="pip install nvidia-pytriton"):
        patch.setattr(installation.importlib.util, "find_spec", lambda _: None)
        Installation.find()
    with pytest.raises(ServingError, match=r"bin/tritonserver is missing"):
        Installation.find(tmp_path)


def test_a_model_that_does_not_load_says_why(tmp_path: Path) -> None:
    write_python(tmp_path / "models", "broken", BROKEN)
    write_python(tmp_path / "models", "echo", ECHO)
    with pytest.raises(ServingError) as failed:
        Server(options(tmp_path))
    message = str(failed.value)
    assert 'RuntimeError: the weights of "broken" are not here' in message and str(tmp_path / "triton.log") in message
    assert "echo" not in message.replace(str(tmp_path), "") and len(message.splitlines()) < 12


def test_a_log_without_errors_is_shown_by_its_end() -> None:
    assert reason_in("libpython3.11.so.1.0: cannot open\n+---+\n| x |\n") == "libpython3.11.so.1.0: cannot open"
    assert reason_in("") == "its log is empty"


def test_a_wait_that_is_too_long_or_broken_off_leaves_nothing(tmp_path: Path) -> None:
    write_python(tmp_path / "models", "slow", BROKEN.replace("raise", "time.sleep(60) #"))
    slow = options(tmp_path)
    with pytest.raises(ServingError, match=r"not ready after 0\.5 s"):
        Server(ServerOptions(**{name: getattr(slow, name) for name in slow.__slots__} | {"ready_s": 0.5}))
    stopping = threading.Event()
    stopping.set()
    with pytest.raises(ServingError, match="stopped before"):
        Server(slow, stopping=stopping)


def test_an_installed_server_is_found_by_its_folder(tmp_path: Path) -> None:
    """Laid out like /opt/tritonserver: the stub is among the backends, and there may be others."""
    bundled = Installation.find()
    own = tmp_path / "opt" / "backends" / "python"
    own.mkdir(parents=True)
    (tmp_path / "opt" / "bin").mkdir()
    (tmp_path / "opt" / "bin" / "tritonserver").symlink_to(bundled.binary)
    (own / bundled.stub.name).symlink_to(bundled.stub)
    for file in (bundled.root / "backends" / "python").iterdir():
        if file.is_file():
            (own / file.name).symlink_to(file)
    for path in (tmp_path / "opt", tmp_path / "opt" / "bin" / "tritonserver"):
        assert Installation.find(path).root == tmp_path / "opt"
    made = Installation.find(tmp_path / "opt").backends(tmp_path)
    assert sorted(path.name for path in made.iterdir()) == ["onnxruntime", "python", "tensorrt"]
    (own.parent / "onnxruntime").mkdir()
    assert Installation.find(tmp_path / "opt").backends(tmp_path / "again") == own.parent


class Stream:
    """Responses of one request to a decoupled model."""

    def __init__(self, port: int, model: str, count: int) -> None:
        self.client, self.answers = grpc.InferenceServerClient(f"127.0.0.1:{port}"), queue.Queue[tuple[Any, Any]]()
        self.client.start_stream(lambda result, error: self.answers.put((result, error)))
        given = grpc.InferInput("IN", [1], "FP32")
        given.set_data_from_numpy(np.array([count], np.float32))
        self.client.async_stream_infer(model, [given], enable_empty_final_response=True)

    def next(self) -> Any:
        result, error = self.answers.get(timeout=10)
        if error is not None:
            raise error
        return result.as_numpy("OUT")

    def close(self) -> None:
        self.client.stop_stream(cancel_requests=True)
        self.client.close()


@pytest.fixture
def streaming(tmp_path: Path) -> Path:
    write_python(tmp_path / "models", "ticks", TICKS, decoupled=True)
    return tmp_path


def test_a_dead_model_is_noticed_and_everything_ends(streaming: Path) -> None:
    with Server(options(streaming)) as server:
        stream = Stream(server.options.grpc_port, "ticks", 100)
        stream.next()
        assert server.running() == 1
        victim = next(pid for pid, model in server._stubs.items() if model == "ticks")
        os.kill(victim, signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(ServingError, match="the process of ticks died"):
            server.run(threading.Event())
        assert server.lost() == ["ticks"]
        assert not server.close()
        assert time.monotonic() - start < 5
        with pytest.raises(InferenceServerException):  # the waiting client hears of it
            while stream.next() is not None:
                pass
        stream.close()


SERVE = """
import sys
from pathlib import Path
from mosear.serving.scratch import SHARED_MEMORY, Scratch
from mosear.serving.server import ServerOptions, serve
ports = dict(zip(("http_port", "grpc_port", "metrics_port"), map(int, sys.argv[2:5])))
folder = Path(sys.argv[1])
bounds = dict(drain_s=float(sys.argv[5]), stop_s=int(sys.argv[6]))
options = ServerOptions(repository=folder / "models", log=folder / "triton.log", **ports, **bounds)
serve(options, lambda line: print(line, flush=True))
"""


@contextlib.contextmanager
def served(folder: Path, *, drain_s: float = 15, stop_s: int = 15) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`serve` in a process of its own, ready; and its gRPC port."""
    ports = free_ports()
    command = [sys.executable, "-c", SERVE, str(folder), *map(str, ports.values()), str(drain_s), str(stop_s)]
    environment = {
        **os.environ,
        "TMPDIR": str(folder),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout
        assert "ready: ticks" in "".join(process.stdout.readline() for _ in range(2))
        yield process, ports["grpc_port"]
    finally:
        process.kill()
        process.wait()


def test_sigterm_lets_running_requests_end(streaming: Path) -> None:
    with served(streaming) as (process, port):
        streams = [Stream(port, "ticks", 20) for _ in range(4)]
        for stream in streams:
            stream.next()
        process.terminate()
        for stream in streams:
            assert [stream.next().item() for _ in range(19)] == list(range(1, 20))
            assert stream.next() is None
            stream.close()
        said, _ = process.communicate(timeout=40)
        assert process.returncode == 0 and said.endswith("stopping\nstopped\n")


def test_sigterm_is_bounded_where_requests_do_not_end(streaming: Path) -> None:
    with served(streaming, drain_s=0, stop_s=2) as (process, port):
        stream = Stream(port, "ticks", 1000)
        stream.next()
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=15)
        assert process.returncode == 0 and "stopped by force" in said
        assert time.monotonic() - start < 9
        stream.close()


def test_a_server_dies_with_its_parent_and_the_next_one_tidies_up(streaming: Path) -> None:
    with served(streaming) as (process, _):
        process.kill()
        process.wait()
    end = time.monotonic() + 10
    while any(trace.startswith("/proc") for trace in traces(streaming)) and time.monotonic() < end:
        time.sleep(0.1)
    (left,) = streaming.glob("mosear-serve-*")
    forgotten = [Path(line) for line in (left / "forgotten").read_text().splitlines()]
    (SHARED_MEMORY / f"{left.name}-region").touch()
    running = Scratch()
    assert not left.exists() and not any(path.exists() for path in forgotten)
    Scratch().close()
    assert running.folder.exists()  # a living one is let be
    running.close()

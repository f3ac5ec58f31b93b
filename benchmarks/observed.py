"""A server as seen from outside: started for a benchmark or found by its address; its counters, settings and memory."""

import re
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import machine
import psutil
from tritonclient.grpc import InferenceServerClient
from workload import say

from mosear.errors import ServingError
from mosear.serving.client import MODEL, UNARY_MODEL
from mosear.serving.observe import stubs_of
from mosear.serving.ports import free_ports
from mosear.serving.server import Server, ServerOptions

LOG = Path("build/benchmark-triton.log")
LOCAL = "127.0.0.1"
COUNTERS = (
    "mosear_tokens_total", "nv_inference_count", "nv_inference_exec_count", "nv_inference_request_success",
    "nv_inference_request_failure",
)  # fmt: skip
_SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
_MODEL = re.compile(r'\bmodel="([^"]*)"')
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy


class Observed:
    """A server: the one at `url`, or (None) one of `repository` on free ports. A context manager that stops what it started."""

    def __init__(
        self, url: str | None, *, repository: Path, metrics_url: str | None = None, pid: int | None = None
    ) -> None:
        """`metrics_url`: page of metrics (None: port 8002 there). `pid`: of the server (None: whoever listens here)."""
        self.times_s: dict[str, float] = {}
        self.stopped_by_itself: bool | None = None
        self._server: Server | None = None
        if url is None:
            options = ServerOptions(repository=repository, log=LOG, **free_ports())
            start = time.perf_counter()
            self._server = Server(options)
            self.times_s["start to ready"] = time.perf_counter() - start
            url, metrics_url = f"{LOCAL}:{options.grpc_port}", f"http://{LOCAL}:{options.metrics_port}/metrics"
            say(f"server: ready at {url} after {self.times_s['start to ready']:.1f} s")
        self.url = url
        host, _, port = url.rpartition(":")
        self.metrics_url = metrics_url or f"http://{host}:8002/metrics"
        self.pid = pid or listener(int(port))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            start = time.perf_counter()
            self.stopped_by_itself = self._server.close()
            self.times_s["stop"] = time.perf_counter() - start
            self._server = None

    def counters(self) -> dict[str, float]:
        """COUNTERS by `name model`; raises ServingError where the page cannot be read."""
        try:
            with _DIRECT.open(self.metrics_url, timeout=5) as page:
                return parse_counters(page.read().decode())
        except OSError as error:
            raise ServingError(f"{self.metrics_url} cannot be read ({error}): name it with --metrics-url") from error

    def settings(self) -> dict[str, dict[str, str]]:
        """The parameters of the models that answer."""
        found = {}
        with InferenceServerClient(self.url) as client:
            for model in (MODEL, UNARY_MODEL, "decoder"):
                config = client.get_model_config(model).config
                found[model] = {name: value.string_value for name, value in sorted(config.parameters.items())}
        return found

    def pss(self) -> dict[str, int]:
        """Proportional set size in bytes by process; nothing where the server's processes cannot be seen."""
        try:
            return pss_by_process(self.pid) if self.pid else {}
        except OSError:
            return {}


def listener(port: int) -> int | None:
    """The process that listens at this machine's port; None where it cannot be seen."""
    try:
        found = [
            c.pid for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr.port == port
        ]
    except psutil.AccessDenied:
        return None
    return found[0] if found else None


def parse_counters(page: str) -> dict[str, float]:
    """Sums over all labels but the model's."""
    found: dict[str, float] = defaultdict(float)
    for name, labels, value in _SAMPLE.findall(page):
        if name in COUNTERS:
            model = _MODEL.search(labels)
            found[f"{name} {model[1]}" if model else name] += float(value)
    return dict(found)


def growth(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """What was counted between, without what did not change."""
    return {name: value - before.get(name, 0.0) for name, value in after.items() if value != before.get(name, 0.0)}


def pss_by_process(server: int) -> dict[str, int]:
    """Of the server and all below it: `server`, `stub MODEL`, and their children by name."""
    models = stubs_of(server)
    found: Counter[str] = Counter({"server": machine.pss_bytes(server)})
    for child in psutil.Process(server).children(recursive=True):
        try:
            owner = f"child of {models.get(child.ppid(), 'server')}"
            found[f"stub {models[child.pid]}" if child.pid in models else owner] += machine.pss_bytes(child.pid)
        except (OSError, psutil.NoSuchProcess):  # it ended meanwhile
            continue
    return dict(found)

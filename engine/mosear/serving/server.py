"""A Triton Server as a child of this process: started, watched, and stopped with nothing left behind."""

import ctypes
import json
import os
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from mosear.errors import ConfigError, ServingError
from mosear.serving.installation import Installation
from mosear.serving.observe import group_runs, reason_in, stubs_of
from mosear.serving.ports import check_port
from mosear.serving.scratch import Scratch

POLL_S = 0.1
WATCH_S = 0.5
SETTLE_S = 0.5  # from a request's end to the last that its model tells the server of it
ALL_ANSWERED = "All models are stopped, unloading models"  # in Triton's log: no request is in the hands of a model
KILL_S = 3.0  # from the end of the server's own time limit to SIGKILL
RUNNING = "mosear_running"  # gauge that models with threads publish: requests that the server itself does not count
PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # looked up here: a forked child may not
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """How to serve a model repository. Times are bounds; `log` is where Triton's log goes, begun anew at each start."""

    repository: Path
    triton: Path | None = None  # an installed server's folder or binary; None: the one in the pytriton package
    address: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    log: Path = Path("build/triton.log")
    verbose: int = 0  # Triton's --log-verbose
    ready_s: float = 120
    drain_s: float = 5  # for running requests to end, before the server is told to stop
    stop_s: int = 10  # for the server to stop
    watch: bool = True  # stop with an error when a model's process dies

    def __post_init__(self) -> None:
        for what, port in self.ports.items():
            if not 0 < port < 65536:
                raise ConfigError(f"--{what}-port {port}: a port is a number from 1 to 65535")
        if len(set(self.ports.values())) < len(self.ports):
            raise ConfigError(f"two ports are the same: {self.ports}")

    @property
    def ports(self) -> dict[str, int]:
        return {"http": self.http_port, "grpc": self.grpc_port, "metrics": self.metrics_port}


class Server:
    """A server that is ready when this object is made; a context manager. It dies with the thread that makes it.

    Raises ServingError where the machine lacks something, a port is taken, the repository is empty, a model does not
    load, or `ready_s` is over. `stopping`, when set, ends the wait.
    """

    def __init__(self, options: ServerOptions, *, stopping: threading.Event | None = None) -> None:
        self.options = options
        self.models = models_of(options.repository)
        installation = Installation.find(options.triton)
        installation.check_machine()
        for what, port in options.ports.items():
            check_port(options.address, port, what)
        self._scratch = Scratch()
        self._stubs: dict[int, str] = {}
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._process = self._start(installation)
            self._wait(stopping or threading.Event())
            self._stubs = stubs_of(self._process.pid)
            self._scratch.note()
        except BaseException:
            self._scratch.note()
            self._end()
            raise

    def _start(self, installation: Installation) -> subprocess.Popen[bytes]:
        options = self.options
        options.log.parent.mkdir(parents=True, exist_ok=True)
        backends = installation.backends(self._scratch.folder)
        command = [str(installation.binary), *_arguments(options, backends=backends, prefix=self._scratch.prefix)]
        with options.log.open("wb") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=installation.directory(self._scratch.folder),
                env=installation.environment() | {"TMPDIR": str(self._scratch.folder)},  # what is killed leaves nothing
                start_new_session=True,  # a group of its own, to be ended as one; Ctrl-C reaches this process alone
                preexec_fn=_die_with_parent,  # noqa: PLW1509 (one system call, no lock)
            )

    def _wait(self, stopping: threading.Event) -> None:
        end = time.monotonic() + self.options.ready_s
        while not self._ready():
            if stopping.wait(POLL_S):
                raise ServingError("stopped before the server was ready")
            if not self.alive():
                raise ServingError(f"the server did not start: {self._reason()}")
            if time.monotonic() > end:
                raise ServingError(f"the server was not ready after {self.options.ready_s:g} s: {self._reason()}")

    def _ready(self) -> bool:
        """All models are loaded: the server says so of itself only where each is READY."""
        if self._fetch("http", "/v2/health/ready") is None:
            return False
        index = json.loads(self._fetch("http", "/v2/repository/index", data=b"{}") or "[]")
        ready = {model["name"] for model in index if model.get("state") == "READY"}
        return ready >= set(self.models)

    def _fetch(self, port: str, path: str, data: bytes | None = None) -> str | None:
        address = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.options.address, self.options.address)
        url = f"http://{address}:{self.options.ports[port]}{path}"
        try:
            with _DIRECT.open(urllib.request.Request(url, data), timeout=2) as answer:
                return str(answer.read().decode())
        except OSError:  # refused, reset, timed out, or a status of 400
            return None

    def alive(self) -> bool:
        """Does the server's process run? Its number is kept (a zombie's) until the end, for its group's sake."""
        process = self._process
        return process is not None and os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def lost(self) -> list[str]:
        """The models whose process ended since the server was ready; Triton itself tells only those who ask them."""
        running = stubs_of(self._process.pid) if self._process else {}
        return [model for pid, model in self._stubs.items() if pid not in running]

    def run(self, stopping: threading.Event) -> None:
        """Watch until `stopping` is set; raises ServingError when the server or (where watched) a model's process dies."""
        while not stopping.wait(WATCH_S):
            if not self.alive():
                raise ServingError(f"the server died: {self._reason()}")
            if self.options.watch and (lost := self.lost()):
                raise ServingError(
                    f"the process of {', '.join(lost)} died: the server cannot mend that and is stopped, start it again. "
                    f"{self._reason()}"
                )

    def close(self) -> bool:
        """Stop within drain_s + SETTLE_S + stop_s + KILL_S; whether every request had its end. After a model's death, at once.

        A server that answered all and then hangs in unloading its models is killed, and nothing is lost. On a busy machine
        that was seen in 9 of about 400 stops (24.10).
        """
        drained = ended = False
        if self.alive() and not self.lost():
            drained = self._drain()
            ended = self._stop()
        answered = ended or (drained and ALL_ANSWERED in self.options.log.read_text(errors="replace"))
        self._end(clean=ended)
        return answered

    def _drain(self) -> bool:
        """Wait for requests in the hands of models' threads; whether they ended within drain_s."""
        busy = time.monotonic()
        end = busy + self.options.drain_s
        while busy < end and time.monotonic() < busy + SETTLE_S:
            time.sleep(POLL_S)
            busy = time.monotonic() if self.running() else busy
        return busy < end

    def _stop(self) -> bool:
        """Tell the server to stop; whether it ended by itself and well."""
        assert self._process
        os.kill(self._process.pid, signal.SIGTERM)  # not terminate(), which may wait() and so lose the number
        end = time.monotonic() + self.options.stop_s + KILL_S
        while self.alive():
            if time.monotonic() > end:
                return False
            time.sleep(POLL_S)
        ended = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        return ended is not None and ended.si_status == 0

    def running(self) -> float:
        """Requests in the hands of models' threads: the server, told to stop, would not end with these."""
        lines = (self._fetch("metrics", "/metrics") or "").splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{RUNNING}{{"))

    def _end(self, *, clean: bool = False) -> None:
        """Kill what still runs in the server's group, and remove every trace of it but its log."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)  # the leader's number is ours until wait()
            self._process.wait()
            end = time.monotonic() + KILL_S  # its models' processes, which are not our children, take a moment
            while group_runs(self._process.pid) and time.monotonic() < end:
                time.sleep(POLL_S)
            self._process = None
        self._scratch.close(clean=clean)

    def _reason(self) -> str:
        text = self.options.log.read_text(errors="replace")
        return f"{reason_in(text)}\nTriton's log: {self.options.log.resolve()}"

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def serve(options: ServerOptions, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; raises ServingError when the server does not start or does not live until then."""
    stopping = threading.Event()
    before = {number: signal.signal(number, lambda *_: stopping.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        say(f"starting: {options.repository}; Triton's log: {options.log.resolve()}")
        server = Server(options, stopping=stopping)
        try:
            ports = ", ".join(f"{what} {options.address}:{port}" for what, port in options.ports.items())
            say(f"ready: {', '.join(server.models)}\n{ports}\nstop with Ctrl-C")
            server.run(stopping)
            say("stopping")
        finally:
            answered = server.close()
        say("stopped" if answered else "stopped by force: requests were still open")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def models_of(repository: Path) -> list[str]:
    """Names of the models in a repository; raises ServingError where there is none."""
    if not repository.is_dir():
        raise ServingError(f"{repository} is no model repository: make one with `mosear repo`")
    folders = [folder for folder in sorted(repository.iterdir()) if folder.is_dir()]
    models = [
        folder.name
        for folder in folders
        if (folder / "config.pbtxt").is_file()
        or any(inner.is_dir() and inner.name.isdigit() for inner in folder.iterdir())
    ]
    if not models:
        raise ServingError(f"{repository} holds no model (NAME/config.pbtxt, NAME/1/): make it with `mosear repo`")
    return models


def _arguments(options: ServerOptions, *, backends: Path, prefix: str) -> list[str]:
    arguments = [
        f"--model-repository={options.repository.resolve()}",
        f"--backend-directory={backends}",
        f"--backend-config=python,shm-region-prefix-name={prefix}",
        f"--exit-timeout-secs={options.stop_s}",
        "--metrics-config=summary_latencies=true",
        f"--log-verbose={options.verbose}",
        # Ask a silent client after 30 s whether it is there, give it 10 s: its request is cancelled with its connection.
        # Clients may ask every 10 s; Triton's default shuts out those that ask more often than every 5 minutes.
        "--grpc-keepalive-time=30000",
        "--grpc-keepalive-timeout=10000",
        "--grpc-keepalive-permit-without-calls=1",
        "--grpc-http2-max-pings-without-data=0",
        "--grpc-http2-min-recv-ping-interval-without-data=10000",
    ]
    for what, port in options.ports.items():
        arguments += [f"--{what}-address={options.address}", f"--{what}-port={port}"]
    if not Path("/dev/nvidiactl").exists():  # no GPU: spare the log the search for one
        arguments += ["--allow-gpu-metrics=false", "--pinned-memory-pool-byte-size=0"]
    return arguments


def _die_with_parent() -> None:
    """In the child: be killed when this process is, however it dies."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

"""A Triton Server on this machine: where its parts lie, what it needs to run here, and the environment it runs in."""

import ctypes
import importlib.metadata
import importlib.util
import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import mosear
from mosear.errors import ServingError
from mosear.serving.scratch import SHARED_MEMORY

PACKAGE = "nvidia-pytriton"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
LIBPYTHON = f"libpython{PYTHON}.so.1.0"
SHARED_MEMORY_MB = 32  # free at least: each model takes 1 MB at its start, then twice its largest tensors
LIBRARY = "libtriton_python.so"
STUB = "triton_python_backend_stub"
BACKEND_PY = '''"""A Python-based backend that serves `backend: "{backend}"` models: `mosear.serving.models.{module}`."""

from mosear.serving.models.{module} import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
BACKENDS = {"onnxruntime": "encoder", "tensorrt": "plan"}  # backends of ours by name, and their modules


@dataclass(frozen=True, slots=True, kw_only=True)
class Installation:
    """An installed server. `bundled`: the one inside the pytriton package, which has no backend but Python's."""

    root: Path
    bundled: bool

    @property
    def binary(self) -> Path:
        return self.root / "bin" / "tritonserver"

    @property
    def stub(self) -> Path:
        """The program that runs a Python model: one for each Python in the package, one for all elsewhere."""
        if self.bundled:
            return self.root / "python_backend_stubs" / PYTHON / STUB
        return self.root / "backends" / "python" / STUB

    @classmethod
    def find(cls, path: Path | None = None) -> "Installation":
        """The package's server, or the installed one that `path` (its folder or its binary) names."""
        if path is None:
            found = importlib.util.find_spec("pytriton")
            if found is None or not found.submodule_search_locations:
                raise ServingError(
                    f"no Triton Server here: pip install {PACKAGE} into {sys.prefix}, or name an installed one with --triton"
                )
            installation = cls(root=Path(found.submodule_search_locations[0]) / "tritonserver", bundled=True)
        else:
            root = path.absolute()
            installation = cls(root=root if root.is_dir() else root.parent.parent, bundled=False)
        for part in (installation.binary, installation.root / "backends" / "python" / LIBRARY, installation.stub):
            if not part.is_file():
                raise ServingError(
                    f"{installation.root} is no Triton Server that runs Python models: {part} is missing"
                )
        return installation

    def check_machine(self) -> None:
        """Raise ServingError naming what the machine lacks: found now, these are sentences; later, hangs."""
        if shutil.which("bash") is None:
            raise ServingError("bash is not on PATH, with which the server starts its models: apt-get install bash")
        if not os.access(SHARED_MEMORY, os.W_OK):
            raise ServingError(f"{SHARED_MEMORY} cannot be written, through which the server talks to its models")
        free_mb = shutil.disk_usage(SHARED_MEMORY).free >> 20
        if free_mb < SHARED_MEMORY_MB:
            raise ServingError(
                f"{SHARED_MEMORY} has {free_mb} MB free, the server needs {SHARED_MEMORY_MB}: in a container, --shm-size=1g"
            )
        if self.bundled:
            self._check_python()

    def _check_python(self) -> None:
        if _libpython() is None:
            raise ServingError(
                f"{LIBPYTHON} is not here, without which models never load: apt-get install libpython{PYTHON}"
            )
        numpy = importlib.metadata.version("numpy")
        if int(numpy.split(".", maxsplit=1)[0]) >= 2:
            raise ServingError(
                f"numpy {numpy} in {sys.prefix}: this server returns empty tensors with numpy 2. pip install 'numpy<2'"
            )
        python3 = _executables() / "python3"
        if not python3.exists() or python3.resolve() != Path(sys.executable).resolve():
            raise ServingError(
                f"{python3} is not {sys.executable}, so models would run in another Python: make an environment "
                f"({sys.executable} -m venv .venv) and install there"
            )

    def backends(self, folder: Path) -> Path:
        """A backend directory with Python models, `onnxruntime` and `tensorrt`: the server's own, or one made in `folder`."""
        own = self.root / "backends"
        if (own / "onnxruntime").is_dir():
            return own
        made = folder / "backends"
        (made / "python").mkdir(parents=True)
        # The library must be a copy: Python-based backends are refused where it is a link. The stub must be a link: it
        # finds its libraries beside itself.
        shutil.copyfile(own / "python" / LIBRARY, made / "python" / LIBRARY)
        for file in (own / "python" / "triton_python_backend_utils.py", self.stub):
            (made / "python" / file.name).symlink_to(file)
        for backend, module in BACKENDS.items():
            (made / backend).mkdir()
            (made / backend / "model.py").write_text(BACKEND_PY.format(backend=backend, module=module))
        return made

    def directory(self, folder: Path) -> Path:
        """A current directory for the server, in which models find this process's `mosear` before any other.

        Their interpreters ignore PYTHONPATH and look there first.
        """
        made = folder / "cwd"
        made.mkdir()
        (made / "mosear").symlink_to(Path(mosear.__file__).parent)
        return made

    def environment(self) -> dict[str, str]:
        """Variables with which models find this Python and its packages."""
        environment = dict(os.environ)
        if self.bundled:
            _prepend(environment, "PATH", _executables())
            _prepend(environment, "LD_LIBRARY_PATH", _libpython())
        return environment


def _executables() -> Path:
    return Path(sys.prefix) / "bin"


def _libpython() -> Path | None:
    """The folder of this Python's shared library: its own, or (as an empty path) one that the loader knows."""
    own = Path(str(sysconfig.get_config_var("LIBDIR")))
    if (own / LIBPYTHON).exists():
        return own
    try:
        ctypes.CDLL(LIBPYTHON)
    except OSError:
        return None
    return Path()


def _prepend(environment: dict[str, str], name: str, folder: Path | None) -> None:
    """Put a folder before a list of folders, which may be empty (an empty entry would mean the current folder)."""
    if folder and folder != Path():
        environment[name] = os.pathsep.join(filter(None, (str(folder), environment.get(name))))

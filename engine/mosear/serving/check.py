"""`mosear repo --check`: the real server loads every plan's configuration, on a machine that needs no GPU.

The server has no `tensorrt` backend here but ours in Python, which compares a configuration with its plan, and warm-up samples
with its profile, and loads no plan where it is told to check only. So the models are loaded from a copy of the repository that
differs in that parameter and in the instances' kind, as the server takes no kind GPU without one.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from mosear.artifacts import share
from mosear.errors import ServingError
from mosear.serving.configs import CHECK_ONLY, TENSORRT
from mosear.serving.ports import free_ports
from mosear.serving.server import Server, ServerOptions

CONFIG = "config.pbtxt"


def check_plans(repository: Path, say: Callable[[str], None], *, triton: Path | None = None) -> list[str]:
    """The models of a repository that are plans, each loaded by the server; raises ServingError where one is not."""
    with tempfile.TemporaryDirectory(prefix="mosear-check-") as aside:
        folder = Path(aside, "models")
        names = [path.parent.name for path in sorted(repository.glob(f"*/{CONFIG}")) if _copied(path, folder)]
        if not names:
            raise ServingError(f"{repository} has no model of the backend {TENSORRT}: there is nothing to check")
        options = ServerOptions(repository=folder, triton=triton, log=Path(aside, "triton.log"), **free_ports())
        with Server(options) as server:
            for name in server.models:
                say(f"{name}: the server takes its configuration, which fits its plan")
        return names


def _copied(path: Path, folder: Path) -> bool:
    """Copy a model's folder where its backend is tensorrt, its instances of kind CPU and told to check; plans are links."""
    config = text_format.Parse(path.read_text(), pb.ModelConfig())
    if config.backend != TENSORRT:
        return False
    target = folder / path.parent.name
    shutil.copytree(path.parent, target, copy_function=lambda source, place: share(Path(source), Path(place)))
    for group in config.instance_group:
        group.kind = pb.ModelInstanceGroup.KIND_CPU
    config.parameters[CHECK_ONLY].string_value = "true"
    (target / CONFIG).unlink()  # it is a link to the repository's own
    (target / CONFIG).write_text(text_format.MessageToString(config))
    return True

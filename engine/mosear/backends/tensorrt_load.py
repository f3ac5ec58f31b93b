"""Is a TensorRT engine right for this machine? Asked before a plan is read: version, chip, hashes; each with its mend."""

import ctypes
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

from mosear.artifacts import Manifest
from mosear.errors import EngineError

PACKAGES = {"tensorrt_rtx": "tensorrt_rtx_cu13", "tensorrt": "tensorrt"}
_MAJOR, _MINOR = 75, 76  # cuDeviceGetAttribute: compute capability


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A GPU, or why there is none."""

    compute_capability: str | None
    reason: str = ""


def installed_version(module: str) -> str | None:
    try:
        return importlib.metadata.version(PACKAGES[module])
    except importlib.metadata.PackageNotFoundError:
        return None


def first_device() -> Device:
    """The first GPU's compute capability, asked of the driver library."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Device(compute_capability=None, reason="no NVIDIA driver here (libcuda.so.1 is not found)")
    if status := driver.cuInit(0):
        return Device(compute_capability=None, reason=f"the NVIDIA driver does not start (cuInit: error {status})")
    handle, values = ctypes.c_int(), []
    if driver.cuDeviceGet(ctypes.byref(handle), 0):
        return Device(compute_capability=None, reason="the NVIDIA driver knows no GPU")
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle)
        values.append(str(value.value))
    return Device(compute_capability=".".join(values))


def check_engine(folder: Path, manifest: Manifest, *, module: str, version: str | None, device: Device) -> None:
    """Raises EngineError naming expected and found where the engine's plans cannot run here, or were altered."""
    recipe = manifest.inputs["recipe"]
    assert isinstance(recipe, dict), "an engine's manifest names its recipe"
    remedy = f"build it again: python export/build_engine.py --recipe export/recipes/{recipe['name']}.toml"
    expected = manifest.inputs.get(module)
    if version is None:
        raise EngineError(
            f"{folder} needs {module} {expected}, which is not installed: pip install 'mosear-engine[rtx]'"
        )
    if version != expected:
        raise EngineError(
            f"{folder} was built by {module} {expected}, found {version}: a plan is right for its own version alone; {remedy}"
        )
    chips = manifest.notes.get("compute_capabilities")
    assert isinstance(chips, list), "an engine's manifest names its chips"
    if device.compute_capability is None:
        raise EngineError(f"{folder} needs a GPU of compute capability {', '.join(chips)}: {device.reason}")
    if device.compute_capability not in chips:
        raise EngineError(
            f"{folder} was built for compute capability {', '.join(chips)}, found {device.compute_capability}: "
            f"name it in the recipe's tensorrt.compute_capabilities and {remedy}"
        )
    manifest.verify(folder, remedy=remedy)

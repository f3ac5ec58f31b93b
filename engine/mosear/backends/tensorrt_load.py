"""Is a TensorRT engine right for this machine? Asked before a plan is read: version, chip, hashes; each with its mend."""

import contextlib
import ctypes
import importlib.metadata
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mosear.artifacts import Manifest
from mosear.errors import EngineError

LIBRARY_PACKAGES = {"tensorrt": "tensorrt_libs"}  # a package of its own brings the library
INSTALL = {"tensorrt_rtx": "pip install 'mosear-engine[rtx]'", "tensorrt": "pip install 'mosear-engine[tensorrt]'"}
# Packages that bring a module, one of them is there: of either CUDA, or the one that asks for the newest.
PACKAGES = {module: tuple(f"{module.replace('_', '-')}{cuda}" for cuda in ("-cu13", "-cu12", "")) for module in INSTALL}
AMPERE = (8, 0)
_MAJOR, _MINOR, _MULTIPROCESSORS = 75, 76, 16  # of cuDeviceGetAttribute; the first two: compute capability


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A GPU, or why there is none."""

    compute_capability: str | None
    multiprocessors: int = 0
    reason: str = ""


def installed_version(module: str) -> str | None:
    """The version of a TensorRT's Python package; its library may be missing all the same (`unusable`)."""
    for package in PACKAGES[module]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return None


def unusable(module: str) -> str:
    """Why a TensorRT cannot be used here, in a few words; empty where it can be. Nothing is imported."""
    if installed_version(module) is None or importlib.util.find_spec(module) is None:
        return f"{module} is not installed"
    if module in LIBRARY_PACKAGES and importlib.util.find_spec(LIBRARY_PACKAGES[module]) is None:
        major = str(installed_version(module)).partition(".")[0]
        try:
            ctypes.CDLL(f"libnvinfer.so.{major}")
        except OSError:
            return f"{module} is installed without its library (libnvinfer.so.{major} is not found)"
    return ""


def first_device() -> Device:
    """The first GPU's compute capability, asked of the driver library."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Device(compute_capability=None, reason="no NVIDIA driver here (libcuda.so.1 is not found)")
    if status := driver.cuInit(0):
        return Device(compute_capability=None, reason=f"the NVIDIA driver does not start (cuInit: error {status})")
    handle = ctypes.c_int()
    if driver.cuDeviceGet(ctypes.byref(handle), 0):
        return Device(compute_capability=None, reason="the NVIDIA driver knows no GPU")
    values = []
    for attribute in (_MAJOR, _MINOR, _MULTIPROCESSORS):
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle)
        values.append(value.value)
    return Device(compute_capability=f"{values[0]}.{values[1]}", multiprocessors=values[2])


def serves(recipe: Mapping[str, Any], chips: Sequence[str], found: str) -> bool:  # Any: JSON
    """Whether plans of a recipe for these chips run on the one that was found."""
    settings = recipe.get("tensorrt") or {}
    if settings.get("compatibility") == "ampere_plus":
        return tuple(map(int, found.split("."))) >= AMPERE
    return found in chips


def check_engine(folder: Path, manifest: Manifest, *, module: str, version: str | None, device: Device) -> None:
    """Raises EngineError naming expected and found where the engine's plans cannot run here, or were altered."""
    recipe = manifest.inputs["recipe"]
    assert isinstance(recipe, dict), "an engine's manifest names its recipe"
    remedy = f"build it again: python export/build_engine.py --recipe export/recipes/{recipe['name']}.toml"
    expected = manifest.inputs.get(module)
    if version is None:
        raise EngineError(f"{folder} needs {module} {expected}, which is not installed: {INSTALL[module]}")
    if version != expected:
        raise EngineError(
            f"{folder} was built by {module} {expected}, found {version}: a plan is right for its own version alone; {remedy}"
        )
    chips = manifest.notes.get("compute_capabilities")
    assert isinstance(chips, list), "an engine's manifest names its chips"
    if device.compute_capability is None:
        raise EngineError(f"{folder} needs a GPU of compute capability {', '.join(chips)}: {device.reason}")
    if not serves(recipe, chips, device.compute_capability):
        raise EngineError(
            f"{folder} was built for compute capability {', '.join(chips)}, found {device.compute_capability}: "
            f"name it in the recipe's tensorrt.compute_capabilities and {remedy}"
        )
    manifest.verify(folder, remedy=remedy)

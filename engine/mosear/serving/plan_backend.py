"""Serves plans of encoders where Triton has no tensorrt backend of its own, or the plans are TensorRT-RTX's.

The same `config.pbtxt` as for the native backend. The plan's notes lie beside it, so that what the configuration says of
tensors, types and batches is compared with the plan without a GPU: with the parameter `check_only` that is all that is done,
and warm-up samples are compared with the profile (`mosear repo --check`).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mosear.backends.cuda_driver import Driver
from mosear.backends.tensorrt_load import first_device, installed_version
from mosear.backends.tensorrt_plans import KINDS, Plan, open_runtime
from mosear.contract import Tensors
from mosear.errors import EngineError, MosearError, RequestError
from mosear.serving.configs import PLAN_FILE, PLAN_NOTES
from mosear.serving.onnx_backend import Ask, Batching, Config

TYPES = {"FLOAT": "TYPE_FP32", "INT32": "TYPE_INT32", "INT64": "TYPE_INT64", "UINT8": "TYPE_UINT8", "HALF": "TYPE_FP16"}


class PlanModel(Batching):
    """A plan and its configuration, found to fit each other. `open` loads it."""

    def __init__(self, config: Config, folder: Path) -> None:
        """Raises EngineError where a file is missing or cannot be read, or the configuration is not the plan's."""
        self.name, self.folder = str(config["name"]), folder
        self.batched = int(config.get("max_batch_size", 0)) > 0
        self.file = folder / (config.get("default_model_filename") or PLAN_FILE)
        self.plan: Plan | None = None
        try:
            self.notes: dict[str, Any] = json.loads((folder / PLAN_NOTES).read_text())
            size = self.file.stat().st_size
        except (OSError, ValueError) as error:
            raise EngineError(
                f"{self.name}: {folder} holds no plan and its notes: {error}: run `mosear repo`"
            ) from error
        if size != self.notes["report"]["bytes"]:
            raise EngineError(
                f"{self.name}: {self.file} has {size} bytes, {self.notes['report']['bytes']} were built: run `mosear repo`"
            )
        self._check(config)

    def _check(self, config: Config) -> None:
        for kind in ("input", "output"):
            known, given = self.notes[f"{kind}s"], {tensor["name"]: tensor for tensor in config[kind]}
            if known.keys() != given.keys():
                raise EngineError(
                    f"{self.name}: the plan has the {kind}s {sorted(known)}, the configuration {sorted(given)}"
                )
            for name, tensor in given.items():
                self._check_tensor(name, tensor, *known[name])
        profiles = self.notes["profiles"]
        batches = [ranges[2][0] for ranges in (profiles[0] if profiles else {}).values()]
        if batches and int(config["max_batch_size"]) > min(batches):
            raise EngineError(
                f"{self.name}: max_batch_size is {config['max_batch_size']}, the plan's profile goes to {min(batches)}"
            )
        for group in config["instance_group"]:
            if wrong := [p for p in group.get("profile", []) if not p.isdecimal() or int(p) >= max(1, len(profiles))]:
                raise EngineError(f"{self.name}: there is no profile {wrong[0]}: the plan has {max(1, len(profiles))}")

    def _check_tensor(self, name: str, tensor: Mapping[str, Any], kind: str, shape: list[int]) -> None:
        if TYPES.get(kind) != tensor["data_type"]:
            raise EngineError(
                f"{self.name}: {name} is {kind} in the plan, the configuration says {tensor['data_type']}"
            )
        shown = tensor["reshape"].get("shape", []) if "reshape" in tensor else tensor["dims"]
        dims = [int(dim) for dim in shown]
        wanted = shape[1:] if self.batched else shape
        fits = len(dims) == len(wanted) and all(dim in (size, -1) or size == -1 for dim, size in zip(dims, wanted))
        if not fits:
            raise EngineError(
                f"{self.name}: {name} is {shape} in the plan, the configuration says {dims} without the batch"
            )

    def open(self) -> None:
        """Load it; raises EngineError where version or GPU are not those that it was built for."""
        module, version, device = self.notes["module"], installed_version(self.notes["module"]), first_device()
        if version != self.notes["version"]:
            raise EngineError(f"{self.name}: the plan was built by {module} {self.notes['version']}, found {version}")
        chips = self.notes["compute_capabilities"]
        if device.compute_capability not in chips and self.notes["read_back"].get("compatibility") != "ampere_plus":
            found = device.compute_capability or device.reason
            raise EngineError(f"{self.name}: the plan is for compute capability {', '.join(chips)}, found {found}")
        trt, runtime = open_runtime(module)
        self.plan = Plan(trt, runtime, self.file, Driver())

    def alone(self, ask: Ask) -> Tensors | MosearError:
        if missing := [name for name in self.notes["inputs"] if name not in ask.inputs]:
            return RequestError(f"{self.name}: input {missing[0]} is missing")
        if self.plan is None:
            return self._rehearsed(ask)
        try:
            found = self.plan.run(ask.inputs)
        except MosearError as error:
            return error
        return {name: found[name].copy() for name in ask.outputs}

    def _rehearsed(self, ask: Ask) -> Tensors | MosearError:
        """Zeros in the shapes of an answer, where the request's own are within the profile: warm-up of a server that checks."""
        ranges = self.notes["profiles"][0] if self.notes["profiles"] else {}
        for name, (low, _, high) in ranges.items():
            shape = ask.inputs[name].shape
            if len(shape) != len(low) or any(not a <= size <= b for a, size, b in zip(low, shape, high)):
                return RequestError(
                    f"{self.name}: {name} is {list(shape)}, the plan's profile goes from {low} to {high}"
                )
        batch, told = ask.rows() or 1, self.notes["outputs"]
        shapes = {name: [batch if size < 0 else size for size in told[name][1]] for name in ask.outputs}
        return {name: np.zeros(shape, KINDS[told[name][0]]) for name, shape in shapes.items()}

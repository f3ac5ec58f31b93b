"""Engines of TensorRT and TensorRT-RTX on a GPU: every part a plan, the decoder's cache in the GPU's memory."""

from collections.abc import Collection
from pathlib import Path

import numpy as np

from mosear.backends.cuda_driver import Driver
from mosear.backends.onnxruntime_cpu import check
from mosear.backends.tensorrt_decoder import PlanDecoder
from mosear.backends.tensorrt_plans import Plan, open_runtime, to_plan
from mosear.config import ModelConfig
from mosear.contract import DECODER, EMBEDDING, Tensors, parts


class TensorRTBackend:
    """Loaded plans. What checks a folder before this is `tensorrt_load.check_engine`."""

    device = "cuda"

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        *,
        module: str,
        heads: Tensors,
        names: Collection[str] = (),
        driver: Driver | None = None,
    ) -> None:
        """`module`: tensorrt or tensorrt_rtx. `heads` are bound to the decoder's head inputs once. names: parts to load
        (none named: all).

        Raises EngineError where there is no GPU, the library cannot be loaded or does not take a plan.
        """
        self.config, self.provider = config, module
        self.parts = {name: part for name, part in parts(config).items() if not names or name in names}
        self.driver = driver or Driver()
        trt, self._runtime = open_runtime(module)
        self.plans = {name: Plan(trt, self._runtime, folder / f"{name}.plan", self.driver) for name in self.parts}
        self.heads: dict[str, int] = {}
        self.started: list[PlanDecoder] = []
        if DECODER in self.plans:
            plan = self.plans[DECODER]
            used = {name: value for name, value in heads.items() if name in plan.inputs}
            self.heads = plan.hold({name: value.shape for name, value in used.items()})
            kept = {name: np.ascontiguousarray(to_plan(value, plan.kinds[name])) for name, value in used.items()}
            for name, value in kept.items():
                self.driver.upload(self.heads[name], value)
            self.driver.wait()

    def run(self, part: str, tensors: Tensors) -> Tensors:
        spec, plan = self.parts[part], self.plans[part]
        check(spec, tensors)
        if part != EMBEDDING:
            return _copied(plan.run(tensors))
        (name,) = plan.inputs
        ids, most = tensors[name], plan.most(name, 0)[1]
        pieces = [_copied(plan.run({name: ids[:, at : at + most]})) for at in range(0, ids.shape[1], most)]
        return {output.name: np.concatenate([piece[output.name] for piece in pieces], 1) for output in spec.outputs}

    def start(self, *, batch: int, capacity: int) -> PlanDecoder:
        made = PlanDecoder(
            self.plans[DECODER], self.parts[DECODER], self.config, heads=self.heads, batch=batch, capacity=capacity
        )
        self.started.append(made)
        return made

    def close(self) -> None:
        for decoder in self.started:
            decoder.close()
        for plan in self.plans.values():
            plan.close()
        for address in self.heads.values():
            self.driver.free(address)
        self.plans, self.heads, self.started = {}, {}, []
        self.driver.close()


def _copied(buffers: Tensors) -> Tensors:
    """A plan's outputs are its buffers: the next call writes over them."""
    return {name: np.array(value) for name, value in buffers.items()}

"""Models of the backend `onnxruntime` where it is ours, in Python (`serving.onnx_backend`)."""

import json
import os
from pathlib import Path

import triton_python_backend_utils as pb_utils

from mosear.contract import Tensors
from mosear.errors import EngineError, MosearError, RequestError
from mosear.serving.faults import encode_fault
from mosear.serving.models.wire import Triton
from mosear.serving.onnx_backend import NICENESS, Ask, Batching, OnnxModel


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        if args["model_instance_kind"] != "CPU":
            raise EngineError(f"{args['model_name']}: this backend runs on the CPU only: `mosear repo --target cpu`")
        os.nice(NICENESS)
        folder = Path(args["model_repository"]) / args["model_version"]
        self.model: Batching = OnnxModel(json.loads(args["model_config"]), folder)

    def execute(self, requests: list[Triton]) -> list[Triton]:
        asks = [
            Ask(
                inputs={tensor.name(): tensor.as_numpy() for tensor in request.inputs()},
                outputs=tuple(request.requested_output_names()),
            )
            for request in requests
        ]
        return [self._response(answer) for answer in self.model.answer(asks)]

    @staticmethod
    def _response(answer: Tensors | MosearError) -> Triton:
        if isinstance(answer, MosearError):
            codes = pb_utils.TritonError
            code = codes.INVALID_ARG if isinstance(answer, RequestError) else codes.INTERNAL
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(encode_fault(answer), code))
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in answer.items()])

"""Models of the backend `tensorrt` where it is ours, in Python (`serving.plan_backend`)."""

import json
from pathlib import Path

from mosear.serving.models import encoder
from mosear.serving.plan_backend import PlanModel


class TritonPythonModel(encoder.TritonPythonModel):
    """Requests and responses are those of the onnxruntime backend; what answers is a plan."""

    def initialize(self, args: dict[str, str]) -> None:
        folder = Path(args["model_repository"]) / args["model_version"]
        model = PlanModel(json.loads(args["model_config"]), folder)
        if args["model_instance_kind"] == "GPU":
            model.open()
        self.model = model

"""Models of the backend `tensorrt` where it is ours, in Python (`serving.plan_backend`)."""

import json
from pathlib import Path

from mosear.serving.configs import CHECK_ONLY
from mosear.serving.models import encoder
from mosear.serving.plan_backend import PlanModel


class TritonPythonModel(encoder.TritonPythonModel):
    """Requests and responses are those of the onnxruntime backend; what answers is a plan."""

    def initialize(self, args: dict[str, str]) -> None:
        folder = Path(args["model_repository"]) / args["model_version"]
        config = json.loads(args["model_config"])
        model = PlanModel(config, folder)
        if CHECK_ONLY not in config.get("parameters", {}):
            model.open()
        self.model = model

"""A Python-based backend that serves `backend: "tensorrt"` models: `mosear.serving.models.plan`."""

from mosear.serving.models.plan import TritonPythonModel

__all__ = ["TritonPythonModel"]

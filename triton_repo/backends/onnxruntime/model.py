"""A Python-based backend that serves `backend: "onnxruntime"` models: `mosear.serving.models.encoder`."""

from mosear.serving.models.encoder import TritonPythonModel

__all__ = ["TritonPythonModel"]

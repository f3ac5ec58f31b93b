"""The model is `mosear.serving.models.decoder`."""

from mosear.serving.models.decoder import TritonPythonModel

__all__ = ["TritonPythonModel"]

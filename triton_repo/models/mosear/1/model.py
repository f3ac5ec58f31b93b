"""The model is `mosear.serving.models.mosear`."""

from mosear.serving.models.mosear import TritonPythonModel

__all__ = ["TritonPythonModel"]

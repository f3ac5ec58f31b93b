"""A server of engines and its client: `from mosear.serving import Client`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mosear.serving.client import Client

__all__ = ["Client"]


def __getattr__(name: str) -> object:
    """The client when it is asked for: the server's models live in this package too, and must not load gRPC."""
    if name == "Client":
        from mosear.serving.client import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

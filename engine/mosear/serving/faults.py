"""Errors on their way through a server: a response's error text names the kind, and the client raises it again."""

import re

from mosear.errors import (
    BusyError,
    CancelledError,
    DeadlineError,
    EngineError,
    MediaError,
    MosearError,
    RequestError,
    ServingError,
)

KINDS: dict[str, type[MosearError]] = {
    kind.__name__: kind
    for kind in (RequestError, MediaError, BusyError, DeadlineError, CancelledError, EngineError, ServingError)
}
# What Triton Server says by itself, before a model sees the request.
SERVER_SAYS: tuple[tuple[str, type[MosearError]], ...] = (
    ("Exceeds maximum queue size", BusyError),
    ("Request timeout expired", DeadlineError),
)
STOPPING = "Server not ready"  # to a model that calls another while the server stops
STOPPED = "the server was told to stop before the answer was complete: ask again when it is back"
# The server puts words of its own before a model's text, the Python backend a traceback after it.
_FAULT = re.compile(rf"\b({'|'.join(KINDS)}): (.*?)(?:\n+At:\n.*)?$", re.DOTALL)


def encode_fault(error: Exception) -> str:
    """`KIND: message` of an error; what is none of `KINDS` is an EngineError."""
    kind = next((cls.__name__ for cls in type(error).__mro__ if cls in KINDS.values()), None)
    if kind:
        return f"{kind}: {error}"
    return f"{EngineError.__name__}: {type(error).__name__}: {error}: the server's log has more"


def known_fault(text: str) -> MosearError | None:
    """The error that `encode_fault` made the text of, or that the server's own words stand for; None for another text."""
    if match := _FAULT.search(text):
        return KINDS[match[1]](match[2].strip())
    kind = next((kind for words, kind in SERVER_SAYS if words in text), None)
    return None if kind is None else kind(f"the server says: {text.strip()}")


def decode_fault(text: str) -> MosearError:
    """`known_fault`; a text that says none becomes a ServingError."""
    return known_fault(text) or ServingError(f"the server says: {text.strip() or 'nothing'}")


def inner_fault(model: str, text: str) -> MosearError:
    """The error of a model that called `model`, where the server itself answered with `text`."""
    if STOPPING in text:
        return ServingError(STOPPED)
    return EngineError(f"model {model} failed: {text}")

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
    kind.__name__: kind for kind in (RequestError, MediaError, BusyError, DeadlineError, CancelledError, EngineError)
}
# What Triton Server says by itself, before a model sees the request.
SERVER_SAYS: tuple[tuple[str, type[MosearError]], ...] = (
    ("Exceeds maximum queue size", BusyError),
    ("Request timeout expired", DeadlineError),
)
# The server puts words of its own before a model's text, the Python backend a traceback after it.
_FAULT = re.compile(rf"\b({'|'.join(KINDS)}): (.*?)(?:\n+At:\n.*)?$", re.DOTALL)


def encode_fault(error: Exception) -> str:
    """`KIND: message` of an error; what is none of `KINDS` is an EngineError."""
    kind = next((cls.__name__ for cls in type(error).__mro__ if cls in KINDS.values()), None)
    if kind:
        return f"{kind}: {error}"
    return f"{EngineError.__name__}: {type(error).__name__}: {error}: the server's log has more"


def decode_fault(text: str) -> MosearError:
    """The error that `encode_fault` made the text of; a text without a kind becomes a ServingError."""
    if match := _FAULT.search(text):
        return KINDS[match[1]](match[2].strip())
    kind = next((kind for words, kind in SERVER_SAYS if words in text), ServingError)
    return kind(f"the server says: {text.strip() or 'nothing'}")

"""Every error that a user can cause. Each message says what is wrong, where, and what to do next."""


class MosearError(Exception):
    """Base of all errors that the engine raises on purpose."""


class ConfigError(MosearError):
    """A configuration, recipe or command line holds a value that cannot be used."""


class CheckpointError(MosearError):
    """A checkpoint folder is incomplete, altered or of the wrong shape."""


class EngineError(MosearError):
    """An ONNX or engine folder is stale, altered or made by another version."""


class FetchError(MosearError):
    """A package that the demo needs could not be had, or is not the one that we know."""


class RequestError(MosearError):
    """A request holds a value that cannot be answered."""


class MediaError(RequestError):
    """The bytes of a clip cannot be read as sound or pictures."""


class BusyError(MosearError):
    """The queue is full: the same request can be answered later."""


class DeadlineError(MosearError):
    """A request's time was over before its answer was complete."""


class CancelledError(MosearError):
    """A request was withdrawn by whoever sent it."""


class ServingError(MosearError):
    """A server cannot be found, started or reached, or it failed a request."""


class KernelError(MosearError):
    """A kernel cannot be compiled, or was given what it does not serve."""

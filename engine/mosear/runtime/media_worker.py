"""The process behind `MediaReader`: requests on stdin, answers on stdout, within limits, ends with its parent."""

import contextlib
import ctypes
import io
import json
import os
import resource
import signal
import sys
import threading
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mosear.errors import MediaError
from mosear.runtime.media import MediaLimits, receive, send
from mosear.runtime.media_decode import Job, decode

_GRACE_S = 2.0  # the parent stops a late request at timeout_s; this is for a parent that is gone
_PARENT_CHECK_S = 1.0


def main() -> None:
    """Answer until stdin ends. Arguments: MediaLimits as JSON, frames, sample rate in Hz."""
    job = Job(limits=MediaLimits(**json.loads(sys.argv[1])), frames=int(sys.argv[2]), sample_rate=int(sys.argv[3]))
    inbox, outbox = os.fdopen(os.dup(0), "rb", buffering=0), os.fdopen(os.dup(1), "wb", buffering=0)
    silence = os.open(os.devnull, os.O_RDWR)
    os.dup2(silence, 0)
    os.dup2(silence, 1)  # whoever prints must not break the protocol
    _confine(job.limits)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", int)  # glibc's own
    with contextlib.suppress(EOFError, BrokenPipeError):
        send(outbox, {"ready": True}, [])
        while True:
            _serve(inbox, outbox, job)
            trim(0)  # 50 MB instead of 200 MB are kept after a 4K clip


def _serve(inbox: io.FileIO, outbox: io.FileIO, job: Job) -> None:
    """Read one request and answer it; EOFError at the end of the requests."""
    header, blobs = receive(inbox, 2 * job.limits.max_bytes)
    signal.setitimer(signal.ITIMER_REAL, job.limits.timeout_s + _GRACE_S)  # SIGALRM ends us, even inside C
    video, audio = (blob if given else None for blob, given in zip(blobs, header["given"], strict=True))
    answer, parts = _answer(video, audio, job)
    signal.setitimer(signal.ITIMER_REAL, 0)
    send(outbox, answer, parts)


def _answer(
    video: NDArray[np.uint8] | None, audio: NDArray[np.uint8] | None, job: Job
) -> tuple[dict[str, Any], list[NDArray[Any]]]:  # Any: values of JSON, arrays of several types
    """Header and blobs of the answer; `last` asks to be replaced, after an error that may have left damage."""
    try:
        clip = decode(video, audio, job)
    except MediaError as error:
        return {"error": str(error)}, []
    except MemoryError:
        limit = job.limits.max_memory_bytes
        text = f"decoding the clip needs more memory than max_memory_bytes = {limit}: send a smaller or shorter clip"
        return {"error": text, "last": True}, []
    except Exception as error:  # whatever hostile bytes provoke must become an answer
        text = f"the clip cannot be decoded ({type(error).__name__}: {error}): re-encode it and try again"
        return {"error": text, "last": True}, []
    header = {"shape": clip.frames.shape[:3], "notes": clip.notes}
    return header, [clip.frames, clip.frame_times_s, clip.waveform]


def _confine(limits: MediaLimits) -> None:
    """Bound memory; write no file and no core dump."""
    wanted = ((resource.RLIMIT_AS, limits.max_memory_bytes), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0))
    for kind, value in wanted:
        hard = resource.getrlimit(kind)[1]
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (bound, bound))


def _end_with_parent(parent: int) -> None:
    """End the process once its parent is gone: stdin stays open if another child of the parent holds the pipe."""
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_S)
    os._exit(0)


if __name__ == "__main__":
    main()

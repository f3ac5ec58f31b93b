"""The process that decodes media for `MediaReader`: requests on stdin, answers on stdout, ends with its parent."""

import contextlib
import io
import json
import os
import resource
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from numpy.typing import NDArray

from mosear.errors import MediaError
from mosear.runtime.media import MAX_SIDE, Clip, MediaLimits, receive, send

# Nothing that opens other files or addresses by itself (playlists, ffconcat, sdp) may be probed.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,flv,live_flv,wav,w64,flac,mp3,ogg"
_NAMES = "mp4, mov, mkv, webm, flv, wav, flac, mp3, ogg"
_SLACK_S = 0.25  # encoders fill their last block: 1024 samples at 8 kHz are 0.13 s
_HEADER_SLACK_S = 0.5
_THREADS = 2
_FRAME_S = 1 / 25  # how long a lone picture without a rate is shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is wanted of each clip."""

    limits: MediaLimits
    frames: int
    sample_rate: int


def decode(video: bytes | None, audio: bytes | None, job: Job) -> Clip:
    """Decode a clip as `MediaReader.read` says; raises MediaError."""
    notes: list[str] = []
    pictures, times = np.zeros((0, 0, 0, 3), np.uint8), np.zeros(0, np.float32)
    waveform = np.zeros(0, np.float32)
    if video is not None:
        with _open(video, "video_bytes") as container:
            shown = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic][:1]
            heard = list(container.streams.audio[:1]) if audio is None else []
            source = _Source(container, [*shown, *heard], "video_bytes", job.limits, notes)
            if shown:
                pictures, times = _pictures(source, shown[0], job)
            if heard:
                waveform = _sound(source, heard[0], job)
        if audio is None and not len(pictures) and not len(waveform):
            raise MediaError(_nothing("video_bytes", "pictures nor sound", notes))
    if audio is not None:
        with _open(audio, "audio_bytes") as container:
            heard = list(container.streams.audio[:1])
            waveform = _sound(_Source(container, heard, "audio_bytes", job.limits, notes), heard[0], job) if heard else waveform
        if not len(waveform):
            raise MediaError(_nothing("audio_bytes", "sound", notes))
    return Clip(frames=pictures, frame_times_s=times, waveform=waveform, notes=tuple(notes))

"""Every way in which the decoding process ends: the caller gets an error, the next request an answer."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from media_factory import (
    FRAMES,
    RATE,
    make_clip,
    new_reader,
)

from mosear.errors import MediaError
from mosear.runtime import media
from mosear.runtime.media import MediaReader


@pytest.fixture(scope="module")
def reader() -> Iterator[MediaReader]:
    with new_reader() as made:
        yield made


def stop_then(reader: MediaReader, act: Callable[[int], None], clip: bytes) -> MediaError:
    """The error of a request whose worker is stopped beforehand and meets `act` while the request waits."""
    pid, errors = reader.pid, []

    def read() -> None:
        try:
            reader.read(clip, None)
        except MediaError as error:
            errors.append(error)

    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    waiting = threading.Thread(target=read, daemon=True)  # a failing test must not hang
    waiting.start()
    time.sleep(0.1)
    act(pid)
    waiting.join(10)
    assert len(errors) == 1
    return errors[0]


def gone(pid: int, within_s: float = 5.0) -> bool:
    """Whether a process ends in time; a zombie that nobody reaps has ended."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_a_worker_killed_during_a_request(reader: MediaReader, number: signal.Signals) -> None:
    data = make_clip("mp4", seconds=0.5)

    def kill(pid: int) -> None:
        os.kill(pid, number)
        os.kill(pid, signal.SIGCONT)

    before = reader.pid
    error = stop_then(reader, kill, data)
    assert f"video_bytes: the decoding process ended (signal {int(number)}" in str(error)
    assert "re-encode" in str(error)
    assert len(reader.read(data, None).frames) == FRAMES
    assert before is not None and reader.pid != before and gone(before)


def test_a_worker_that_hangs_is_replaced() -> None:
    data = make_clip("mp4", seconds=0.5)
    with new_reader(timeout_s=0.5) as reader:
        hung = reader.pid
        start = time.monotonic()
        error = stop_then(reader, lambda pid: None, data)
        assert 0.4 < time.monotonic() - start < 6
        assert "video_bytes: decoding took longer than timeout_s = 0.5" in str(error)
        assert hung is not None and gone(hung)
        assert len(reader.read(data, None).frames) == FRAMES


def test_a_request_too_large_for_the_pipe_also_times_out() -> None:
    with new_reader(timeout_s=0.5) as reader:
        error = stop_then(reader, lambda pid: None, bytes(1 << 22))  # the worker never reads it
        assert "timeout_s = 0.5" in str(error)


def test_a_worker_that_died_idle_is_replaced_unnoticed(reader: MediaReader) -> None:
    assert reader.pid is not None
    os.kill(reader.pid, signal.SIGKILL)
    os.waitid(os.P_PID, reader.pid, os.WEXITED | os.WNOWAIT)  # its last thread too
    assert len(reader.read(None, make_clip("wav", seconds=0.1)).waveform) == RATE // 10


def test_memory_is_limited() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (2304, 4096, 3), np.uint8)
    data = make_clip("png-mov", size=(4096, 2304), sound=False, frames=[noise])
    with new_reader(max_memory_bytes=300 << 20) as reader:
        before = reader.pid
        with pytest.raises(MediaError, match="more memory than max_memory_bytes = 314572800"):
            reader.read(data, None)
        assert len(reader.read(make_clip("mp4", seconds=0.5), None).frames) == FRAMES
        assert reader.pid != before


def test_an_interrupt_leaves_no_half_read_answer(reader: MediaReader, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(media, "receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            reader.read(make_clip("mp4", seconds=0.5), None)
    clip = reader.read(None, make_clip("wav", seconds=0.1))
    assert len(clip.frames) == 0 and len(clip.waveform) == RATE // 10


IMPOSSIBLE = {
    "noise": "os.write(1, bytes(64)); time.sleep(60)",
    "text": "print('hello', flush=True); time.sleep(60)",
    "exit": "sys.exit(3)",
    "too large": "text = b'{\"sizes\": [1000000000]}'; os.write(1, len(text).to_bytes(4, 'little') + text)",
    "long header": "os.write(1, b'\\xff\\xff\\xff\\x7f')",
    "too many": "send(out, {'shape': [9, 1, 1], 'notes': []}, [bytes(27), bytes(36), b''])",
    "wrong shape": "send(out, {'shape': [8, 9, 9], 'notes': []}, [bytes(27), bytes(32), b''])",
    "negative": "send(out, {'shape': [-1, -1, 9], 'notes': []}, [bytes(27), bytes(4), b''])",
    "two blobs": "send(out, {'shape': [0, 0, 0], 'notes': []}, [b'', b''])",
    "no shape": "send(out, {'notes': []}, [b'', b'', b''])",
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_answers_that_make_no_sense_are_not_believed(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "taken_over.py").write_text(
        "import io, os, sys, time\nfrom mosear.runtime.media import receive, send\n"
        "out = io.FileIO(1, 'w')\nsend(out, {'ready': True}, [])\n"
        f"receive(io.FileIO(0), 1 << 20)\n{IMPOSSIBLE[name]}\ntime.sleep(60)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(media, "_MODULE", "taken_over")
    with new_reader(timeout_s=5) as reader, pytest.raises(MediaError, match="the decoding process ended"):
        reader.read(None, b"anything")


def test_a_worker_that_cannot_start_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "_MODULE", "no_such_module")
    with pytest.raises(MediaError, match=r"did not start \(exit code 1"):
        new_reader()


def test_threads_take_turns(reader: MediaReader) -> None:
    clips = [make_clip("wav", seconds=0.1 * (i + 1)) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        lengths = list(pool.map(lambda i: len(reader.read(None, clips[i % 4]).waveform), range(16)))
    assert lengths == [RATE // 10 * (i % 4 + 1) for i in range(16)]


def test_what_a_worker_prints_stays_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "noisy.py").write_text("import os\nos.write(2, b'moov atom not found')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(media, "_MODULE", "noisy")
    with pytest.raises(MediaError, match="did not start"):
        new_reader()
    assert capfd.readouterr() == ("", "")


def test_the_worker_is_light(reader: MediaReader) -> None:
    maps = Path(f"/proc/{reader.pid}/maps").read_text()
    assert "libavcodec" in maps
    assert not [name for name in ("torch", "onnxruntime", "scipy", "PIL") if f"/{name}/" in maps]


def test_close_ends_the_worker() -> None:
    reader = new_reader()
    pid = reader.pid
    assert pid is not None and not gone(pid, 0.05)
    reader.close()
    reader.close()
    assert gone(pid) and reader.pid is None
    with pytest.raises(MediaError, match="closed"):
        reader.read(None, b"x")


def orphan(script: str) -> int:
    """Run a parent that makes a reader and runs `script`, kill it, and return its worker's process id."""
    source = f"""
        import os, subprocess, sys, time
        from mosear.runtime.media import MediaLimits, MediaReader
        reader = MediaReader(MediaLimits(), frames=1, sample_rate={RATE})
        {script}
        print(reader.pid, flush=True)
        time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(source)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not gone(pid, 0.05)
        parent.kill()
    return pid


def test_the_worker_ends_with_its_parent() -> None:
    assert gone(orphan(""), 1.0)


def test_the_worker_ends_with_its_parent_though_another_child_holds_its_pipe() -> None:
    sleeper = "subprocess.Popen(['sleep', '4'], close_fds=False, pass_fds=[reader._worker.outbox.fileno()])"
    assert gone(orphan(sleeper), 3.0)


def test_readers_do_not_share_a_worker() -> None:
    with new_reader() as one, new_reader() as other:
        assert one.pid != other.pid
        one.close()
        assert len(other.read(None, make_clip("wav", seconds=0.1)).waveform) == RATE // 10

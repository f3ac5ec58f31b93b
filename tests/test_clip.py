"""The sample clip: readable, in step, nothing cut without saying so."""

import dataclasses
import wave
from pathlib import Path

import av
import numpy as np
import pytest

from mosear.errors import MediaError
from mosear_export.demo.clip import make_clip
from mosear_export.demo.fetch import DemoFiles, Speech

pytestmark = pytest.mark.demo


def test_the_clip_holds_the_whole_sentence_and_as_much_video(demo_files: DemoFiles, tmp_path: Path) -> None:
    clip = make_clip(demo_files, tmp_path / "clip.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]
    with av.open(str(clip.path)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
        assert (video.width, video.height) == (176, 144) and audio.rate == 16000
        shown = [frame.time for frame in container.decode(video)]
        container.seek(0)
        heard = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio)])
    assert len(shown) == 99 and shown[0] == 0 and np.diff(shown) == pytest.approx(1001 / 30000, abs=1e-3)
    with wave.open(str(demo_files.speech[-1].wav)) as file:
        spoken = np.frombuffer(file.readframes(file.getnframes()), np.int16) / 32768
    assert len(spoken) <= len(heard) < len(spoken) + 3 * 1024  # whole AAC frames, and its run-in
    likeness = [np.corrcoef(spoken[:16000], heard[delay : delay + 16000])[0, 1] for delay in range(3 * 1024)]
    assert max(likeness) > 0.95
    assert len(shown) * 1001 / 30000 >= len(spoken) / 16000
    assert "99 of 120" in clip.caption and "two different people" in clip.caption and clip.text in clip.caption


def test_a_sentence_longer_than_the_video_is_refused(demo_files: DemoFiles, tmp_path: Path) -> None:
    longest = demo_files.speech[0]
    files = dataclasses.replace(demo_files, speech=(Speech(wav=longest.wav, text=longest.text),))
    with pytest.raises(MediaError, match="has 120 frames"):
        make_clip(files, tmp_path / "clip.mp4")
    assert not list(tmp_path.iterdir())


def test_a_video_that_cannot_be_read_is_refused(demo_files: DemoFiles, tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video at all")
    with pytest.raises(MediaError, match=r"broken\.mp4 cannot be read"):
        make_clip(dataclasses.replace(demo_files, talking_face=broken), tmp_path / "clip.mp4")

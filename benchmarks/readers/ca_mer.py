"""CA-MER (arXiv 2508.01181): clips whose joint emotion is the video's, the audio's, or both's.

As its users have it: `video-aligned.json`, `audio-aligned.json`, `consistent.json`, each a list of objects with `file_name`,
and the clips as `<subset>/<file_name>.avi`. Under which key the labels stand is not public: give each object `labels`, one
word or a list of words. Metric: open-vocabulary accuracy, recall and their mean.
"""

from collections.abc import Mapping
from pathlib import Path

from mosear.errors import ConfigError
from readers.clips import BenchmarkClip, field, json_of, video_of

SUBSETS = ("video-aligned", "audio-aligned", "consistent")


def read(root: Path) -> list[BenchmarkClip]:
    """Clips of all three subsets; raises ConfigError naming the file and what it lacks."""
    return [clip for subset in SUBSETS for clip in _subset(root, subset)]


def _subset(root: Path, subset: str) -> list[BenchmarkClip]:
    path = root / f"{subset}.json"
    entries = json_of(path)
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path} must hold a list of clips, each an object with file_name and labels")
    clips = []
    for entry in entries:
        name = field(entry, "file_name", path)
        labels = entry.get("labels") if isinstance(entry, Mapping) else None
        words = [labels] if isinstance(labels, str) else labels if isinstance(labels, list) else []
        if not words or not all(isinstance(word, str) and word.strip() for word in words):
            raise ConfigError(f"{path}: {name} has labels {labels!r}: give a word, or a list of words")
        lowered = tuple(word.strip().lower() for word in words)
        clips.append(BenchmarkClip(name=name, video=video_of(root / subset, name), labels=lowered, subset=subset))
    return clips

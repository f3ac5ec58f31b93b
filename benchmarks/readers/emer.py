"""EMER (Lian et al., arXiv 2306.15401): clips with open-vocabulary emotion words, clips in `video/`.

Its users' files differ, so the reader takes a table `emer.csv`: name, labels (words between semicolons or commas). Metric:
label overlap, |said and true| / |true|, mean over clips. (The published overlap is judged by a language model on a scale to
10; it cannot be computed without it, and this is not that figure.)
"""

import re
from pathlib import Path

from mosear.errors import ConfigError
from readers.clips import BenchmarkClip, rows_of, video_of

TABLE = "emer.csv"


def read(root: Path) -> list[BenchmarkClip]:
    """Clips with their words; raises ConfigError where one has none."""
    clips = []
    for row in rows_of(root / TABLE, ("name", "labels")):
        words = tuple(word.strip().lower() for word in re.split(r"[;,]", row["labels"]) if word.strip())
        if not words:
            raise ConfigError(f"{root / TABLE}: {row['name']} has no labels: name its emotions between semicolons")
        clips.append(BenchmarkClip(name=row["name"], video=video_of(root / "video", row["name"]), labels=words))
    return clips

"""DFEW (Jiang et al., ACM MM 2020): five folds, `EmoLabel_DataSplit/test(single-labeled)/set_<fold>.csv` with columns
video_name and label (1 to 7), clips in `DFEW_Clip/` (or `Clip/original/`). Clips without a zero-padded name are found too.

Metrics: WAR (accuracy) and UAR (unweighted recall). Of all folds given, each clip once.
"""

from pathlib import Path

from mosear.errors import ConfigError
from readers.clips import BenchmarkClip, rows_of, video_of

LABELS = ("happy", "sad", "neutral", "angry", "surprise", "disgust", "fear")  # 1 to 7
TABLES = Path("EmoLabel_DataSplit") / "test(single-labeled)"
VIDEOS = (Path("DFEW_Clip"), Path("Clip") / "original")


def read(root: Path) -> list[BenchmarkClip]:
    """Clips of every fold that is there; raises ConfigError where none is, or a label is no number from 1 to 7."""
    tables = sorted((root / TABLES).glob("set_*.csv"))
    if not tables:
        raise ConfigError(f"{root / TABLES} has no set_1.csv to set_5.csv: the layout is in docs/conflict.md")
    folder = next((root / f for f in VIDEOS if (root / f).exists()), root / VIDEOS[0])
    clips = []
    for table in tables:
        for row in rows_of(table, ("video_name", "label")):
            name, number = row["video_name"].strip(), row["label"].strip()
            if number not in map(str, range(1, len(LABELS) + 1)):
                raise ConfigError(f"{table}: {name} has the label {number!r}: a number from 1 to {len(LABELS)}")
            label = LABELS[int(number) - 1]
            clips.append(BenchmarkClip(name=name, video=_video(folder, name), labels=(label,), subset=table.stem))
    return clips


def _video(folder: Path, name: str) -> Path:
    found = video_of(folder, name)
    return found if found.exists() or not name.isdecimal() else video_of(folder, name.zfill(5))

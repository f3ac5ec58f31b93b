"""MER2023 (test3, as Emotion-LLaMA's users have it): `relative_test3_NCEV.txt`, clips in `video/`, `test3/` or
`video_new_test3/`, and where it is there `transcription_en_all.csv` (columns name, and sentence_en or sentence).

A line of the list is: name, number of frames, label, valence, between blanks, such as `samplenew_00000001 125 sad -10`. Metric:
F1 weighted by how often a label is true.
"""

from pathlib import Path

from mosear.errors import ConfigError
from readers.clips import BenchmarkClip, rows_of, video_of

LIST, SPEECH = "relative_test3_NCEV.txt", "transcription_en_all.csv"
VIDEOS = ("video", "test3", "video_new_test3")
LABELS = ("neutral", "angry", "happy", "sad", "worried", "surprise")


def read(root: Path) -> list[BenchmarkClip]:
    """Clips with one label each; raises ConfigError naming the line that cannot be read."""
    path = root / LIST
    try:
        lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error}): the layout is in docs/conflict.md") from error
    if not lines:
        raise ConfigError(f"{path} names no clips")
    folder = next((root / name for name in VIDEOS if (root / name).is_dir()), root / VIDEOS[0])
    said, clips = _speech(root / SPEECH), []
    for number, (name, *rest) in enumerate(lines, 1):
        labels = [part.lower() for part in rest if part.lower() in LABELS]
        if len(labels) != 1:
            raise ConfigError(
                f"{path}, line {number}: {' '.join([name, *rest])!r} names {len(labels)} of {', '.join(LABELS)}"
            )
        clips.append(
            BenchmarkClip(name=name, video=video_of(folder, name), labels=(labels[0],), words=said.get(name, ""))
        )
    return clips


def _speech(path: Path) -> dict[str, str]:
    """What is said in each clip; none where the file is not there."""
    if not path.exists():
        return {}
    rows = rows_of(path, ("name",))
    column = next((name for name in ("sentence_en", "sentence") if name in rows[0]), None)
    if column is None:
        raise ConfigError(f"{path} lacks the column 'sentence_en'; it has {', '.join(rows[0])}")
    return {row["name"]: row[column] for row in rows}

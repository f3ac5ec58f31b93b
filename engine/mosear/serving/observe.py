"""What a running Triton Server shows from outside: its models' processes in /proc, and its reasons in the log."""

import json
import re
from pathlib import Path

from mosear.serving.installation import STUB

SHOWN = 4  # models and, of each, lines: what it raised and where
NO_REASONS = ("CudaDriverHelper has not been initialized", "unable to create stream for", "failed to stop server")
# E1124 14:37:48.226360 15067 server.cc:241] "CudaDriverHelper has not been initialized."
_ERROR = re.compile(r"^[EF]\d{4} [\d:.]+ \d+ [\w.]+:\d+\] (.+)$", re.MULTILINE)


def stubs_of(server: int) -> dict[int, str]:
    """Model by process, of the server's children that run one."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            status = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_text(errors="replace").split("\0")
        except OSError:  # it ended meanwhile
            continue
        if status[0] not in "ZX" and int(status[1]) == server and Path(command[0]).name == STUB:
            found[int(folder.name)] = Path(command[1]).parts[-3]  # .../MODEL/VERSION/FILE
    return found


def group_runs(group: int) -> bool:
    """Is a process of this group there that has not ended?"""
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            state, _, found = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it ended meanwhile
            continue
        if int(found) == group and state not in "ZX":
            return True
    return False


def reason_in(log: str) -> str:
    """Why a server did not start or went down: what it says of models that failed, else its errors, else its last lines."""
    errors = [_plain(text) for text in _ERROR.findall(log) if not any(words in text for words in NO_REASONS)]
    failed = [text for text in errors if "failed to load '" in text or "Poll failed" in text]
    texts = [_first_lines(text) for text in (failed or errors)[-SHOWN:]]
    ends = [line for line in log.splitlines() if line.strip() and not line.startswith(("|", "+"))]
    return "\n".join(texts or ends[-SHOWN:]) or "its log is empty"


def _first_lines(text: str) -> str:
    return "\n".join([line for line in text.splitlines() if line.strip()][:SHOWN])


def _plain(text: str) -> str:
    """Triton writes its words as a JSON string, in which a traceback's lines are one."""
    try:
        return str(json.loads(text))
    except ValueError:
        return text

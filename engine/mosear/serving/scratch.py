"""What a server makes on the machine while it runs: a folder, shared memory, and what Triton forgets; removed at its end."""

import fcntl
import shutil
import tempfile
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
NAME = "mosear-serve-"
LOCK, FORGOTTEN = "lock", "forgotten"
# The Python backend makes one for each server in this very place, and leaves it there after an unclean end.
ENVIRONMENTS = (Path("/tmp"), "python_env_*")


class Scratch:
    """A private folder, whose name is also the prefix of its server's shared memory regions.

    The folder is locked while its process lives. Where that was killed, the next server to start removes what it left.
    """

    def __init__(self) -> None:
        for lock in Path(tempfile.gettempdir()).glob(f"{NAME}*/{LOCK}"):
            _sweep(lock)
        self.folder = Path(tempfile.mkdtemp(prefix=NAME))
        self._before = _environments()
        # Locked before it has its name, so that no sweep finds it free.
        draft = self.folder / f".{LOCK}"
        self._lock = draft.open("wb")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        draft.rename(self.folder / LOCK)

    @property
    def prefix(self) -> str:
        return f"{self.folder.name}-"

    def note(self) -> None:
        """Remember what Triton made since: called once it has started, as servers that start later make theirs."""
        (self.folder / FORGOTTEN).write_text("\n".join(sorted(_environments() - self._before)))

    def close(self, *, clean: bool = False) -> None:
        """Remove every trace. `clean`: the server ended by itself and has removed its own; what was noted beside them is
        another's, which started at the same time and would abort at its end."""
        if clean:
            (self.folder / FORGOTTEN).unlink(missing_ok=True)
        _remove(self.folder)
        self._lock.close()


def _environments() -> set[str]:
    root, pattern = ENVIRONMENTS
    return {str(path) for path in root.glob(pattern)}


def _sweep(lock: Path) -> None:
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(lock.parent)
    except OSError:  # its server runs, or another user's did
        return


def _remove(folder: Path) -> None:
    for region in SHARED_MEMORY.glob(f"{folder.name}-*"):
        region.unlink(missing_ok=True)
    noted = folder / FORGOTTEN
    for name in noted.read_text().splitlines() if noted.exists() else ():
        if Path(name).is_dir() and not any(Path(name).iterdir()):
            Path(name).rmdir()
    shutil.rmtree(folder, ignore_errors=True)

#!/usr/bin/env bash
# Make the virtual environment .venv from pinned requirements. Says what it does; a second run does only what changed.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*"; }
lack() { printf 'setup: this machine lacks %s; install the package with: apt-get install %s\n' "$1" "$2" >&2; }

python=$(command -v python3.11 || command -v python3 || true)
if [ -z "$python" ]; then lack "Python 3.11" "python3"; exit 1; fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    say "$python is $("$python" --version): Python 3.11 or newer is needed" >&2
    exit 1
fi
if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then lack "the venv module" "python3-venv"; exit 1; fi
if ! "$python" - <<'PY'
import ctypes, sys, sysconfig
from pathlib import Path
name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
try:
    ctypes.CDLL(name)
except OSError:
    sys.exit(not Path(sysconfig.get_config_var("LIBDIR") or "", name).exists())
PY
then say "note: no shared libpython (package libpython3.11): answering works, Triton Server will need it"; fi

if [ ! -x .venv/bin/python ]; then
    say "making .venv with $python"
    "$python" -m venv .venv
fi
wanted=$(cat requirements/*.txt pyproject.toml scripts/setup.sh | sha256sum | cut -d' ' -f1)
if [ "$(cat .venv/requirements.sha256 2>/dev/null || true)" = "$wanted" ]; then
    say ".venv is fresh"
    exit 0
fi
say "installing requirements/dev.txt (about a minute, 2 GB)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/dev.txt
say "installing this project, editable"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
echo "$wanted" > .venv/requirements.sha256
say "done; try: .venv/bin/mosear doctor"

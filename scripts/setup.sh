#!/usr/bin/env bash
# Make .venv with everything pinned, and the project itself in it, editable. Safe to run again: a fresh .venv is left alone.
#   scripts/setup.sh [python]      python: the interpreter to build on, default python3.11
set -euo pipefail
cd "$(dirname "$0")/.."

readonly PYTHON="${1:-python3.11}"
readonly VERSION="3.11"
readonly VENV=".venv"
readonly STAMP="$VENV/.setup-stamp"
readonly TTSEM="ttsem==0.1.0"  # runs Triton kernels on a CPU and reports faulty accesses
# TensorRT's Python bindings without its library, which no index but NVIDIA's has, and its C++ headers: for tests of plugins
readonly BINDINGS=("tensorrt-cu13-bindings==11.4.0.106" "tensorrt-cu13==11.4.0.106" "kernel-lens==2.0.1")
readonly FREE_MB=5000 # the CPU environment takes 3 GB, as much again while wheels are unpacked

say() { echo "setup: $*"; }
fail() {
    echo "setup: ERROR: $*" >&2
    exit 1
}

# Hash of all that decides what .venv holds, and of where it lies (a moved environment is broken).
wanted_stamp() {
    { cat requirements/serve.txt requirements/dev.txt pyproject.toml scripts/setup.sh && pwd -P && uname -sm; } |
        sha256sum | cut -d' ' -f1
}

# Does this Python find that shared library?
finds() {
    "$1" -c 'import ctypes, sys; ctypes.CDLL(sys.argv[1])' "$2" 2>/dev/null
}

# The shared libpython on the loader's path, or beside the interpreter.
finds_libpython() {
    local folder
    folder="$("$1" -c 'import sysconfig; print(sysconfig.get_config_var("LIBDIR") or "")')"
    finds "$1" "libpython$VERSION.so.1.0" || [[ -e "$folder/libpython$VERSION.so.1.0" ]]
}

check_machine() {
    command -v "$PYTHON" >/dev/null && "$PYTHON" -c '' 2>/dev/null ||
        fail "$PYTHON is not there. Debian 12, Ubuntu 22.04: apt-get install python$VERSION python$VERSION-venv." \
            "Where the system has another Python, name one: make setup PYTHON=/path/to/python$VERSION"
    local found
    found="$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
    [[ "$found" == "$VERSION" ]] ||
        fail "$PYTHON is Python $found; the pinned versions are for $VERSION. Name one: make setup PYTHON=python$VERSION"
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$PYTHON cannot make environments: apt-get install python$VERSION-venv"
    finds "$PYTHON" libstdc++.so.6 ||
        fail "libstdc++.so.6 is not there, which torch and onnxruntime load: apt-get install libstdc++6"
    finds_libpython "$PYTHON" ||
        fail "libpython$VERSION.so.1.0 is neither on the loader's path nor beside $PYTHON, and the server's models need it:" \
            "apt-get install libpython$VERSION (an interpreter of your own: build it with --enable-shared)"
    [[ -e /etc/ssl/certs/ca-certificates.crt || -e /etc/ssl/cert.pem || -n "$(ls -A /etc/ssl/certs 2>/dev/null)" ]] ||
        say "WARNING: no certificates in /etc/ssl/certs. If downloads fail: apt-get install ca-certificates"
    local free
    free="$(df -Pm . | awk 'NR == 2 {print $4}')"
    ((free >= FREE_MB)) || say "WARNING: $free MB free here; an environment takes up to $FREE_MB MB (CUDA torch: more)"
    say "machine: $(uname -sm), Python $("$PYTHON" -c 'import platform; print(platform.python_version())'), $free MB free"
}

make_environment() {
    if [[ -x "$VENV/bin/python" ]] && "$VENV/bin/python" -c "import pip, sys; sys.exit(sys.prefix != '$PWD/$VENV')" 2>/dev/null &&
        [[ "$("$VENV/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" == "$VERSION" ]]; then
        say "$VENV: there"
    else
        say "$VENV: making it"
        rm -rf "$VENV"
        "$PYTHON" -m venv "$VENV"
    fi
}

install() {
    local -a pip=("$VENV/bin/python" -m pip --disable-pip-version-check --no-input install --quiet)
    say "packages: $(cat requirements/serve.txt requirements/dev.txt | grep -c ==) exact versions (some minutes the first time)"
    "${pip[@]}" -r requirements/dev.txt
    # It names Python 3.12 as its least, and runs on 3.11: our tests of kernels are the proof.
    "${pip[@]}" --no-deps --ignore-requires-python "$TTSEM"
    "${pip[@]}" --no-deps "${BINDINGS[@]}"
    say "project: editable, without a change to the packages"
    "${pip[@]}" --no-deps --no-build-isolation --editable .
    say "check: $("$VENV/bin/python" -m pip --disable-pip-version-check check | grep -v tensorrt-cu13-libs)"
    "$VENV/bin/python" -c 'import mosear, mosear_export, torch; print(f"setup: torch {torch.__version__}, GPU: {torch.cuda.is_available()}")'
}

main() {
    local wanted
    wanted="$(wanted_stamp)"
    if [[ -f "$STAMP" && "$(<"$STAMP")" == "$wanted" ]] && "$VENV/bin/python" -c 'import mosear, mosear_export' 2>/dev/null; then
        say "$VENV is fresh"
        return
    fi
    check_machine
    make_environment
    rm -f "$STAMP"
    install
    echo "$wanted" >"$STAMP"
    say "done: try .venv/bin/mosear doctor"
}

main

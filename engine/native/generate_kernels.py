"""Compiles what the native libraries embed, for CMake: generate_kernels.py OUT ARCHS (comma-separated)."""

import sys
from pathlib import Path

from mosear.errors import MosearError
from mosear.kernels.catalogue import MODULES
from mosear_export.kernels import export_kernels, parse_archs

PLUGIN_CASES = "mosear.kernels.plugins.cases"

if __name__ == "__main__":
    try:
        export_kernels(parse_archs(sys.argv[2]), Path(sys.argv[1]), print, modules=(*MODULES, PLUGIN_CASES))
    except MosearError as error:
        sys.exit(f"generate_kernels.py: {error}")

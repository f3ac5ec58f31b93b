"""Build an engine: `python export/build_engine.py --recipe export/recipes/cpu-fp32.toml` (the default recipe)."""

import sys

from mosear.cli import main

if __name__ == "__main__":
    sys.exit(main(["build", *sys.argv[1:]]))

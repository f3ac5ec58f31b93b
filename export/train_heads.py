"""Train the demo heads: `python export/train_heads.py --data DIR` (layout: mosear_export/training/features.py).

Every setting of TrainConfig can be given as --set NAME=VALUE, or in a TOML file. A stopped training goes on at the same call.
"""

import argparse
import dataclasses
import sys
import tomllib
from pathlib import Path

from mosear.config import parse
from mosear.errors import ConfigError, MosearError
from mosear_export.inputs import DEMO_HEADS as HEADS
from mosear_export.training.run import train_heads
from mosear_export.training.train import TrainConfig


def settings(file: Path | None, given: list[str]) -> TrainConfig:
    """The file's settings, then those given as NAME=VALUE in TOML; raises ConfigError."""
    try:
        data = {} if file is None else tomllib.loads(file.read_text())
        data |= tomllib.loads("\n".join(given))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            f"{file or 'the settings'}: not TOML: {error}; write such as steps=100 or start='random'"
        ) from error
    return parse(TrainConfig, data, where=str(file or "--set"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with voices/ and faces/")
    parser.add_argument(
        "--work", type=Path, default=Path("build/training"), help="what is kept between calls (%(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, default=HEADS, help="heads file; results go beside it (default: the demo's)"
    )
    parser.add_argument("--config", type=Path, help="TOML file of TrainConfig's settings")
    defaults = ", ".join(f"{f.name}={getattr(TrainConfig(), f.name)}" for f in dataclasses.fields(TrainConfig))
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help=f"defaults: {defaults}")
    options = parser.parse_args()
    try:
        config = settings(options.config, options.set)
        train_heads(options.data, options.work, options.output, config, lambda line: print(line, flush=True))
    except MosearError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Write results into a model card: `python benchmarks/accuracy_card.py RESULTS.json CARD.md [SUBJECT]`.

What stands between the two markers is replaced; all else is the author's.
"""

import json
import sys
from pathlib import Path

from accuracy_bars import bars
from accuracy_report import text

from mosear.errors import ConfigError, MosearError

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def filled(card: str, results: Path, subject: str) -> str:
    """The card with these results; raises ConfigError where markers or the subject are missing."""
    try:
        found = json.loads(results.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{results} cannot be read as results: {error}") from error
    if subject not in found:
        raise ConfigError(f"{results} has no results of {subject!r}: name one of {', '.join(found)}")
    head, begin, rest = card.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"the card lacks its markers {BEGIN} and {END}: add them where the results go")
    result = found[subject]
    machine = f"Measured on {result['machine']['cpu']}, {result['machine']['date'][:10]}, through the {subject}."
    lines = text(subject, result, bars(result, default=result["settings"]["default strength"]))[2:]
    return "\n".join([f"{head}{BEGIN}", machine, "", *lines]).rstrip() + f"\n{END}{tail}"


def main(arguments: list[str]) -> int:
    if len(arguments) not in (2, 3):
        print(__doc__, file=sys.stderr)
        return 2
    card = Path(arguments[1])
    try:
        card.write_text(filled(card.read_text(), Path(arguments[0]), arguments[2] if len(arguments) > 2 else "engine"))
    except (MosearError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

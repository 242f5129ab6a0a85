"""Put the results of gpu-check into docs/performance.md, in place of those of an earlier one.

python tools/gpu_results.py output/gpu-check/results.jsonl [--page PAGE]
"""

import argparse
import sys
from pathlib import Path

from gpu_support import FAILED, REHEARSAL, REPOSITORY, Results

sys.path.insert(0, str(REPOSITORY))

from ssd_fast.files import write_atomically

BEGIN, END = "<!-- gpu-check: written by tools/gpu_results.py -->\n", "<!-- end of gpu-check -->\n"


def fill(page: Path, results: Results) -> None:
    """Replace the part of a page between its two marks. Raises ValueError where there is nothing to put there."""
    if not any(results.sections.values()):
        raise ValueError(f"{results.path}: holds no rows")
    if results.environment.get("device", REHEARSAL) == REHEARSAL:
        raise ValueError(f"{results.path}: is of a rehearsal on a CPU, expected measurements of a GPU")
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page}: expected the lines {BEGIN.strip()} and {END.strip()}")
    write_atomically(page, (before + begin + measured_section(results) + end + after).encode())


def measured_section(results: Results) -> str:
    """Heading, versions, and a table for each section that ran."""
    environment = dict(results.environment)
    lines = ["## Measured on a GPU", "", f"{environment.pop('device')}, "]
    lines[-1] += ", ".join(f"{name} {value}" for name, value in environment.items()) + "; `make gpu-check`."
    for section, rows in results.sections.items():
        lines += ["", f"**{section}**", "", "| what | measured | target | verdict |", "|---|---|---|---|"]
        for row in rows:
            verdict = row.verdict.replace(FAILED, "missed", 1) if row.target else row.verdict
            cells = (cell.strip().replace("|", "\\|") for cell in (row.what, row.measured, row.target, verdict))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--page", type=Path, default=REPOSITORY / "docs" / "performance.md")
    given = parser.parse_args()
    try:
        given.results.stat()
        fill(given.page, Results(given.results))
    except (ValueError, OSError) as error:
        print(f"gpu_results: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

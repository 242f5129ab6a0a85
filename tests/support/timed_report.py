"""Read the report of a timed evaluation."""

import re


def printed_seconds(report: str) -> dict[str, float]:
    """Return the seconds of each part, by name."""
    return {name: float(value) for name, value in re.findall(r"^(\w[\w -]*?) +(\d+\.\d{3}) +[\d.]+%", report, re.M)}

"""Figures as text, the same in every table of a profile."""


def count(quantity: int, noun: str) -> str:
    """A number of things: "1 rank", "2 ranks"."""
    return f"{quantity:,} {noun}{'' if quantity == 1 else 's'}"


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds, without the unit."""
    return f"{1e3 * seconds:,.2f}"


def number(value: float) -> str:
    """Four digits, or all those before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def ratio(value: float) -> str:
    """A ratio as text: "1.25x"."""
    return f"{value:.2f}x"


def flop_rate(value: float) -> str:
    """Operations per second, with the unit."""
    return f"{value / 1e12:,.1f} TFLOP/s" if value >= 1e12 else f"{value / 1e9:,.1f} GFLOP/s"


def byte_rate(value: float) -> str:
    """Bytes per second, with the unit."""
    return f"{value / 1e9:,.1f} GB/s"


def shortened(text: str, length: int) -> str:
    """A text of at most `length` characters."""
    return text if len(text) <= length else text[: length - 1] + "…"

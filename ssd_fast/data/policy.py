"""Bad data: its error, and the policies of data.bad_images and data.bad_boxes."""

import logging
from collections.abc import Sequence
from typing import Literal

logger = logging.getLogger(__name__)

Policy = Literal["error", "skip"]
_SHOWN = 5


class DataError(ValueError):
    """Annotations or images that cannot be used; the message names the file and what was expected."""


def apply_policy(problems: Sequence[str], policy: Policy | None, what: str, key: str) -> None:
    """Raise DataError for the first problem under "error" or None; log the first few under "skip".

    policy: None where there is no recipe whose setting could be changed.
    problems: one text for each thing that cannot be used. what: its plural. key: the setting in the section "data".
    """
    if not problems:
        return
    if policy != "skip":
        more = f" (and {len(problems) - 1} more {what})" if len(problems) > 1 else ""
        hint = f'; data.{key} = "skip" would leave such {what} out' if policy else ""
        raise DataError(f"{problems[0]}{more}{hint}")
    shown = "".join(f"\n  {problem}" for problem in problems[:_SHOWN]) + ("\n  …" if len(problems) > _SHOWN else "")
    logger.warning("left out %d %s:%s", len(problems), what, shown)

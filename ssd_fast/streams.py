"""Standard output that can no longer be written."""

import os
import sys


def flush_output() -> None:
    """Write out standard output before Python does, which would end with a traceback.

    A reader that has enough, such as `head`, is no error. Exits with status 1 and a line on stderr for a full disk.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python's own flush must not fail again
        if not isinstance(error, BrokenPipeError):
            sys.exit(f"error: standard output: {error.strerror}")

"""How the threads of PyTorch's CPU operators wait for each other."""

import os


def wait_briefly() -> None:
    """Let waiting threads spin for less than a millisecond, then sleep, unless OMP_WAIT_POLICY says something else.

    To be called before torch is imported. Threads that sleep at once are slow to wake, above all in virtual machines;
    those that spin for longer, the default of GNU's OpenMP, take cores from the input pipeline and from other ranks.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "ACTIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")

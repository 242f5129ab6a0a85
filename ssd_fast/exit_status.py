"""Exit statuses of the command line. A mistyped command ends with 2, which typer sets."""

ERROR = 1  # the last line on stderr says what is wrong
INVALID = 1  # `benchmark`: LoadGen calls the result invalid
NOT_REACHED = 3  # `evaluate --target`: the mAP is below the target
INTERRUPTED = 130  # Ctrl-C
SIGNALLED = 128  # `train`: this and the number of the signal that stopped the run

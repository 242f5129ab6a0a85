"""Names of the timed parts of a step, of the input and of an evaluation, as people read them."""

INPUT = "waiting for input"
FORWARD, LOSS, BACKWARD, ALLREDUCE, OPTIMIZER = "forward", "loss", "backward", "allreduce", "optimizer"
STEP_PARTS = (FORWARD, LOSS, BACKWARD, ALLREDUCE, OPTIMIZER)  # in this order; allreduce is what backward did not hide

PREPROCESSING, MODEL, DECODING = "pre-processing", "model", "decoding and NMS"

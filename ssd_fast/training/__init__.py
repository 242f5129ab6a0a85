"""A training run.

In: a recipe, a data folder. Out: a folder of checkpoints, history, curves and logs.
May be imported by profiling and the command line; imports evaluation and the rooms below.
"""

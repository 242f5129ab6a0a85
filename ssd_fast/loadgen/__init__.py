"""Measurement of the detector by MLPerf LoadGen.

In: a detector, images, and the settings of a scenario. Out: LoadGen's logs, the figures in them, and a table of these.
May be imported by the command line only; imports evaluation and the rooms below.
"""

"""MLPerf LoadGen's measurement of the detector.

In: a Detector and LoadGen's settings. Out: LoadGen's logs and what they say.
May be imported by the command line only; imports evaluation and the rooms below.
"""

"""Profiles of a run: the time of its parts, and what bounds it.

In: a recipe and its data, or a saved profile. Out: a Profile, its verdict, a table, a page.
May be imported by the command line only; imports training, evaluation and the rooms below.
"""

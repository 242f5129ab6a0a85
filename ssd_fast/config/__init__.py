"""The configuration of a run, and the recipes that it is read from.

In: TOML files, changes by --set. Out: a Config, frozen and validated, with one section for each part of the program.
May be imported by every room above; imports dali_pipelines, for the section of the augmentation.
"""

"""Data sets: COCO files and images, checked, and the loaders of a recipe.

In: a recipe and a data folder. Out: CocoSet, TrainLoader, EvalLoader.
May be imported by every room above; imports dali_pipelines, distributed, model and the leaves.
"""

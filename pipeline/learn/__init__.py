"""Batches become a model that is honest about rare classes.

In: batches of uint8 images and labels, class counts of the training split. Out: a fitted network, predictions, recall
per class and per group of classes (many-, medium-, few-shot). Guarantees: a class without a test image counts neither
as wrong nor as right; groups follow the training counts before any resampling. ``metrics`` needs numpy only, ``train``
needs torch.
"""

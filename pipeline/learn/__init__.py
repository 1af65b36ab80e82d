"""Batches become a model that is honest about rare classes.

In: batches of uint8 images and labels, class counts of the training split. Out: a fitted network, predictions, recall
per class and per group of classes (many-, medium-, few-shot). Guarantees: a class without a test image counts neither
as wrong nor as right; groups follow the training counts before any resampling; only ``losses``, ``gather`` and
``train`` need torch.

Inside, in this order:
    metrics.py      labels and predictions -> accuracy, recall by class and group, kappa
    ranking.py      scores -> AUROC, sensitivity at a specificity, calibration error
    intervals.py    bootstrap
    priors.py       which prior logits carry, Bayes' rule to another, EM, temperature
    predictions.py  a file of predictions -> the images of a split
    evaluation.py   all of it -> what `evenshard evaluate` tells
    losses.py       what is minimised, fed by a manifest
    gather.py       predictions of all ranks together
    train.py        a small network
"""

"""Batches become a model that is honest about rare classes.

In: batches of uint8 images and labels, class counts of the training split. Out: a fitted network, predictions, recall
per class and per group of classes (many-, medium-, few-shot). Guarantees: a class without a test image counts neither
as wrong nor as right; groups follow the training counts before any resampling; only ``losses``,
``gather``, ``train`` and a training need torch.

Inside, in this order:
    metrics.py      labels and predictions -> accuracy, recall by class and group, kappa
    ranking.py      scores -> AUROC, sensitivity at a specificity, calibration error
    intervals.py    bootstrap
    scores.py       scores too many to copy, a block at a time -> what each image is taken for
    priors.py       which prior logits carry, Bayes' rule to another, EM; calibration.py, temperature
    prediction_files.py  CSV or Parquet -> keys, labels or scores
    predictions.py  the rows of a file -> the images of a split
    variants.py     predictions as given and corrected -> figures
    evaluation.py   all of it -> what `evenshard evaluate` tells
    losses.py       what is minimised, fed by a manifest
    gather.py       predictions of all ranks together
    train.py        a small network

A training (``trainer.train``) is, in this order:
    recipe.py       names and numbers, checked before anything is opened; no torch
    ranks.py        which rank this is, and what ranks tell each other
    models.py       torchvision's models, their heads; objectives.py, the loss of a stage and the prior it leaves
    stepping.py     a step; trainer.py, the steps of all stages; stopping.py, signals
    checkpoints.py  whole or not there; ledger.py, numbers as they come
    scoring.py      every sample of a split once, on any number of ranks
    predicting.py   the logits as a file, and how it is evaluated; summing.py, the summary
"""

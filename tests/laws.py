"""The promises of DESIGN.md, section 2, each as one function that asserts it of whatever it is given.

The epoch laws E1-E4b take an epoch function (or the class ids it gave), images per class and targets. They recompute
everything they compare from those, by counting.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.plan.epoch import EpochFunction

I64 = NDArray[np.int64]
Ids = NDArray[np.integer[Any]]


def exact(function: EpochFunction, targets: I64, epoch: int) -> None:
    """E1: the positions of this epoch hold class c exactly T_c times."""
    begin, end = function.epoch_start(epoch), function.epoch_start(epoch + 1)
    assert end - begin == function.num_draws(epoch) == targets.sum()
    assert np.array_equal(np.bincount(function.draws(begin, end).class_id, minlength=len(targets)), targets)


def even(function: EpochFunction, pool: I64, cuts: list[int]) -> None:
    """E2: at each of these positions, images of one class were drawn equally often since 0, or some of them once more.

    Every repeat number met on the way is what counting says.
    """
    image_start = np.cumsum(pool) - pool
    drawn = np.zeros(pool.sum(), np.int64)
    at = 0
    for cut in sorted(cuts):
        draws = function.draws(at, cut)
        ordinal, repeat = function.images(draws.class_id, draws.draw)
        assert ((ordinal >= 0) & (ordinal < pool[draws.class_id])).all()
        images = image_start[draws.class_id] + ordinal
        assert np.array_equal(repeat, drawn[images] + _earlier_equals(images))
        drawn += np.bincount(images, minlength=len(drawn))
        _assert_level(drawn, image_start[pool > 0])
        at = cut


def covers(function: EpochFunction, pool: I64, targets: I64, epoch: int) -> None:
    """E2: ceil(n/T) epochs from epoch 0, ceil(1.5 n/T) from any other, show every image of a class with a target."""
    num_epochs = -(-pool // np.maximum(targets, 1)) if epoch == 0 else -(-3 * pool // np.maximum(2 * targets, 1))
    begin = function.epoch_start(epoch)
    for length in np.unique(num_epochs[targets > 0]):
        draws = function.draws(begin, function.epoch_start(epoch + int(length)))
        ordinal, _ = function.images(draws.class_id, draws.draw)
        for class_id in np.flatnonzero((num_epochs == length) & (targets > 0)):
            shown = np.unique(ordinal[draws.class_id == class_id])
            assert len(shown) == pool[class_id], (epoch, class_id, len(shown), pool[class_id])


def balanced(class_id: Ids, targets: I64) -> None:
    """E3: after any m draws of the epoch, class c was drawn m*T_c/M times, give or take 2 + 3*sqrt(K)*T_c/M."""
    share = targets / targets.sum()
    bound = 2 + 3 * np.sqrt(np.count_nonzero(targets)) * share
    place = np.argsort(class_id, kind="stable")  # positions in the epoch, class by class
    owner = class_id[place]
    j = np.arange(len(place)) - (np.cumsum(targets) - targets)[owner]
    # Between its draws a class only falls behind, so the extremes lie just before and just after each of them.
    before, after = j - place * share[owner], j + 1 - (place + 1) * share[owner]
    worst = np.maximum(np.abs(before), np.abs(after)) - bound[owner]
    assert worst.max() <= 0, (int(owner[worst.argmax()]), float(worst.max()))


def apart_on_the_clock(function: EpochFunction, pool: I64, targets: I64, first_epoch: int = 0) -> None:
    """E4: two draws of one image are a quarter of its mean gap apart. ``targets`` are those of each epoch, [E, K]."""
    time, images, epochs = _timeline(function, pool, targets, first_epoch)
    order = np.lexsort((time, images))
    same = images[order][1:] == images[order][:-1]
    first, second = order[:-1][same], order[1:][same]
    owner = np.searchsorted(np.cumsum(pool), images[first], side="right")
    largest = _largest_between(targets, epochs[first], epochs[second], owner)
    assert len(first)
    assert ((time[second] - time[first]) * 4 >= pool[owner] / largest * (1 - 1e-9)).all()


def apart_in_positions(class_id: Ids, images: I64, gap: NDArray[np.floating[Any]]) -> None:
    """E4: in positions, two draws of an image of mean gap g are at least g/4 - 3*sqrt(g) apart. ``gap`` is by class."""
    distance, owner = gaps(class_id, images)
    assert len(distance)
    assert (distance >= gap[owner] / 4 - 3 * np.sqrt(gap[owner])).all()


def gaps(class_id: Ids, images: I64) -> tuple[I64, Ids]:
    """Positions between successive draws of one image (numbered across classes), and the class of each."""
    order = np.argsort(images, kind="stable")
    same = images[order][1:] == images[order][:-1]
    return np.diff(order)[same], class_id[order][1:][same]


def mixed(class_id: Ids, batch: int, num_classes: int, seed: int) -> None:
    """E4b: pairs of classes meet in batches about as often as under a random order of the same draws.

    var(z) of the pair counts is at most 1.35 times that of random orders, and max abs(z) at most 1.5 times the largest
    of five: where two rare classes are expected to meet never, one chance meeting is a large z.
    """
    z = meetings(class_id, batch, num_classes)
    rng = np.random.default_rng(seed)
    random = [meetings(rng.permutation(class_id), batch, num_classes) for _ in range(5)]
    var, largest = np.mean([r.var() for r in random]), np.max([np.abs(r).max() for r in random])
    assert z.var() <= 1.35 * var, (z.var(), var)
    assert np.abs(z).max() <= 1.5 * largest, (np.abs(z).max(), largest)


def meetings(class_id: Ids, batch: int, num_classes: int) -> NDArray[np.float64]:
    """z of how many batches hold both classes, for each pair, given the share of batches that hold each of the two."""
    num = len(class_id) // batch
    present = np.zeros((num, num_classes), np.float32)
    present[np.repeat(np.arange(num), batch), class_id[: num * batch]] = 1
    a, b = np.triu_indices(num_classes, 1)
    share = present.mean(0, dtype=np.float64)
    expected = share[a] * share[b]
    both = (present.T @ present)[a, b].astype(np.float64)
    open_ = (expected > 0) & (expected < 1)
    return (both - num * expected)[open_] / np.sqrt(num * expected * (1 - expected))[open_]


def _earlier_equals(values: I64) -> I64:
    """For each element, how many before it are equal to it."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    begins = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])) if len(values) else np.empty(0, np.int64)
    lengths = np.diff(np.append(begins, len(values)))
    earlier = np.empty(len(values), np.int64)
    earlier[order] = np.arange(len(values)) - np.repeat(begins, lengths)
    return earlier


def _assert_level(drawn: I64, starts: I64) -> None:
    highest, lowest = np.maximum.reduceat(drawn, starts), np.minimum.reduceat(drawn, starts)
    assert (highest - lowest <= 1).all(), int((highest - lowest).max())


def _timeline(
    function: EpochFunction, pool: I64, targets: I64, first_epoch: int
) -> tuple[NDArray[np.float64], I64, I64]:
    """Clock time (in epochs), image (numbered across classes) and epoch of every draw of these epochs."""
    parts: list[tuple[NDArray[np.float64], I64, I64]] = []
    for i in range(len(targets)):
        epoch = first_epoch + i
        draws = function.draws(function.epoch_start(epoch), function.epoch_start(epoch + 1))
        ordinal, _ = function.images(draws.class_id, draws.draw)
        time = i + function.ticks(epoch, draws.class_id, draws.draw) / 2.0**62
        parts.append((time, (np.cumsum(pool) - pool)[draws.class_id] + ordinal, np.full(len(ordinal), i)))
    time, images, epochs = (np.concatenate(column) for column in zip(*parts, strict=True))
    return time, images, epochs


def _largest_between(targets: I64, first: I64, second: I64, owner: I64) -> I64:
    """The largest target of a class over epochs first..second, both included."""
    largest = np.zeros(len(owner), np.int64)
    for i in range(len(targets)):
        within = (first <= i) & (i <= second)
        largest[within] = np.maximum(largest[within], targets[i][owner[within]])
    return largest

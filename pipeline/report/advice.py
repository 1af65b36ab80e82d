"""What to do next: sentences that follow from the numbers, each with the number that set it off.

Comes in: ``Facts``. Goes out: a list of ``Advice``, most urgent first. Guarantees: a pure function with its thresholds
written here; commands in it are ones that this version has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pipeline.ingest.stats import Description
from pipeline.report.numbers import Coverage, Draws
from pipeline.report.survey import Survey
from pipeline.report.words import counted, num_bytes, percent, times
from pipeline.schema import Reason

TOLERABLE_IMBALANCE = 10
"""Networks tolerate 10:1 (DESIGN, section 7)."""

TOLERABLE_REPEAT = 10
"""`oversampled`, one of the four defaults, stops here: beyond, an image is learned by heart."""

FEW_HELD_OUT = 5
"""With fewer images outside train, one of them moves the recall of its class by 20 points or more."""

LARGE_SIDE = 1024
"""Twice what common networks see: decoding it costs more than training needs."""

TOLERABLE_DAMAGE = 0.01
"""Of the files of the source."""

_COPIES = (Reason.DUPLICATE_OF, Reason.LABEL_CONFLICT, Reason.DUPLICATE_ROW)


@dataclass(frozen=True)
class Advice:
    """``urgent``: a number is wrong until this is done. ``command`` may be ''."""

    title: str
    text: str
    command: str = ""
    urgent: bool = False


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything that advice may depend on."""

    trained: Description  # of the training images
    covered: Coverage
    draws: list[Draws]
    reasons: Mapping[str, int]
    num_images: int
    survey: Survey
    num_vanished: int = 0  # classes that the snapshot before had
    num_moved: int = 0  # images that changed their split


def what_next(facts: Facts) -> list[Advice]:
    """All that applies; urgent ones first."""
    rules = (_moved, _vanished, _conflicts, _mixed_groups, _damaged, _untrained, _no_evaluation, _not_evaluable)
    rules += (_imbalance, _repeats, _rotation, _small_test, _large_images)
    told = [advice for rule in rules for advice in rule(facts)]
    if not told:
        told.append(
            Advice("Train", "Nothing in these numbers stands in the way: classes are even and can be measured.")
        )
    return sorted(told, key=lambda advice: not advice.urgent)


def _moved(facts: Facts) -> Iterator[Advice]:
    if count := facts.num_moved:
        text = (
            f"{counted(count, 'image')} changed the split since the snapshot before: the source says so. A model of an "
            "older snapshot may have trained on what is now test: its scores on this one are not comparable."
        )
        yield Advice("Train again from scratch", text, "evenshard diff ROOT", urgent=True)


def _vanished(facts: Facts) -> Iterator[Advice]:
    if count := facts.num_vanished:
        has = "has" if count == 1 else "have"
        text = f"{counted(count, 'class', 'classes')} of the snapshot before {has} no image any more."
        yield Advice("Look for lost classes", text, "evenshard diff ROOT", urgent=True)


def _conflicts(facts: Facts) -> Iterator[Advice]:
    if count := facts.reasons.get(Reason.LABEL_CONFLICT, 0):
        text = (
            f"The bytes of {counted(count, 'file')} stand under two labels. All copies are out until one label is "
            "left; they are shown below."
        )
        yield Advice("Settle the labels", text, "evenshard stats ROOT --rejects", urgent=True)


def _mixed_groups(facts: Facts) -> Iterator[Advice]:
    if count := facts.survey.num_mixed:
        text = (
            f"{counted(count, 'group')} of related images {'spans' if count == 1 else 'span'} more than one class: a "
            "wrong label, or one product under two names. They are shown below."
        )
        yield Advice("Look at groups of several classes", text)


def _damaged(facts: Facts) -> Iterator[Advice]:
    rest = {reason: count for reason, count in facts.reasons.items() if reason not in _COPIES}
    if total := sum(rest.values()):
        most = max(rest, key=lambda reason: rest[reason])
        listed = facts.num_images + sum(facts.reasons.values())
        text = (
            f"{counted(total, 'file')} ({percent(total, listed)} of the source) could not be used; the most frequent "
            f"reason is {most} ({rest[most]:,}). Each is listed."
        )
        urgent = total > TOLERABLE_DAMAGE * listed
        yield Advice("Repair or accept what was rejected", text, "evenshard stats ROOT --rejects", urgent=urgent)


def _untrained(facts: Facts) -> Iterator[Advice]:
    if count := facts.covered.untrained:
        text = (
            f"{counted(count, 'class', 'classes')} {'has' if count == 1 else 'have'} images, but none in train: no "
            "manifest can draw from there, and their recall stays 0."
        )
        yield Advice("Add training images", text, urgent=True)


def _no_evaluation(facts: Facts) -> Iterator[Advice]:
    if not facts.covered.evaluable and facts.covered.num_classes:
        num = counted(facts.covered.num_classes, "class", "classes")
        text = f"None of the {num} has an image outside train: nothing can be measured."
        yield Advice("Hold images out", text, urgent=True)


def _not_evaluable(facts: Facts) -> Iterator[Advice]:
    covered = facts.covered
    missing = covered.num_classes - covered.evaluable
    if missing and covered.evaluable:
        have = "has" if missing == 1 else "have"
        text = (
            f"{missing:,} of {covered.num_classes:,} classes {have} no image outside train, so that there recall "
            f"cannot be measured. Averages over classes speak of the other {covered.evaluable:,} "
            f"({percent(covered.evaluable, covered.num_classes)}), which hold "
            f"{percent(covered.train_images_evaluable, covered.train_images)} of the training images. A class becomes "
            "measurable with its second image: collect there first."
        )
        yield Advice("Report coverage beside every metric", text)


def _imbalance(facts: Facts) -> Iterator[Advice]:
    told = facts.trained
    if told.imbalance > TOLERABLE_IMBALANCE:
        text = (
            f"The largest class has {told.imbalance:,.0f} times the training images of the smallest; networks tolerate "
            f"about {TOLERABLE_IMBALANCE}:1. Balance from the first step is the weakest remedy of all in published "
            "comparisons; when to balance matters more than how. A schedule to start from is natural:20 -> balanced:5."
        )
        command = "evenshard schedule ROOT deferred --epochs 25"
        yield Advice(
            "Train on natural draws with log_prior added to the logits, then briefly on balanced ones", text, command
        )
    elif told.num_classes:
        text = (
            f"The largest class has {told.imbalance:,.1f} times the training images of the smallest, within the "
            f"{TOLERABLE_IMBALANCE}:1 that networks tolerate: resampling has little to win here."
        )
        yield Advice("Train on natural draws", text)


def _repeats(facts: Facts) -> Iterator[Advice]:
    worst = max(facts.draws, key=lambda one: float(one.repeat.max(initial=0)), default=None)
    if worst is None or (largest := float(worst.repeat.max(initial=0))) <= TOLERABLE_REPEAT:
        return
    beyond = worst.repeat > TOLERABLE_REPEAT
    num, share = int(beyond.sum()), percent(int(worst.targets[beyond].sum()), worst.manifest.num_draws)
    text = (
        f"One epoch of {worst.name} draws some images {times(largest)}: {counted(num, 'class', 'classes')} "
        f"repeat theirs more than {TOLERABLE_REPEAT} times, {share} of its draws. No sampler adds images that are not "
        "there."
    )
    capped = f"evenshard manifest ROOT {worst.name}-capped --policy '{_capped(str(worst.manifest.document.policy))}'"
    known = worst.manifest.document.policy.name != "explicit"  # a table of targets has no short spelling
    yield Advice(f"Cap the repeats of {worst.name}, or augment them hard", text, capped if known else "")


def _capped(policy: str) -> str:
    name, _, parameters = policy.partition(":")
    kept = [one for one in parameters.split(",") if one and not one.startswith("max_repeat=")]
    return f"{name}:{','.join([*kept, f'max_repeat={TOLERABLE_REPEAT}'])}"


def _rotation(facts: Facts) -> Iterator[Advice]:
    for one in facts.draws:
        available = int(one.pool.sum())
        skipped = (one.targets > 0) & (one.targets < one.pool)
        if not (one.repeat > 1).any() and one.distinct < 0.9 * available and skipped.any():
            epochs = math.ceil(float((one.pool[skipped] / one.targets[skipped]).max()))
            text = (
                f"One epoch of it shows {one.distinct:,} of {available:,} images ({percent(one.distinct, available)}); "
                f"the rest rotates in, and after {epochs:,} epochs every image was seen."
            )
            yield Advice(f"Give {one.name} {epochs:,} epochs", text)


def _small_test(facts: Facts) -> Iterator[Advice]:
    median = facts.covered.median_held_out
    if facts.covered.evaluable and median < FEW_HELD_OUT:
        text = (
            f"Half of the classes that can be evaluated have {median} or fewer images outside train: one of them moves "
            f"the recall of its class by {100 / max(median, 1):.0f} points. Means over many-, medium- and few-shot "
            "classes are steadier."
        )
        yield Advice("Judge groups, not single classes", text)


def _large_images(facts: Facts) -> Iterator[Advice]:
    seen = facts.survey
    if seen.median_side > LARGE_SIDE:
        text = (
            f"Half of the images are longer than {seen.median_side:,} pixels, the median file has "
            f"{num_bytes(seen.median_bytes)}. Networks that see 224 to 512 pixels pay for decoding the rest: a copy of "
            "the source, resized once, loads faster."
        )
        yield Advice("Store smaller images", text)

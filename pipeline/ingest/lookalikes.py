"""Near duplicates of a build: whose perceptual hashes lie close together, and what that does to groups.

Comes in: settled-to-stay samples with their hashes, and how many bits count as near. Goes out: joined groups, counts,
and a warning where a group is suspiciously large. Guarantees: nobody is rejected for looking like another; only groups
grow, and what groups mean - one split for all of one - is settled elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.ingest.neardup import near_clusters
from pipeline.ingest.splits import join_groups
from pipeline.ingest.units import Hashing
from pipeline.plan.spelling import counted

HUGE_GROUP = 20
"""More images than a class has in val or test at most: such a group alone outweighs a whole evaluation split."""

_HUGE_SHARE = 10  # one in so many images of its class
_NUM_TOLD = 3


def join_lookalikes(
    phash: NDArray[np.uint64],
    hashing: NDArray[np.int8],
    group: NDArray[np.uint64],
    stay: NDArray[np.int32],
    *,
    max_distance: int,
) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """The groups of all samples after those of near ones among ``stay`` were joined, and who has a near one.

    ``phash``, ``hashing`` (``Hashing``) and ``group`` run over all samples; ``stay`` are sample numbers.
    """
    seen = stay[hashing[stay] == Hashing.KNOWN]
    leader = near_clusters(phash[seen], max_distance=max_distance)
    near = np.flatnonzero(leader != np.arange(len(seen)))
    alike = np.zeros(len(group), np.bool_)
    alike[seen[near]] = alike[seen[leader[near]]] = True
    return join_groups(group, group[seen[near]], group[seen[leader[near]]]), alike


def count_lookalikes(group: NDArray[np.uint64], alike: NDArray[np.bool_]) -> dict[str, int]:
    """How many groups hold at least two images of which each has a near one, and how many images that is."""
    _, sizes = np.unique(group[alike], return_counts=True)
    sizes = sizes[sizes > 1]
    return {"num_groups": len(sizes), "num_images": int(sizes.sum())}


def huge_groups(
    group: NDArray[np.uint64],
    alike: NDArray[np.bool_],
    class_id: NDArray[np.int32],
    class_names: Sequence[str],
    *,
    max_distance: int,
) -> tuple[str, ...]:
    """A notice if groups of look-alikes hold so much of a class that its splits are no longer what they seem.

    Arrays run over the images of the snapshot.
    """
    member = np.flatnonzero(alike)
    member = member[np.argsort(group[member], kind="stable")]
    _, first, sizes = np.unique(group[member], return_index=True, return_counts=True)
    in_class = np.bincount(class_id, minlength=len(class_names))
    told: list[str] = []
    num_huge = 0
    for place in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[place])
        if size <= HUGE_GROUP:
            break
        counts = np.bincount(class_id[member[first[place] : first[place] + size]])
        main = int(counts.argmax())
        if counts[main] * _HUGE_SHARE < in_class[main]:
            continue
        num_huge += 1
        if len(told) < _NUM_TOLD:
            others = int(np.count_nonzero(counts)) - 1
            told.append(
                f"{size:,} images, {counts[main]:,} of them among the {in_class[main]:,} of class "
                f"{class_names[main]!r}"
                + (f", the rest of {counted(others, 'more class', 'more classes')}" if others else "")
            )
    if not told:
        return ()
    huge = counted(num_huge, "group of look-alikes is", "groups of look-alikes are")
    return (
        f"{huge} huge, and one split holds all of each: {'; '.join(told)}"
        f"{'; ...' if num_huge > len(told) else ''}. Look at some (column `group` of the index): if they show "
        f"different things, lower near_duplicates, now {max_distance}; if they are one series, this is as it should be",
    )

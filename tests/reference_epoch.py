"""The epoch function of DESIGN.md, section 8, once more: plain Python integers, no numpy, no windows, no caches.

Slow and obvious, written from the text and sharing nothing with ``pipeline``. ``python tests/reference_epoch.py``
writes the golden vectors again, which is only right when ``epoch_rule`` changes.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

Schedule = list[tuple[list[int], int | None]]

PHI = 0x9E3779B97F4A7C15
N, Q = 2**32, 2**30
CLOCK = 2**62
WHEN, WHICH, TURN = 1, 2, 3
GOLDEN = Path(__file__).parent / "golden" / "epoch_v1.json"


def mix(x: int) -> int:
    x %= 2**64
    x = (x ^ (x >> 33)) * 0xFF51AFD7ED558CCD % 2**64
    x = (x ^ (x >> 33)) * 0xC4CEB9FE1A85EC53 % 2**64
    return x ^ (x >> 33)


def keyed(key: int, x: int) -> int:
    return mix(key + (x + 1) * PHI)


@cache
def class_key(seed: int, tag: int, class_id: int) -> int:
    return keyed(keyed(mix(seed + PHI), tag), class_id)


def place_in_slot(key: int, p: int) -> int:
    """U_p, the 32-bit jitter."""

    def h(x: int) -> int:
        return keyed(key, x) >> 32

    if p % 2 == 0:
        return h(p)
    d = (h(p + 1) - h(p - 1)) % N
    # A = {w : w >= Q and (d - w) mod N >= Q}: [Q, N) less the Q places that end with d, as one or two intervals.
    gone = [(d - Q + 1, d)] if d >= Q - 1 else [(0, d), (N + d - Q + 1, N - 1)]
    allowed = [(Q, N - 1)]
    for low, high in gone:
        pieces = [piece for a, b in allowed for piece in ((a, min(b, low - 1)), (max(a, high + 1), b))]
        allowed = [(a, b) for a, b in pieces if a <= b]
    number = h(p) * sum(b - a + 1 for a, b in allowed) // N
    for a, b in allowed:
        if number <= b - a:
            return (h(p - 1) + a + number) % N
        number -= b - a + 1
    raise AssertionError("no such element")


def tick(key: int, p: int, j: int, num: int) -> int:
    begin, end = j * CLOCK // num, (j + 1) * CLOCK // num
    return begin + place_in_slot(key, p) * (end - begin) // N


def permuted(key: int, x: int, size: int) -> int:
    return _listed(key, x, size) if size <= 16 else _feistel(key, x, size)


def _listed(key: int, x: int, size: int) -> int:
    order, v = list(range(size)), key
    for t in range(1, size):
        i, v = v % (t + 1), v // (t + 1)
        order[t], order[i] = order[i], order[t]
    return order[x]


def _feistel(key: int, x: int, size: int) -> int:
    a = next(a for a in range(1, size + 1) if a * a >= size)
    b = -(-size // a)
    while True:
        left, right = divmod(x, b)
        for r in range(10):
            other = right if r % 2 == 0 else left
            f = mix(key + PHI * (other + (r + 1) * 2**32)) >> 32
            if r % 2 == 0:
                left = (left + f * a // N) % a
            else:
                right = (right + f * b // N) % b
        x = left * b + right
        if x < size:
            return x


def image(seed: int, class_id: int, p: int, n: int) -> int:
    """Which of the n images of a class its draw p shows."""
    k, x = divmod(p, n)
    middle = (n + 1) // 2
    half = int(x >= middle)
    start, size = (middle, n - middle) if half else (0, middle)
    value = start + permuted(keyed(class_key(seed, WHICH, class_id), 2 * k + half), x - start, size)
    return (value + class_key(seed, TURN, class_id)) % n


def targets_of(schedule: Schedule, epoch: int) -> list[int]:
    for targets, num_epochs in schedule:
        if num_epochs is None or epoch < num_epochs:
            return targets
        epoch -= num_epochs
    raise AssertionError("after the schedule")


def drawn_before(schedule: Schedule, epoch: int) -> list[int]:
    drawn = [0] * len(schedule[0][0])
    for targets, num_epochs in schedule:
        length = epoch if num_epochs is None else min(epoch, num_epochs)
        drawn = [d + t * length for d, t in zip(drawn, targets, strict=True)]
        epoch -= length
    return drawn


def epoch_order(seed: int, schedule: Schedule, epoch: int) -> list[tuple[int, int, int]]:
    """All (tick, class, p) of one epoch, in order."""
    targets, first = targets_of(schedule, epoch), drawn_before(schedule, epoch)
    return sorted(
        (tick(class_key(seed, WHEN, c), first[c] + j, j, targets[c]), c, first[c] + j)
        for c in range(len(targets))
        for j in range(targets[c])
    )


def epoch_slice(seed: int, schedule: Schedule, epoch: int, place: int, num: int) -> list[tuple[int, int]]:
    """``num`` (class, p) from this place of an epoch that is too long to sort: bisect the clock, then sort a little."""
    targets, first = targets_of(schedule, epoch), drawn_before(schedule, epoch)

    def when(c: int, j: int) -> int:
        return tick(class_key(seed, WHEN, c), first[c] + j, j, targets[c])

    def drawn(time: int) -> list[int]:
        """Draws of each class before this tick. All slots before the one that holds it are over."""
        over = [time * t // CLOCK for t in targets]
        return [j + (j < t and when(c, j) < time) for c, (j, t) in enumerate(zip(over, targets, strict=True))]

    low, high = 0, CLOCK  # the last tick before which no more than ``place`` draws lie
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if sum(drawn(middle)) <= place else (low, middle)
    counts = drawn(low)
    ahead = place - sum(counts) + num
    rows = [(when(c, j), c, j) for c, t in enumerate(targets) for j in range(counts[c], min(t, counts[c] + ahead))]
    return [(c, first[c] + j) for _, c, j in sorted(rows)[ahead - num : ahead]]


def sequence(seed: int, pool: list[int], schedule: Schedule, epochs: range) -> list[tuple[int, int, int]]:
    """All (class, p, image) of these epochs, in order."""
    return [(c, p, image(seed, c, p, pool[c])) for e in epochs for _, c, p in epoch_order(seed, schedule, e)]


CASES: dict[str, tuple[int, list[int], Schedule, int]] = {  # seed, pool, schedule, epochs
    "plain": (7, [3, 1, 10, 40], [([4, 4, 4, 4], None)], 3),
    "holes": (2**63 + 5, [0, 1, 2, 37, 600], [([0, 3, 0, 20, 9], None)], 2),
    "schedule": (0, [5, 2, 33, 1], [([5, 0, 33, 1], 2), ([3, 3, 3, 3], 1), ([0, 9, 1, 0], None)], 5),
}


def golden() -> dict[str, object]:
    when, which = class_key(3, WHEN, 77), class_key(4, WHICH, 0)
    return {
        "epoch_rule": 1,
        "mix": [[str(x), str(mix(x))] for x in (0, 1, 2**32, 2**64 - 1)],
        "class_key": [[s, t, c, str(class_key(s, t, c))] for s in (0, 3, 4) for t in (1, 2, 3) for c in (0, 77, 10**6)],
        "jitter": [[p, place_in_slot(when, p)] for p in (*range(12), 2**40 - 1, 2**40)],
        "permute": [[n, [permuted(which, x, n) for x in range(n)]] for n in (1, 2, 3, 6, 15, 16, 17, 31, 100)],
        "permute_large": [[n, x, permuted(which, x, n)] for n in (10**6 + 3,) for x in (0, 1, 999_999)],
        "cases": {
            name: {
                "seed": str(seed),
                "pool": pool,
                "schedule": schedule,
                "draws": sequence(seed, pool, schedule, range(num_epochs)),
            }
            for name, (seed, pool, schedule, num_epochs) in CASES.items()
        },
    }


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


if __name__ == "__main__":
    entries = ",\n".join(f" {json.dumps(name)}: {_compact(value)}" for name, value in golden().items())
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text("{\n" + entries + "\n}\n")

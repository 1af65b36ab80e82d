"""The only birth of randomness: keyed hashes and keyed permutations (DESIGN.md, section 8).

Comes in: a key and what it is asked about - a class, a draw, a place in an order. Goes out: 64 bits, or the place in a
shuffled order. Guarantees: integer arithmetic alone, so the same answer on every platform, in any order of asking, and
never from a global or an added seed: purposes are told apart by hashing (seed, purpose, id), never by ``seed + id``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]

PHI = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio: consecutive ids land far apart."""

_MASK = (1 << 64) - 1
_MIX_A = 0xFF51AFD7ED558CCD
_MIX_B = 0xC4CEB9FE1A85EC53

MAX_LISTED_SIZE = 16
"""Up to here every one of the size! orders is reached (16! < 2^64); above, a Feistel network."""

FEISTEL_ROUNDS = 10
"""Six rounds fail a chi-square over pairs at size 17; ten have a margin."""


def mix(x: U64 | int) -> U64:
    """The 64-bit finaliser of MurmurHash3: a bijection in which each input bit sways every output bit."""
    return _mix_in_place(np.array(x & _MASK if isinstance(x, int) else x, dtype=np.uint64))


def keyed_hash(key: U64 | int, x: NDArray[np.integer] | int) -> U64:
    """H(k, x) = mix(k + (x + 1) * PHI) mod 2^64, broadcast over both."""
    step = np.array(x & _MASK if isinstance(x, int) else x).astype(np.uint64)
    step += np.uint64(1)
    step *= np.uint64(PHI)
    return _mix_in_place(np.asarray(step + np.asarray(key, dtype=np.uint64)))


def seed_key(seed: int) -> int:
    """The key that a seed stands for: mix(seed + PHI)."""
    return _mix_int(seed + PHI)


def derive(key: int, *parts: int) -> int:
    """H(...H(H(key, part_0), part_1)...): one key for one purpose and id."""
    for part in parts:
        key = _mix_int(key + (part + 1) * PHI)
    return key


def text_key(text: str) -> int:
    """The key of a sample by its relative path: the first 8 bytes of SHA-256, big endian."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:8], "big")


def text_keys(texts: Sequence[str]) -> U64:
    """`text_key` of each of these, uint64 [n]; all of them must be valid text."""
    sha256 = hashlib.sha256
    digests = b"".join([sha256(text.encode()).digest() for text in texts])
    return np.frombuffer(digests, ">u8")[::4].astype(np.uint64)


def permute(key: U64, x: I64, size: I64, side: U64 | None = None) -> I64:
    """Where ``x`` of [0, size) goes under the keyed permutation of ``size`` things.

    All arrays have one shape [n]. ``side`` is ``ceil_sqrt(size)``, for callers that know it already.
    """
    place, count = x.astype(np.uint64), size.astype(np.uint64)
    listed = count <= np.uint64(MAX_LISTED_SIZE)
    if listed.all():
        return _permute_listed(key, place, count).view(np.int64)
    if side is None:
        side = ceil_sqrt(count)
    rows, large = np.flatnonzero(listed), np.flatnonzero(~listed)
    place[rows] = _permute_listed(key[rows], place[rows], count[rows])
    place[large] = _permute_feistel(key[large], place[large], count[large], side[large])
    return place.view(np.int64)


def ceil_sqrt(x: U64) -> U64:
    """The smallest integer whose square is at least ``x`` < 2^62, bit by bit: no float, so the same everywhere."""
    root = np.zeros_like(x)
    for bit in range(31, -1, -1):
        trial = root | np.uint64(1 << bit)
        root = np.where(trial * trial <= x, trial, root)
    return root + (root * root < x)


def _mix_in_place(z: U64) -> U64:
    z ^= z >> np.uint64(33)
    z *= np.uint64(_MIX_A)
    z ^= z >> np.uint64(33)
    z *= np.uint64(_MIX_B)
    z ^= z >> np.uint64(33)
    return z


def _mix_int(x: int) -> int:
    """``mix`` of one number; numpy would spend microseconds on it."""
    x &= _MASK
    x = (x ^ (x >> 33)) * _MIX_A & _MASK
    x = (x ^ (x >> 33)) * _MIX_B & _MASK
    return x ^ (x >> 33)


def _permute_listed(key: U64, x: U64, size: U64) -> U64:
    """Order number ``key`` of the size! orders: for t = 1..size-1 swap places t and v mod (t + 1), v = v div (t + 1).

    Only the content of place x is wanted, so the swaps are followed backwards from it: O(16) and no list per row.
    """
    swaps: list[U64] = []
    value = key
    for t in range(1, int(size.max(initial=0))):
        quotient = value // np.uint64(t + 1)
        partner = value - quotient * np.uint64(t + 1)
        swaps.append(np.where(size > np.uint64(t), partner, np.uint64(t)))
        value = quotient
    for t in range(len(swaps), 0, -1):
        partner = swaps[t - 1]
        x = np.where(x == np.uint64(t), partner, np.where(x == partner, np.uint64(t), x))
    return x


def _permute_feistel(key: U64, x: U64, size: U64, side: U64) -> U64:
    """Walk a permutation of [0, a*b), a = side, b = ceil(size / a), until it falls below ``size``."""
    other_side = (size + side - np.uint64(1)) // side
    x = _feistel_pass(key, x, side, other_side)
    outside = np.flatnonzero(x >= size)
    while outside.size:
        x[outside] = _feistel_pass(key[outside], x[outside], side[outside], other_side[outside])
        outside = outside[x[outside] >= size[outside]]
    return x


def _feistel_pass(key: U64, x: U64, a: U64, b: U64) -> U64:
    """x = L*b + R; rounds add to L mod a what R says, then to R mod b what L says, in turn."""
    left = x // b
    right = x - left * b
    for r in range(FEISTEL_ROUNDS):
        if r % 2 == 0:
            _add_round(left, a, key, right, r)
        else:
            _add_round(right, b, key, left, r)
    return left * b + right


def _add_round(half: U64, modulus: U64, key: U64, other: U64, r: int) -> None:
    """half = (half + floor(f * modulus / 2^32)) mod modulus, f = top 32 bits of mix(key + PHI*(other + (r+1)*2^32))."""
    f = other + np.uint64((r + 1) << 32)
    f *= np.uint64(PHI)
    f += key
    _mix_in_place(f)
    f >>= np.uint64(32)
    f *= modulus
    f >>= np.uint64(32)
    half += f
    half -= modulus * (half >= modulus)

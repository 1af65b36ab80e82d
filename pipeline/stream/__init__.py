"""Manifest to batches: which positions, which images, their verified bytes, their pixels.

    positions -> class and draw -> sample row -> bytes -> pixels -> batch
    loader.py    drawn.py          batches.py: read, check, decode, transform, assemble

Comes in: a ``Manifest`` (or, to evaluate, a ``Snapshot`` and a split). Goes out: ``(images, labels)`` tensors, one
epoch for each ``iter()``. Guarantees: what a batch holds depends on manifest, seed, batch size and number of ranks,
never on threads or timing (E5); the state is five small values, and going on from it costs what starting costs (E6); no
byte becomes a pixel before its checksum was verified (R1).

``loader.py`` the two loaders, positions and state; ``drawn.py`` the rows of many steps planned at once;
``batches.py`` rows to one batch; ``damage.py`` stand-ins for damaged images; ``remote.py`` and ``cache.py`` far roots;
``prefetch.py`` batches built ahead in threads; ``stalls.py`` what a thread that hangs is doing; ``transforms.py``
pixels to pixels, randomness keyed by the draw.
"""

"""Numbers only: which class, and which image of it, is drawn at which position of training.

Comes in: images per class, a policy, a seed. Goes out: targets (``policy``), the document that carries them
(``manifest``), and the endless sequence of draws that they stand for (``epoch``). Guarantees: integers wherever a draw
is decided, so every rank, worker and platform computes the same sequence; no storage, no images, no Ray, no torch.
"""

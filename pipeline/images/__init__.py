"""The only room that decodes: bytes -> facts, bytes -> pixels.

Comes in: the bytes of one file from a source nobody vouches for. Goes out: `Facts` for the index, RGB pixels for a
batch, or `ImageRejected` with a reason of the rejects table. Guarantees: the bytes choose the decoder, never the name,
and only among six formats, so no file reaches a parser that runs programs (EPS) or unpacks archives; a declared size
beyond the limit is refused before a pixel is allocated; both checks report equal facts; any thread may call, no state.

`pillow` is the reference: `inspect`, `decode_rgb`. `crops` decodes one crop at speed, and takes and refuses the same.
"""

from pipeline.images.crops import Crop, can_decode_crops, decode_crop
from pipeline.images.pillow import HARD_MAX_PIXELS, Check, Facts, ImageRejected, Limits, decode_rgb, inspect, recognise

__all__ = [
    "HARD_MAX_PIXELS",
    "Check",
    "Crop",
    "Facts",
    "ImageRejected",
    "Limits",
    "can_decode_crops",
    "decode_crop",
    "decode_rgb",
    "inspect",
    "recognise",
]

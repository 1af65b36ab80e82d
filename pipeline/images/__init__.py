"""The only room that decodes: bytes -> facts, bytes -> pixels.

Comes in: the bytes of one file from a source nobody vouches for. Goes out: `Facts` for the index, RGB pixels for a
batch, or `ImageRejected` with a reason of the rejects table. Guarantees: the bytes choose the decoder, never the name,
and only among six formats, so no file reaches a parser that runs programs (EPS) or unpacks archives; a declared size
beyond the limit is refused before a pixel is allocated; both checks report equal facts; any thread may call, no state.

`headers` reads structure (`plain` that of common files, quickly), `pillow` is the reference: `decode_rgb`, and the word
of a full decode. `inspection` is what a build asks of every image, within limits (`watch`) and, after a crash, from a
child process (`isolated`). `crops` decodes one crop at speed, and takes and refuses the same as the reference.
"""

from pipeline.images.crops import REFERENCE, Crop, can_decode_crops, decode_crop, decode_kept, decoded_eighths
from pipeline.images.facts import HARD_MAX_PIXELS, Check, Facts, ImageRejected, Limits
from pipeline.images.headers import recognise
from pipeline.images.inspection import Inspection, Inspector, inspect
from pipeline.images.pillow import decode_rgb

__all__ = [
    "HARD_MAX_PIXELS",
    "REFERENCE",
    "Check",
    "Crop",
    "Facts",
    "ImageRejected",
    "Inspection",
    "Inspector",
    "Limits",
    "can_decode_crops",
    "decode_crop",
    "decode_kept",
    "decode_rgb",
    "decoded_eighths",
    "inspect",
    "recognise",
]

"""What is asked of an image, what is said of it, and why it may be refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from pipeline.errors import ConfigError
from pipeline.schema import Reason

Check = Literal["decode", "header"]

HARD_MAX_PIXELS = 178_956_970
"""Pillow's own refusal line (512 MiB as RGB). `Limits` may go up to here, not beyond."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is refused before it costs anything, and what decoding one image may cost."""

    max_pixels: int = 50_000_000
    max_bytes: int = 64 << 20
    max_cpu_s: int = 20
    """50 million pixels of WebP, smooth ones, took Pillow 1.5 s; the rest is for slower and busier machines."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_pixels <= HARD_MAX_PIXELS:
            raise ConfigError(f"max_pixels must be from 1 to {HARD_MAX_PIXELS}, not {self.max_pixels}")
        if self.max_bytes < 1:
            raise ConfigError(f"max_bytes must be at least 1, not {self.max_bytes}")
        if self.max_cpu_s < 1:
            raise ConfigError(f"max_cpu_s must be at least 1, not {self.max_cpu_s}")

    @property
    def memory_bytes(self) -> int:
        """What decoding may add to a process: room for any honest image within the other limits, several times."""
        return (256 << 20) + 32 * self.max_pixels + 4 * self.max_bytes

    @property
    def wall_s(self) -> float:
        """After this time on the clock a decoder is stuck: far beyond what `max_cpu_s` take on a busy machine."""
        return 60.0 + 10.0 * self.max_cpu_s


class Facts(NamedTuple):
    """What the index says of an image. Width and height are those of the stored raster, before EXIF orientation."""

    width: int
    height: int
    format: str
    mode: str
    phash: int | None = None  # 64 bits, where it was asked for


class ImageRejected(Exception):
    """One file cannot be used: a row of the rejects table, never the end of a build."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason.value}: {self.detail}" if self.detail else self.reason.value


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Raise ImageRejected for a size that is none, or beyond the limit."""
    if width < 1 or height < 1:
        raise ImageRejected(Reason.CORRUPT, f"declares {width} x {height} pixels")
    if width * height > max_pixels:
        raise ImageRejected(Reason.TOO_LARGE, f"declares {width} x {height} pixels, the limit is {max_pixels}")

"""Remote roots at length: `python tests/soak/remote_faults.py [--images 3000] [--kills 40] [--photos DIR]`.

Builds a ROOT of photos-to-be, or of those in DIR, and reads balanced epochs of it from nginx and from moto's S3,
through a proxy that breaks a tenth of all requests, with a cache of twice and of a quarter of the data. Then kills
processes as they download. Prints what came, what it cost, and what proxy and server say of it; exit status 1 if
something is off. Announced are attempts: a few of them never reach the proxy, on connections that it has cut; and the
reads of snapshot records are announced, and left out of what was seen.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import fsspec
import numpy as np
from fault_proxy import FAULTS, Plan, proxy
from PIL import Image
from real_servers import NGINX, nginx, s3
from remote_kills import kill_while_downloading
from tiny_snapshot import write_snapshot

import pipeline
from pipeline.schema import tar_path
from pipeline.snapshot import open_snapshot
from pipeline.store import remote
from pipeline.stream.loader import Loader

STALL_S = 1.0
logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # connections that break are what this is about


def make_root(folder: Path, num_images: int, photos: str | None) -> Path:
    """Long-tailed, in shards of at most 64."""
    if photos is None:
        photos = str(folder / "source")
        rng = np.random.default_rng(0)
        for number in range(num_images):
            path = folder / f"source/class-{int(20 * rng.random() ** 3):02d}/{number:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            small = Image.fromarray(rng.integers(0, 256, (14, 14, 3), dtype=np.uint8))
            small.resize((224, 224), Image.Resampling.BICUBIC).save(path, quality=90)
    pipeline.build(photos, folder / "root", workers=2, shard_samples=64)
    return folder / "root"


def check_epoch(url: str, root: Path, folder: Path, share: float, plan: Plan, sent: dict[str, int]) -> bool:
    """Print a row; whether all is well."""
    snapshot, local = open_snapshot(url), open_snapshot(root)
    mine = [split == "train" for split in snapshot.shards["split"].to_pylist()]
    sizes = [size for size, wanted in zip(snapshot.shards["tar_size"].to_pylist(), mine, strict=True) if wanted]
    cache_bytes, began_s = int(share * sum(sizes)), time.perf_counter()
    begun = len(plan.log)
    there = Loader(
        snapshot.manifest("balanced"), 64, workers=2, decode=False, details=True, seed=1,
        cache_dir=folder / f"cache-{share}-{url[:2]}", cache_bytes=cache_bytes,
    )  # fmt: skip
    here = Loader(local.manifest("balanced"), 64, decode=False, details=True, seed=1)
    num_images = num_wrong = drawn_bytes = 0
    for (found, labels, details), (right, right_labels, right_details) in zip(there, here, strict=True):
        num_images += len(found)
        num_wrong += sum(a != b for a, b in zip(found, right, strict=True))
        num_wrong += details.keys != right_details.keys or labels.tolist() != right_labels.tolist()
        drawn_bytes += sum(map(len, right))
    traffic, log = snapshot.store.traffic, plan.log[begun:]
    announced = traffic.num_requests, traffic.fetched_bytes
    seen = sum(method == "GET" for method, _, _ in plan.log) - plan.gets("snapshots/"), sum(sent.values())
    shards = sum(size for path, size in sent.items() if "/shards/" in path)
    whole = {tar_path(s) for s in snapshot.shards["tar_sha256"].to_pylist()}
    downloads = [path.rsplit("root/", 1)[-1].lstrip("/") for _, path, fault in log if fault is None]
    most = max((downloads.count(path) for path in whole), default=0) if share > 1 else None
    kinds = ", ".join(f"{plan.done[fault]} x {fault}" for fault in FAULTS)
    print(
        f"| {url.split(':')[0]} | {share} | {num_images} | {num_wrong} | {announced[0]:,} / {seen[0]:,} | "
        f"{announced[1]:,} / {seen[1]:,} | {drawn_bytes:,} | {shards:,} | {kinds} | {most} | "
        f"{time.perf_counter() - began_s:.0f} s |",
        flush=True,
    )
    return not num_wrong and (most is None or most <= 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--photos")
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--share", type=float, default=0.1, help="of requests that break")
    arguments = parser.parse_args()
    remote.PAUSES, remote.STALL_S = (0.05, 0.1, 0.2, 0.4, 0.8), STALL_S
    good = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        root = make_root(folder, arguments.images, arguments.photos)
        print("| server | cache / data | images | wrong | requests announced / seen | bytes announced / sent | "
              "bytes drawn | bytes of shards sent | faults | most downloads of a shard | time |")  # fmt: skip
        print("|---|--:|--:|--:|--:|--:|--:|--:|---|--:|--:|", flush=True)
        for share in (2.0, 0.25):
            if NGINX is not None:
                plan = Plan(arguments.share, seed=11, in_a_row=4)
                with nginx(root) as server, proxy(server.url, plan, stall_s=2 * STALL_S) as (url, sent):
                    good &= check_epoch(url, root, folder, share, plan, sent)
                    served = server.served()
                never = plan.done["503"]
                print(f"nginx has served {len(served):,} requests; the proxy sent it {len(plan.log) - never:,}")
            plan = Plan(arguments.share, seed=12, in_a_row=4)
            with s3(root) as upstream, proxy(upstream, plan, stall_s=2 * STALL_S) as (url, sent):
                os.environ["AWS_ENDPOINT_URL"] = url
                fsspec.get_filesystem_class("s3").clear_instance_cache()
                good &= check_epoch("s3://bucket/root", root, folder, share, plan, sent)
        small = folder / "small"
        write_snapshot(small, {"train": (250, 200, 150, 100, 50, 20), "val": (0,) * 6, "test": (5, 3, 2, 1, 0, 0)})
        killed = kill_while_downloading(small, folder / "kills", num_kills=arguments.kills, seed=1)
        print(killed)
        good &= killed.num_fetched_again == killed.num_wrong == 0 and killed.num_in_vain <= killed.num_under_way
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

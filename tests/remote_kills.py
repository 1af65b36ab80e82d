"""Processes that download into one node cache, killed at random moments: what that costs the others."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import random
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

from fault_proxy import Plan, directory_server, proxy
from real_servers import wait_for
from remote_rank import read_all

DELAY_S = 0.03  # of every answer, so that a kill meets downloads


@dataclass
class Killed:
    """``num_fetched_again`` counts requests for shards that lay in the cache, whole, when their process began."""

    num_kills: int = 0  # of processes that were downloading
    num_wrong: int = 0  # of processes that went on, and of those that came last
    num_fetched_again: int = 0
    num_in_vain: int = 0  # requests for shards beyond one for each
    num_under_way: int = 0  # temporary files that kills left
    num_rounds: int = 0  # caches filled from nothing


def kill_while_downloading(root: Path, folder: Path, *, num_kills: int, seed: int) -> Killed:
    """Fill caches in ``folder``, one after the other, until so many processes were killed as they downloaded."""
    rng, killed, expected = random.Random(seed), Killed(), read_all(str(root), str(folder / "unused"), 1 << 30)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["remote_rank"])
    with directory_server(root) as upstream:
        while killed.num_kills < num_kills:
            plan, cache = Plan(0), folder / f"round-{killed.num_rounds}"
            with proxy(upstream, plan, delay_s=DELAY_S) as (url, _):
                while killed.num_kills < num_kills and _kill_one(context, url, cache, plan, rng, killed):
                    pass
                begun, whole = len(plan.log), _whole(cache)
                killed.num_wrong += read_all(url, str(cache), 1 << 30) != expected
                killed.num_fetched_again += _asked(plan, begun, whole)
            killed.num_in_vain += plan.gets("/shards/") - len(_whole(cache))
            killed.num_wrong += bool(os.listdir(cache / "partial"))
            killed.num_rounds += 1
            shutil.rmtree(cache)
    return killed


def _kill_one(
    context: multiprocessing.context.ForkServerContext,
    url: str,
    cache: Path,
    plan: Plan,
    rng: random.Random,
    killed: Killed,
) -> bool:
    """False if the process had nothing left to download."""
    begun, asked, whole = len(plan.log), plan.gets("/shards/"), _whole(cache)
    victim = context.Process(target=read_all, args=(url, str(cache), 1 << 30))
    victim.start()
    wait_for(lambda: plan.gets("/shards/") > asked or not victim.is_alive(), seconds=180)
    threading.Event().wait(rng.uniform(0, 3 * DELAY_S))
    alive = victim.is_alive()
    victim.kill()
    victim.join()
    under_way = len(list(cache.glob("partial/*")))
    killed.num_under_way += under_way
    killed.num_kills += alive and under_way > 0
    killed.num_fetched_again += _asked(plan, begun, whole)
    return alive


def _whole(cache: Path) -> set[str]:
    return {path.name for path in cache.glob("files/*/*.tar")}


def _asked(plan: Plan, begun: int, names: set[str]) -> int:
    """Requests since ``begun`` for shards of these names."""
    return sum(path.rsplit("/", 1)[-1] in names for _, path, _ in plan.log[begun:])

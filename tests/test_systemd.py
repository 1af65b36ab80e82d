"""The systemd units of `deploy/`: valid, hardened, and seen to run a night that was missed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from deploy_commands import DEPLOY, check_command

UNITS = DEPLOY / "systemd"
SERVICE, TIMER = "evenshard-nightly.service", "evenshard-nightly.timer"


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60)


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """A copy of the units, with a program that is there."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    copy = tmp_path / "units"
    shutil.copytree(UNITS, copy)
    service = copy / SERVICE
    service.write_text(service.read_text().replace("/opt/evenshard/bin/python", sys.executable))
    return copy


def verified(units: Path) -> str:
    """What systemd says against them; nothing if they are right."""
    done = analyze("verify", "--man=no", "--recursive-errors=no", str(units / SERVICE), str(units / TIMER))
    return done.stderr if done.stderr or done.returncode == 0 else f"exit code {done.returncode}"


def test_systemd_accepts_the_units(units: Path) -> None:
    assert verified(units) == ""


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (SERVICE, "Type=oneshot", "Type=oneshoot", "oneshoot"),
        (SERVICE, "ProtectSystem=strict", "ProtectSytem=strict", "ProtectSytem"),
        (SERVICE, "TimeoutStartSec=6h", "TimeoutStartSec=6 hors", "6 hors"),
        (SERVICE, "@system-service", "@system-services", "@system-services"),
        (SERVICE, "ExecStart=/", "ExecStart=/nowhere/", "nowhere"),
        (TIMER, "02:17:00", "26:17:00", "26:17:00"),
        (TIMER, "Persistent=yes", "Persistant=yes", "Persistant"),
        (TIMER, "OnCalendar=", "OnCalender=", "OnCalender"),
    ],
    ids=["type", "protect", "time", "filter", "program", "hour", "persistent", "calendar"],
)
def test_systemd_refuses_a_broken_copy(units: Path, name: str, old: str, new: str, message: str) -> None:
    text = (units / name).read_text()
    assert old in text
    (units / name).write_text(text.replace(old, new))
    assert message in verified(units)


def test_the_service_runs_a_command_of_ours() -> None:
    (line,) = re.findall(r"^ExecStart=(.*)$", (UNITS / SERVICE).read_text(), re.MULTILINE)
    check_command(line.split())


def test_the_service_is_hardened(units: Path) -> None:
    done = analyze("security", "--offline=yes", "--threshold=25", str(units / SERVICE))
    assert done.returncode == 0, done.stdout[-300:]
    (units / SERVICE).write_text((units / SERVICE).read_text().replace("ProtectSystem=strict\n", ""))
    assert analyze("security", "--offline=yes", "--threshold=15", str(units / SERVICE)).returncode != 0


# ---- A night, run by a systemd of the test's own: a user manager in namespaces where it harms nobody

INSIDE = r"""
set -e
mount --bind "$PLACE" /srv
mount -t tmpfs tmpfs /run
mount -t proc proc /proc
mkdir -p /run/systemd/system /srv/share/systemd/timers
mkdir -m 700 /run/manager
export XDG_RUNTIME_DIR=/run/manager XDG_DATA_HOME=/srv/share HOME=/srv/home
export XDG_CONFIG_HOME=/srv/state XDG_STATE_HOME=/srv/state SYSTEMD_UNIT_PATH=/srv/units
touch -d '2 days ago' /srv/share/systemd/timers/stamp-evenshard-nightly.timer
/lib/systemd/systemd --user 2> /srv/manager.log &
until systemctl --user list-units > /srv/ready.log 2>&1; do sleep 0.1; done
systemctl --user start evenshard-nightly.timer
told() { systemctl --user show evenshard-nightly.service --property "$1" --value; }
for _ in $(seq 600); do [ "$(told ExecMainExitTimestampMonotonic)" -gt 0 ] && break; sleep 0.1; done
echo "timer $(told Result) $(told ExecMainStatus)" >> /srv/results
mv /srv/photos /srv/gone
systemctl --user start evenshard-nightly.service || true
echo "failing $(told Result) $(told ExecMainStatus)" >> /srv/results
mv /srv/gone /srv/photos
systemctl --user start evenshard-nightly.service || true
echo "again $(told Result) $(told ExecMainStatus)" >> /srv/results
"""

PLACES = {
    "/opt/evenshard/bin/python": sys.executable,
    "/etc/evenshard": "/srv/etc",
    "/var/lib/evenshard": "/srv/state/evenshard",
}


def prepare(place: Path, images: Path) -> None:
    """Everything that the units name, below one directory that is /srv inside."""
    for name in ("units", "etc", "state", "home"):
        (place / name).mkdir()
    shutil.copytree(images, place / "photos")
    for name in (SERVICE, TIMER):
        text = (UNITS / name).read_text()
        for old, new in PLACES.items():
            text = text.replace(old, new)
        (place / "units" / name).write_text(text)
    for unit, lines in {
        # A user manager cannot become another user; the interpreter of these tests may lie in somebody's home or
        # in /tmp; and in a container there may be no /proc/kmsg and no /proc/sys to hide.
        SERVICE: "[Service]\nUser=\nProtectHome=no\nPrivateTmp=no\n"
        "ProtectKernelLogs=no\nProtectKernelTunables=no\nStandardOutput=append:/srv/night.log\nStandardError=inherit\n",
        TIMER: "[Timer]\nRandomizedDelaySec=0\n",
    }.items():
        (place / "units" / f"{unit}.d").mkdir()
        (place / "units" / f"{unit}.d" / "test.conf").write_text(lines)
    for target in ("default", "basic", "timers", "sysinit", "shutdown", "network-online"):
        (place / "units" / f"{target}.target").write_text("[Unit]\nDescription=of this test\n")
    build = (DEPLOY / "build.yaml").read_text()
    build = re.sub("^source: .*", "source: /srv/photos", build, flags=re.MULTILINE)
    (place / "etc" / "build.yaml").write_text(
        re.sub("^root: .*", "root: /srv/state/evenshard/root", build, flags=re.MULTILINE)
    )


def may_have_namespaces() -> bool:
    tools = all(map(shutil.which, ("unshare", "systemctl"))) and Path("/lib/systemd/systemd").exists()
    probe = ["unshare", "--mount", "--pid", "--fork", "true"]
    return os.geteuid() == 0 and tools and subprocess.run(probe, capture_output=True).returncode == 0


def test_the_timer_makes_up_for_a_night_that_was_missed(tiny_images: Path, tmp_path: Path) -> None:
    if not may_have_namespaces():
        pytest.skip("no systemd can be started here")
    prepare(tmp_path, tiny_images)
    inside = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private", "bash", "-c", INSIDE]
    done = subprocess.run(
        inside, env={"PATH": os.environ["PATH"], "PLACE": str(tmp_path)}, capture_output=True, text=True, timeout=240
    )
    logs = {
        name: (tmp_path / name).read_text()
        for name in ("results", "night.log", "manager.log")
        if (tmp_path / name).exists()
    }
    told = logs.get("results", "").splitlines()
    assert told == ["timer success 0", "failing exit-code 1", "again success 0"], (done.stderr, logs)
    assert json.loads(logs["night.log"].splitlines()[-1])["outcome"] == "done"
    nights = [
        json.loads(path.read_text()) for path in sorted((tmp_path / "state/evenshard/root/runs/nightly").glob("*.json"))
    ]
    read = [night["summary"].get("read", {}).get("images") for night in nights]
    assert (read[0], read[-1]) == (61, 0)
    assert [path.name for path in (tmp_path / "state/evenshard/root/snapshots").iterdir()] == ["00000001.json"]

"""One call to the operating system fails, or is the last: no torn file, no lost file, an error by name, a rerun."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from commit_faults import ERRORS, KILLS, Fault, contents, prepare, problems, walk_apart

TOP = Path(__file__).parents[1]

PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
from test_faults import main
sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
"""


def test_any_call_of_the_commit_path_may_fail_or_be_the_last(tmp_path: Path) -> None:
    # Apart, because it forks, which a process with threads should not; `tests/soak/faults.py` looks at every call.
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), "17"], cwd=TOP, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 problems" in done.stdout


def main(folder: Path, every: int) -> int:
    """Try every ``every``-th combination of call and fault; print what was tried and what was wrong."""
    template, incoming = prepare(folder)
    root, notes = folder / "tried", folder / "notes.json"
    before = contents(template)
    shutil.copytree(template, root)
    calm = walk_apart(root, incoming, None, notes)
    after = contents(root)
    assert calm.done, calm
    wrong: list[str] = []
    kinds = (*ERRORS, *KILLS)
    faults = [Fault(at, kind) for at in range(len(calm.calls)) for kind in kinds][::every]
    failed = 0
    for fault in faults:
        shutil.rmtree(root)
        shutil.copytree(template, root)
        outcome = walk_apart(root, incoming, fault, notes)
        failed += not outcome.done
        found = [*problems(root, outcome, before, after)]
        again = walk_apart(root, incoming, None, notes)
        if not again.done or contents(root) != after:
            found.append(f"the rerun: {again.error or 'other bytes'}")
        wrong += [f"{calm.calls[fault.at]} number {fault.at}, {fault.kind}: {text}" for text in found]
    print(*wrong, sep="\n")
    print(f"{len(faults)} faults at {len(calm.calls)} calls, {failed} of them stopped it: {len(wrong)} problems")
    return 1 if wrong else 0

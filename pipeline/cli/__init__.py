"""`evenshard`: thin commands over the public names.

In: a command line. Out: text for people (JSON on request) and an exit code: 0 done, 1 failed, 2 wrong usage, 130
interrupted.
Guarantees: commands that only read or plan import neither Ray nor torch; a failure prints one message, never a
traceback, unless ``--debug`` is given or EVENSHARD_TRACEBACK is set; ``run`` is the only place that turns errors into
exit codes.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib.metadata import version

import click

from pipeline.cli.asking import Group
from pipeline.cli.checks import report, verify
from pipeline.cli.commands import build, completion, demo, export, stats
from pipeline.cli.custody import diff, gc, history, pin
from pipeline.cli.evaluating import evaluate
from pipeline.cli.logs import is_json, logging_units, say
from pipeline.cli.nights import nightly, status
from pipeline.cli.planning import classes, manifest, manifests, plan, schedule
from pipeline.cli.show import name as one_line
from pipeline.cli.show import safe
from pipeline.cli.training import train
from pipeline.errors import EngineError, EvenshardError, UsageError
from pipeline.ingest.whoami import ray_job
from pipeline.store import redact, spare_pandas

INTERRUPTED = 130

_STOPPED = {
    "build": "nothing was published; what it finished is kept, run it again to go on",
    "export": "whole tars are kept, no other is there; run it again to go on",
    "gc": "what was removed belonged to collected snapshots alone; run it again to finish",
    "schedule": "either all of its manifests were added, or none",
    "train": "checkpoints that were written are whole; --resume goes on from the newest",
    "": "nothing was changed",
}


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(version("evenshard"), prog_name="evenshard")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the tracebacks of errors.")
def cli() -> None:
    """Class-balanced training epochs from one stored copy of your images.

    Exit codes: 0 done; 1 the call was well formed and could not be done (nothing at that place, storage failed, a
    check or a guardrail said no); 2 the call is wrong by itself (an unknown option, a value that is none, options that
    contradict each other, a name that cannot exist); 130 interrupted.
    """


for _command in (
    *(
        build,
        classes,
        completion,
        demo,
        diff,
        evaluate,
        export,
        gc,
        history,
        manifest,
        manifests,
        nightly,
        pin,
        plan,
        report,
    ),
    *(schedule, stats, status, train, verify),
):
    cli.add_command(_command)


def run(command: click.Command, arguments: Sequence[str] | None = None) -> int:
    """Run ``command`` and return its exit code; jobs share this with the command line."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        _refuse_credentials(given)
        with _terminable(), logging_units():
            code = command.main(
                args=given, prog_name=None if arguments is None else command.name, standalone_mode=False
            )
        return code if isinstance(code, int) else 0  # of a command that says how it ended: click returns it
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.Abort as stop:
        _tell("stopped", str(stop) or _STOPPED.get(_command_of(command, given), _STOPPED[""]))
        return INTERRUPTED
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(shown)
        if is_json():
            _tell("error", error.format_message())
        else:
            click.echo(redact(safe(shown.getvalue())), err=True, nl=False)
        return error.exit_code
    except BrokenPipeError:
        # The reader (head, less) closed; point stdout elsewhere so that the interpreter's last flush is quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if "--debug" in given or os.environ.get("EVENSHARD_TRACEBACK"):
            say(traceback.format_exc().rstrip(), event="traceback")
        if isinstance(error, EvenshardError):
            # A name with a line break must not make up a line of its own; what Ray says has lines of its own.
            _tell("error", safe(str(error)) if isinstance(error, EngineError) else one_line(str(error)))
            return error.exit_code
        what = safe(f"{type(error).__name__}: {error}")
        _tell("error", f"{what}\nThis is a fault of evenshard: please report it with what --debug prints.")
        return 1


def _refuse_credentials(given: Sequence[str]) -> None:
    """Ray lists the command line of a job to whoever may list jobs, and writes it to its logs."""
    shown = [redact(word) for word in given if redact(word) != word]
    if shown and ray_job():
        raise UsageError(
            f"the command line of this Ray job holds credentials ({', '.join(shown)} and what was cut off there), and "
            "Ray shows it to all who can list jobs. Renew them; then name the place in a build file (--config FILE), "
            "or let the nodes have the permission (an instance role, a mounted profile)"
        )


@contextmanager
def _terminable() -> Generator[None]:
    """SIGTERM is Ctrl-C: schedulers end a job so, and what it holds is to be given back."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _command_of(command: click.Command, given: Sequence[str]) -> str:
    """The name of the command that ran: of a group, the first word that names one."""
    if not isinstance(command, click.Group):
        return command.name or ""
    return next((word for word in given if word in command.commands), "")


def _tell(word: str, message: str) -> None:
    say(message, event=word, level="error")


def main() -> None:
    """Entry point of the ``evenshard`` command."""
    spare_pandas()
    sys.exit(run(cli))

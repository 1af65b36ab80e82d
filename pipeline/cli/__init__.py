"""`evenshard`: thin commands over the public names.

In: a command line. Out: text for people (JSON on request) and an exit code: 0 done, 1 failed, 2 wrong usage.
Guarantees: commands that only read or plan import neither Ray nor torch; a failure prints one message, never a
traceback, unless EVENSHARD_TRACEBACK is set; ``run`` is the only place that turns errors into exit codes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

import click

from pipeline.cli.checks import report, verify
from pipeline.cli.commands import build, demo, export, manifest, manifests, stats
from pipeline.cli.custody import diff, gc, history, pin
from pipeline.cli.show import safe
from pipeline.errors import EvenshardError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(version("evenshard"), prog_name="evenshard")
def cli() -> None:
    """Class-balanced training epochs from one stored copy of your images."""


for _command in (build, demo, diff, export, gc, history, manifest, manifests, pin, report, stats, verify):
    cli.add_command(_command)


def run(command: click.Command, arguments: Sequence[str] | None = None) -> int:
    """Run ``command`` and return its exit code; jobs share this with the command line."""
    try:
        command.main(args=None if arguments is None else list(arguments), standalone_mode=False)
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.Abort:
        click.echo("stopped; finished units are kept, the same command goes on from here", err=True)
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except EvenshardError as error:
        if os.environ.get("EVENSHARD_TRACEBACK"):
            raise
        click.echo(f"error: {safe(str(error))}", err=True)
        return error.exit_code
    except BrokenPipeError:
        # The reader (head, less) closed; point stdout elsewhere so that the interpreter's last flush is quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def main() -> None:
    """Entry point of the ``evenshard`` command."""
    sys.exit(run(cli))

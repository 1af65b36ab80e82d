"""What every command shares: examples in its help, suggestions for mistyped names, --debug, names for completion."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import click


class Stopped(click.Abort):
    """Interrupted; the message says how far it came."""


class Command(click.Command):
    """A command with examples, which tests run, and ``--debug``."""

    def __init__(self, *args: Any, examples: tuple[str, ...] = (), **options: Any) -> None:
        super().__init__(*args, **options)
        self.examples = examples
        # Read by ``pipeline.cli.run``, which sees errors that come before options are parsed, too.
        self.params.append(
            click.Option(["--debug"], is_flag=True, expose_value=False, help="Show the tracebacks of errors.")
        )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:  # of several that are near, the nearest
            near = difflib.get_close_matches(error.option_name, error.possibilities or (), n=1)
            raise click.NoSuchOption(error.option_name, possibilities=near, ctx=ctx) from None

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.examples:
            with formatter.section("Examples"):
                for example in self.examples:
                    formatter.write(f"{'':{formatter.current_indent}}evenshard {example}\n")


AT = click.option("--at", type=click.IntRange(1), metavar="N", help="A snapshot other than the newest.")
JSON = click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
QUIET = click.option("--quiet", is_flag=True, help="No progress.")


def one_of(**given: object) -> None:
    """Refuse options that contradict each other: at most one of ``given`` may be set."""
    chosen = [
        "--" + name.rstrip("_").replace("_", "-") for name, value in given.items() if value not in (None, False, ())
    ]
    if len(chosen) > 1:
        raise click.UsageError(f"{' and '.join(chosen)} contradict each other: give one of them")


def command(*, examples: tuple[str, ...] = (), **options: Any) -> Callable[[Callable[..., None]], Command]:
    """``click.command`` for a ``Command``."""
    return click.command(cls=Command, examples=examples, **options)


class Group(click.Group):
    """A group that says which command was probably meant."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"The commands are {', '.join(self.list_commands(ctx))}."
            ctx.fail(f"No such command {args[0]!r}. {hint}")
        return super().resolve_command(ctx, args)


# -- completion: names that a shell offers -----------------------------------------------------------------------------


def policy_names(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Policies and compositions."""
    from pipeline.plan.policy import NAMES, PRESETS

    return [name for name in (*NAMES, *PRESETS) if name.startswith(incomplete)]


def manifest_names(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """The manifests of ROOT, as far as it was typed and opens; a shell shows no errors."""
    from pipeline.errors import EvenshardError
    from pipeline.snapshot import open_snapshot

    try:
        return [name for name in open_snapshot(context.params["root"]).manifests if name.startswith(incomplete)]
    except (EvenshardError, KeyError, TypeError):
        return []


def loss_names(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """The losses of a training."""
    from pipeline.learn.recipe import LOSSES

    return [name for name in LOSSES if name.startswith(incomplete)]


def model_names(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """The models of a training, where torchvision is installed."""
    try:
        from pipeline.learn.models import model_names as known
    except ModuleNotFoundError:
        return []
    return [name for name in known() if name.startswith(incomplete)]

"""Whether a command of `deploy/` is a real one: its program, its flags, the files, units and objects that it names."""

from __future__ import annotations

import importlib
import io
import re
import shlex
import warnings
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import yaml

TOP = Path(__file__).parents[1]
DEPLOY = TOP / "deploy"


class Broken(ValueError):
    """A file of `deploy/` that would not do what it says."""


def check_command(words: Sequence[str]) -> None:
    """Broken unless these words, as a shell would pass them on, are a command that exists and whose flags parse."""
    words = list(words)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        del words[0]
    if not words:
        raise Broken("no command")
    program = words[0].removeprefix("/opt/evenshard/bin/")
    if program not in PROGRAMS:
        raise Broken(f"{words[0]} is no program that these files may use: {' '.join(words)}")
    PROGRAMS[program](words[1:])


def check_line(line: str) -> None:
    """The same for a line of shell, of several commands perhaps."""
    for part in re.split(r"\s*(?:;|&&)\s*", line):
        check_command(shlex.split(part, comments=True))


def _check_click(command: click.Command, name: str, arguments: Sequence[str]) -> None:
    def parse(command: click.Command, name: str, arguments: list[str], parent: click.Context | None) -> None:
        with command.make_context(name, arguments, parent=parent) as context:
            if isinstance(command, click.Group):
                rest = [*context._protected_args, *context.args]
                found, chosen, others = command.resolve_command(context, rest)
                assert chosen is not None
                parse(chosen, found or "", others, context)

    try:
        with redirect_stdout(io.StringIO()):
            parse(command, name, list(arguments), None)
    except click.exceptions.Exit:
        pass  # --help and --version
    except click.ClickException as error:
        raise Broken(f"{name} {' '.join(arguments)}: {error.format_message()}") from error


def _evenshard(arguments: list[str]) -> None:
    from pipeline.cli import cli

    _check_click(cli, "evenshard", arguments)


def _ray(arguments: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Ray's own modules
        from ray.scripts.scripts import cli

        _check_click(cli, "ray", arguments)
    if arguments[:2] == ["job", "submit"] and "--" in arguments:
        check_command(arguments[arguments.index("--") + 1 :])
    if arguments[0] == "exec":
        check_line(arguments[2])
    if arguments[0] in ("up", "down", "exec"):
        _exists(arguments[1])


def _python(arguments: list[str]) -> None:
    if arguments[:2] == ["-m", "venv"]:
        return
    if len(arguments) < 2 or arguments[0] != "-m" or not re.fullmatch(r"jobs\.\w+", arguments[1]):
        raise Broken(f"python runs a module of jobs, not: {' '.join(arguments)}")
    try:
        module = importlib.import_module(arguments[1])
    except ImportError as error:
        raise Broken(f"there is no {arguments[1]}") from error
    commands = [value for value in vars(module).values() if isinstance(value, click.Command)]
    _check_click(commands[0], arguments[1], arguments[2:])


def _timeout(arguments: list[str]) -> None:
    """GNU timeout: options, a duration, a command."""
    known = r"--signal=(INT|TERM)|--kill-after=\d+[smhd]?|--foreground"
    while arguments and arguments[0].startswith("-"):
        if not re.fullmatch(known, arguments[0]):
            raise Broken(f"timeout has no {arguments[0]}")
        arguments = arguments[1:]
    if not arguments or not re.fullmatch(r"\d+[smhd]?", arguments[0]):
        raise Broken(f"timeout wants a duration before the command: {' '.join(arguments)}")
    check_command(arguments[1:])


_KUBECTL = {
    "apply": {"-f"},
    "create": {"-f", "--from", "--from-file"},
    "delete": set(),
    "describe": set(),
    "exec": set(),
    "get": {"--sort-by", "--selector"},
    "logs": set(),
    "patch": {"--patch"},
    "port-forward": set(),
}


def _kubectl(arguments: list[str]) -> None:
    if arguments[:1] == ["-n"]:
        if arguments[1] != "evenshard":
            raise Broken(f"no namespace of ours: {arguments[1]}")
        arguments = arguments[2:]
    (verb, *rest), inner = _cut(arguments)
    if verb not in _KUBECTL or (verb == "exec") != bool(inner):
        raise Broken(f"kubectl {' '.join(arguments)}")
    for word, after in pairwise([*rest, ""]):
        flag, _, value = word.partition("=")
        if flag.startswith("-"):
            _kubectl_flag(verb, flag, value or after)
    for kind, name in re.findall(r"\b(cronjob|raycluster|svc)[ /](\S+)", " ".join(rest)):
        if f"{kind}/{name}" not in _objects():
            raise Broken(f"there is no {kind} {name} in these files")
    if inner:
        check_command(inner)


def _kubectl_flag(verb: str, flag: str, value: str) -> None:
    if flag not in _KUBECTL[verb]:
        raise Broken(f"kubectl {verb} has no {flag} here")
    if flag in ("-f", "--from-file"):
        _exists(value)
    if flag == "--from" and value not in _objects():
        raise Broken(f"there is no {value} in these files")
    if flag == "--patch":
        yaml.safe_load(value)


def _cut(arguments: list[str]) -> tuple[list[str], list[str]]:
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def _objects() -> set[str]:
    """What these files create, by kind and name; the operator adds the head's service."""
    names = {
        f"{document['kind'].lower()}/{document['metadata'].get('name')}"
        for path in DEPLOY.glob("*.yaml")
        for document in yaml.safe_load_all(path.read_text())
        if isinstance(document, dict) and "kind" in document
    }
    return names | {f"svc/{name.removeprefix('raycluster/')}-head-svc" for name in names if "raycluster/" in name}


def _docker(arguments: list[str]) -> None:
    options = dict(zip(arguments[1:-1:2], arguments[2:-1:2], strict=True))
    if arguments[0] != "build" or arguments[-1] != "." or set(options) != {"-f", "--target", "-t"}:
        raise Broken(f"docker {' '.join(arguments)}")
    _exists(options["-f"])
    if f" AS {options['--target']}\n" not in (TOP / options["-f"]).read_text():
        raise Broken(f"{options['-f']} has no target {options['--target']}")


def _systemctl(arguments: list[str]) -> None:
    verb, *units = [word for word in arguments if word != "--now"]
    if verb not in ("start", "stop", "enable", "status", "daemon-reload", "list-timers", "edit"):
        raise Broken(f"systemctl has no {verb} here")
    for unit in units:
        _exists(f"deploy/systemd/{unit}")


def _journalctl(arguments: list[str]) -> None:
    if arguments[0] != "--unit" or arguments[2:] != ["--since", "yesterday"]:
        raise Broken(f"journalctl {' '.join(arguments)}")
    _exists(f"deploy/systemd/{arguments[1]}")


def _pip(arguments: list[str]) -> None:
    if arguments[0] != "install":
        raise Broken(f"pip {' '.join(arguments)}")
    for flag, value in pairwise(arguments):
        if flag == "--requirement":
            _exists(value)
    if "--no-deps" not in arguments:
        raise Broken("pip installs what a lock names, and no more")


def _install(arguments: list[str]) -> None:
    for word in arguments:
        if word.startswith("deploy/"):
            _exists(word)


def _anything(arguments: list[str]) -> None:
    """A tool of every system, whose arguments are no concern of ours."""


def _exists(path: str) -> None:
    if not (TOP / path).is_file():
        raise Broken(f"there is no file {path}")


PROGRAMS: dict[str, Any] = {
    "docker": _docker,
    "evenshard": _evenshard,
    "install": _install,
    "journalctl": _journalctl,
    "kubectl": _kubectl,
    "pip": _pip,
    "python": _python,
    "python3.11": _python,
    "ray": _ray,
    "systemctl": _systemctl,
    "timeout": _timeout,
    **dict.fromkeys(("chmod", "df", "mkdir", "rm", "ulimit", "useradd"), _anything),
}


def commands_in_comments(text: str) -> Iterator[str]:
    """Of a file whose comments show how it is used: lines of a '#' and three blanks or more."""
    for line in re.findall(r"^#   +(\S.*)$", text, re.MULTILINE):
        yield re.split(r"\s{2,}\(", line)[0]


def commands_in_markdown(text: str) -> Iterator[str]:
    """Lines of bash blocks, and what begins like a command within sentences."""
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield from filter(None, (line.strip() for line in block.splitlines()))
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`([^`\n]+)`", prose):
        if re.match(r"(evenshard|ray|kubectl|systemctl|journalctl|python) \S", code) and code != "ray job submit":
            yield code

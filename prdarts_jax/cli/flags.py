"""Command lines: words to values and config fields, help, and the table of `--print-config`. No jax, no numpy."""

from __future__ import annotations

import argparse
import difflib
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from prdarts_jax.config import schema
from prdarts_jax.config.places import expanded
from prdarts_jax.errors import UserError
from prdarts_jax.presets.merge import OPTIONS, TRANSFORMS, Preset


class Argument:
    """A word or a flag of a command line, as `argparse.ArgumentParser.add_argument` takes it."""

    def __init__(self, *names: str, **options: Any) -> None:
        self.names, self.options = names, options


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are a UserError, so that every error is the same single line."""

    def __init__(self, command: str, arguments: Iterable[Argument], **kwargs: Any) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=f"prdarts {command}", allow_abbrev=False, formatter_class=formatter, **kwargs)
        for argument in arguments:
            self.add_argument(*argument.names, **argument.options)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse, but a word that does not belong is an error with the nearest flag."""
        parsed, extra = self.parse_known_args(args, namespace)
        for word in extra:
            if word.startswith("--"):
                raise no_flag(word.partition("=")[0], self._option_string_actions, self.prog)
        if extra:
            self.error(f"unexpected {extra[0]!r}")
        return parsed

    def error(self, message: str) -> NoReturn:
        """Where argparse would print the usage and leave."""
        raise UserError(f"{message} (see {self.prog} --help)")


@dataclass(frozen=True)
class FixedCommand:
    """A command whose words are a fixed list of arguments: called with the words that follow its name."""

    name: str
    description: str
    arguments: Sequence[Argument]
    function: Callable[[argparse.Namespace], int]

    def __call__(self, words: Sequence[str]) -> int:
        """Parses the words and does what the command does; the exit status."""
        return self.function(Parser(self.name, self.arguments, description=self.description).parse_args(words))


def command(
    name: str, description: str, *arguments: Argument
) -> Callable[[Callable[[argparse.Namespace], int]], FixedCommand]:
    """Makes a command of a function of parsed arguments: a function of the words that follow the command's name.

    >>> @command("twice", "A number, twice.", Argument("number", type=int))
    ... def twice(args):
    ...     return 2 * args.number
    >>> twice(["21"])
    42
    """
    return functools.partial(FixedCommand, name, description, arguments)


def no_flag(name: str, known: Iterable[str], command_line: str) -> UserError:
    """The error for a flag that does not exist, with the nearest one if there is one."""
    same = {flag.replace("-", "_"): flag for flag in known}
    near = difflib.get_close_matches(name.replace("-", "_"), same, n=1)
    hint = f"did you mean {same[near[0]]}? " if near else ""
    return UserError(f"flag: unknown {name}; {hint}({command_line} --help lists all)")


def existing_folder(name: str) -> Path:
    """The folder that a command is to read."""
    folder = expanded(name, "WORKDIR")
    if not folder.is_dir():
        raise UserError(f"WORKDIR: no directory {name!r}")
    return folder


# --- flags of config fields -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """A command that runs something: its flags are the fields of a config class, and some of its own."""

    name: str  # search | train | pipeline
    kind: type  # the config class
    aliases: Mapping[str, str]  # short flag -> config path; every other field is its path, `--arch.beta1 0.9`
    own: Sequence[Argument]  # the flags that are no config fields; one with a metavar takes a value
    intro: str  # of the help
    presets: Mapping[str, Preset]


class CommandLine(NamedTuple):
    """The words after the name of a `Command`, taken apart."""

    fields: dict[str, Any]  # dotted config path -> string or bool
    rest: list[str]  # the own flags, and words that are no flags
    again: list[str]  # all but what is for one start alone: --overwrite would lose the run, a time limit end it again


def split(words: Sequence[str], command: Command) -> CommandLine:
    """Tells the flags of config fields from the other words.

    Raises:
      UserError: a flag that does not exist (with the nearest one), or a flag without its value.

    >>> from prdarts_jax.cli.search import SEARCH
    >>> words = ["--space.head-norm=false", "--cells", "5", "--no-data.flip", "--preset", "digits"]
    >>> split(words, SEARCH)[:2]
    ({'space.head_norm': 'false', 'space.cells': '5', 'data.flip': False}, ['--preset', 'digits'])
    """
    hints = {path: hint for path, hint, _ in schema.fields(command.kind)}
    takes_value = {_plain(argument.names[0]): "metavar" in argument.options for argument in command.own}
    takes_value["help"] = False
    line, queue = CommandLine({}, [], []), list(words)
    while queue:
        word = queue.pop(0)
        taken = [word]
        name, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or _plain(name) in takes_value:
            if word.startswith("--") and takes_value[_plain(name)] and not equals and queue:
                taken.append(queue.pop(0))
            line.rest.extend(taken)
            line.again.extend(taken)
            continue
        path, negated = _find(name, hints, command)
        # An option's type is known by its strategy only: without a value it is a switch, and the strategy objects.
        switch = hints.get(path) is bool or OPTIONS in path
        if negated and (equals or not switch):
            raise UserError(f"{path}: --{name} takes no value; allowed: a true | false field")
        value: str | bool = text if equals else not negated
        if not equals and not negated and queue and not queue[0].startswith("--"):
            value = queue.pop(0)
            taken.append(value)
        elif not equals and not switch:
            raise UserError(f"{path}: --{name} needs a value")
        # Transforms are given one a flag: a comma is between the options of one.
        line.fields[path] = [*line.fields.get(path, []), value] if path.endswith(TRANSFORMS) else value
        if path not in ("run.overwrite", "run.time_limit"):
            line.again.extend(taken)
    return line


def _plain(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _find(name: str, fields: Mapping[str, Any], command: Command) -> tuple[str, bool]:
    """The config path that a flag means, and whether the flag negates it."""
    aliases = {_plain(alias): path for alias, path in command.aliases.items()}
    plain, options = _plain(name), next((path for path in fields if f"{path}.".endswith(OPTIONS)), "")
    stage = options.removesuffix("method.options")  # of several parts of a config the one that has a method
    positive = re.sub(r"^no_|(?<=\.)no_(?=[^.]*$)", "", plain, count=1)  # no_data.flip and data.no_flip: data.flip
    for spelled, negated in ((plain, False), (positive, True)):
        path = aliases.get(spelled, spelled)
        if path in fields and path != options:
            return path, negated
        of_method = path.removeprefix(stage)
        option = of_method.removeprefix("method.").removeprefix("options.")
        is_option = of_method.startswith("method.") and option and options
        if is_option and (negated or plain == positive):
            return f"{stage}{OPTIONS}{option}", negated
    known = [f"--{alias}" for alias in command.aliases] + [argument.names[0] for argument in command.own] + ["--help"]
    known += [f"--{path}" for path in fields if path != options]
    raise no_flag(f"--{name}", known, f"prdarts {command.name}")


def help_text(command: Command) -> str:
    """The help of a command: its own flags, then a line a config field with its default and comment."""
    aliases = {path: alias for alias, path in command.aliases.items()}
    comments, default = schema.comments(command.kind), command.kind()
    own = [(" ".join([a.names[0], a.options.get("metavar", "")]).strip(), a.options["help"]) for a in command.own]
    sections: dict[str, list[tuple[str, str]]] = {"": own}
    for path, _, _ in schema.fields(command.kind):
        section, value = path.rpartition(".")[0], schema.get(default, path)
        spelled = path if section else path.replace("_", "-")
        flag = f"--{aliases[path]}, --{spelled}" if aliases.get(path, spelled) != spelled else f"--{spelled}"
        row = (flag, comments[path] + (f" (default: {shown(value)})" if value != "" else ""))
        if f"{path}.".endswith(OPTIONS):
            flag = path.removesuffix("options") + "NAME"
            row = (f"--{flag}", "an option of the strategy (prdarts strategies lists them)")
        sections.setdefault(section, []).append(row)
    width = max(len(flag) for section, rows in sections.items() for flag, _ in rows) + 2
    lines = [*command.intro.splitlines(), ""]
    for section, rows in sections.items():
        heading = (type(schema.get(default, section)).__doc__ or "").splitlines()[0] if section else ""
        lines += [f"{section}: {heading}"] if section else []
        lines += [f"  {flag:<{width}}{text}" for flag, text in rows] + [""]
    lines += ["Summary of the presets:"]
    lines += [f"  {name:<{width}}{preset.summary}" for name, preset in command.presets.items()]
    return "\n".join(lines)


def shown(value: Any) -> str:
    """A value as the command line spells it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple) and value and all(isinstance(item, str) for item in value):
        return ",".join(value)
    return json.dumps(value) if isinstance(value, list | tuple | dict) or value == "" else str(value)


def print_config(rows: Sequence[tuple[str, Any, str]], as_json: bool) -> None:
    """Prints every (dotted path, value, source)."""
    if as_json:
        print(json.dumps({path: {"value": value, "source": source} for path, value, source in rows}, indent=1))
        return
    width = max(len(path) for path, _, _ in rows)
    longest = max(len(text) for _, value, _ in rows if len(text := shown(value)) <= 40)
    for path, value, source in rows:
        print(f"{path:<{width}} = {shown(value):<{longest}}  # {source}")

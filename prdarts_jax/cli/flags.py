"""Flags from config classes: parsing, help, and the table of `--print-config`. Imports neither jax nor numpy."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from prdarts_jax import presets
from prdarts_jax.config import schema
from prdarts_jax.errors import UserError
from prdarts_jax.presets import merge

# The flags worth a short name in every command that runs something: flag -> config path.
COMMON: Mapping[str, str] = {
    "data": "data.source",
    "data-dir": "run.data_dir",
    "workdir": "run.workdir",
    "epochs": "epochs",
    "batch-size": "batch_size",
    "seed": "seed",
    "dtype": "dtype",
    "devices": "run.devices",
    "checkpoint-every": "run.checkpoint_every",
    "checkpoint-minutes": "run.checkpoint_minutes",
    "steps-per-dispatch": "run.steps_per_dispatch",
    "time-limit": "run.time_limit",
    "overwrite": "run.overwrite",
    "local-batch-norm": "local_batch_norm",
    "weight-tx": "weights.transform",
    "progress": "run.progress",
    "tensorboard": "run.tensorboard",
}


@dataclass(frozen=True)
class Command:
    """A command whose flags are the fields of a config class."""

    name: str  # search | train
    kind: type  # the config class
    aliases: Mapping[str, str]  # short flag -> config path; every other field is its path, `--arch.beta1 0.9`
    own: Mapping[str, str]  # flags that are no config fields -> help; "NAME VALUE" takes a value
    intro: str  # of the help
    presets: Mapping[str, merge.Preset]

    @property
    def own_names(self) -> dict[str, bool]:
        """Own flags, and whether they take a value."""
        return {words.split()[0].lstrip("-").replace("-", "_"): " " in words for words in self.own} | {"help": False}


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are a UserError, so that every error is the same single line."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog=prog, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse, but a word that does not belong is an error with the nearest flag."""
        parsed, extra = self.parse_known_args(args, namespace)
        for word in extra:
            if word.startswith("--"):
                raise no_flag(word.partition("=")[0], self._option_string_actions, f"{self.prog} --help")
        if extra:
            raise UserError(f"unexpected {extra[0]!r} (see {self.prog} --help)")
        return parsed

    def error(self, message: str) -> NoReturn:
        """Where argparse would print the usage and leave."""
        raise UserError(f"{message} (see {self.prog} --help)")


def _find(name: str, fields: Mapping[str, Any], short: Mapping[str, str]) -> tuple[str, bool] | None:
    """The config path a flag means, and whether the flag negates it; None for no config field."""
    name = name.replace("-", "_")
    aliases = {flag.replace("-", "_"): path for flag, path in short.items()}
    for spelled, negated in ((name, False), (_without_no(name), True)):
        path = aliases.get(spelled, spelled)
        if path in fields and path != "method.options":
            return path, negated
        option = path.removeprefix("method.").removeprefix("options.")
        if path.startswith("method.") and option and (negated or not _without_no(name)):
            return f"{presets.OPTIONS}{option}", negated
    return None


def _without_no(name: str) -> str:
    """`no_data.flip` or `data.no_flip` as `data.flip`; empty if there is no `no`."""
    if name.startswith("no_"):
        return name.removeprefix("no_")
    section, dot, last = name.rpartition(".")
    return f"{section}{dot}{last.removeprefix('no_')}" if last.startswith("no_") else ""


def split_flags(words: Sequence[str], command: Command) -> tuple[dict[str, Any], list[str]]:
    """Takes the flags of config fields out of a command line.

    Args:
      words: the command line after the command.
      command: whose flags they are.

    Returns:
      dotted path -> string or bool, and the other words.

    Raises:
      UserError: a flag that does not exist (with the nearest one), or a flag without its value.
    """
    fields = {path: hint for path, hint, _ in schema.fields(command.kind)}
    own = command.own_names
    found: dict[str, Any] = {}
    rest: list[str] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name.replace("-", "_") in own:
            rest.append(word)
            if word.startswith("--") and not equals and own[name.replace("-", "_")] and queue:
                rest.append(queue.pop(0))
            continue
        match = _find(name, fields, command.aliases)
        if match is None:
            spelled = (flag.replace("_", "-") for flag in sorted(own))
            known = [f"--{flag}" for flag in (*command.aliases, *spelled, *fields) if flag != "method.options"]
            raise no_flag(f"--{name}", known, f"prdarts {command.name} --help")
        path, negated = match
        follows = bool(queue) and not queue[0].startswith("--")
        # An option's type is known by its strategy only: without a value it is a switch, and the strategy objects.
        switch = fields.get(path) is bool or path.startswith(presets.OPTIONS)
        if negated:
            if equals or not switch:
                raise UserError(f"{path}: --{name} takes no value; allowed: a true | false field")
            found[path] = False
        elif equals:
            found[path] = value
        elif follows:
            found[path] = queue.pop(0)
        elif switch:
            found[path] = True
        else:
            raise UserError(f"{path}: --{name} needs a value")
    return found, rest


def to_go_on(words: Sequence[str], command: Command) -> list[str]:
    """A command line without what is for one start alone: `--overwrite` would lose the run, a time limit end it again.

    Args:
      words: the command line after the command, as `split_flags` takes it.
      command: whose flags they are.
    """
    fields = {path: hint for path, hint, _ in schema.fields(command.kind)}
    own, kept, queue = command.own_names, [], list(words)
    while queue:
        word = queue.pop(0)
        name, equals, _ = word.removeprefix("--").partition("=")
        is_own = name.replace("-", "_") in own
        match = _find(name, fields, command.aliases) if word.startswith("--") and not is_own else None
        if match is None or match[0] not in ("run.overwrite", "run.time_limit"):
            kept.append(word)
        elif not equals and not match[1] and queue and not queue[0].startswith("--"):
            queue.pop(0)
    return kept


def no_flag(given: str, known: Iterable[str], where: str) -> UserError:
    """The error for a flag that does not exist, with the nearest one if there is one."""
    same = {flag.replace("-", "_"): flag for flag in known}
    near = difflib.get_close_matches(given.replace("-", "_"), same, n=1)
    hint = f"did you mean {same[near[0]]}? " if near else ""
    return UserError(f"flag: unknown {given}; {hint}({where} lists all)")


def help_text(command: Command) -> str:
    """The help of a command: its own flags, then a line a config field with its default and comment."""
    short = {path: flag for flag, path in command.aliases.items()}
    comments, default = schema.comments(command.kind), command.kind()
    sections: dict[str, list[tuple[str, str]]] = {"": []}
    for path, _, _ in schema.fields(command.kind):
        section, value = path.rpartition(".")[0], schema.get(default, path)
        if path == "method.options":
            row = ("--method.NAME", "an option of the strategy (prdarts strategies lists them)")
        else:
            flags = [f"--{path.replace('_', '-') if not section else path}"]
            if path in short and short[path] != path.replace("_", "-"):
                flags.insert(0, f"--{short[path]}")
            row = (", ".join(flags), comments[path] + (f" (default: {shown(value)})" if value != "" else ""))
        sections.setdefault(section, []).append(row)
    docs = {name: type(schema.get(default, name)).__doc__ or "" for name in sections if name}
    width = max(len(flag) for rows in sections.values() for flag, _ in rows) + 2
    lines = [*command.intro.splitlines(), ""]
    for section, rows in [("", [*command.own.items(), *sections.pop("")]), *sections.items()]:
        lines += [f"{section}: {docs[section].splitlines()[0]}"] if section else []
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


def compilation_cache() -> None:
    """Compiled programs are kept in the user's cache directory, so that another seed starts without compiling.

    JAX reads the environment when it is imported; what the user has set there wins.
    """
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no home directory: every start compiles
        return
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(base / "prdarts_jax" / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


def interrupted(result: Any, workdir: Path, command: str) -> int | None:
    """Says that a run was left early and how it goes on; the exit status of a signal, or None."""
    if result.status == "interrupted":
        print(f"stopped, and saved in {workdir}; to go on: {command}")
        return 128 + (result.signum or signal.SIGINT)
    if result.status == "time-limit":
        print(f"the time limit is reached, saved in {workdir}; to go on: {command}")
    return None

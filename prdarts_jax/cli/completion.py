"""`prdarts completion`: the script by which a shell completes commands, flags, names and files."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prdarts_jax.cli.flags import Argument, Command
from prdarts_jax.config import schema
from prdarts_jax.strategies import composition, registry

SHELLS = ("bash", "zsh")
_FOLDERS, _FILES = ("DIR", "WORKDIR"), ("FILE", "NAME")  # metavars of arguments that may be one


def script(shell: str, commands: Mapping[str, tuple[str, Sequence[Argument]]]) -> str:
    """The completion of `prdarts` for a shell; nothing of the library runs when it is used.

    Args:
      shell: one of SHELLS.
      commands: name -> (one line, its arguments).

    >>> "prdarts" in script("bash", {"zoo": ("published cells", [Argument("--json", action="store_true")])})
    True
    """
    import shtab

    parser = argparse.ArgumentParser("prdarts")
    parser.add_argument("--version", action="store_true", help="print the version")
    of_command = parser.add_subparsers()
    for name, (summary, arguments) in commands.items():
        one = of_command.add_parser(name, help=summary, description=summary)
        for argument in arguments:
            action: Any = one.add_argument(*argument.names, **argument.options)
            if action.choices is None and action.metavar in (*_FOLDERS, *_FILES):
                action.complete = shtab.DIRECTORY if action.metavar in _FOLDERS else shtab.FILE
    return shtab.complete(parser, shell)


def flags(command: Command) -> list[Argument]:
    """The flags of a command that runs something: its own and those of the config fields, with the names they take."""
    from prdarts_jax.space import genotype

    names = {
        "method.strategy": [row.name for row in registry.rows()],
        "method.transforms": list(composition.TRANSFORMS),
    }
    own = {"--preset": list(command.presets), "--genotype": genotype.names()}
    found = [_with_choices(argument, own.get(argument.names[0])) for argument in command.own]
    aliases = {path: alias for alias, path in command.aliases.items()}
    comments = schema.comments(command.kind)
    for path, hint, _ in schema.fields(command.kind):
        spelled = dict.fromkeys(f"--{name}" for name in (aliases.get(path, path), path))
        if hint is bool:
            found.append(Argument(*spelled, action="store_true", help=comments[path]))
            found.append(Argument(*(f"--no-{flag[2:]}" for flag in spelled), action="store_true", help=comments[path]))
        elif path != "method.options":
            folder = path in ("run.workdir", "run.data_dir")
            flag = Argument(*spelled, metavar="DIR" if folder else "VALUE", help=comments[path])
            found.append(_with_choices(flag, names.get(path)))
    return found


def _with_choices(argument: Argument, choices: Iterable[str] | None) -> Argument:
    return argument if choices is None else Argument(*argument.names, **argument.options, choices=choices)

"""`prdarts search --sweep` and `--population`: from flags to a sweep, and the last lines of a population."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prdarts_jax.cli import flags as cli_flags
from prdarts_jax.config import schema
from prdarts_jax.config.search import SearchConfig
from prdarts_jax.errors import UserError
from prdarts_jax.presets.merge import Resolved
from prdarts_jax.searching import sweep as sweeps

if TYPE_CHECKING:
    from prdarts_jax.searching.population import PopulationResult

FLAGS: Mapping[str, str] = {
    "--sweep NAME=VALUES": "a search for each value, A,B,C or A..B; several --sweep: for each combination",
    "--population N": "a search for each of the seeds S..S+N-1, S that of --seed",
}


def sweep_of(
    words: Sequence[str], population: str | None, flags: Mapping[str, Any], config: SearchConfig
) -> dict[str, list[str]]:
    """The sweep of a command line; empty without one.

    Args:
      words: the values of --sweep.
      population: the value of --population.
      flags: dotted config path -> value, of the other flags.
      config: what they make.

    Raises:
      UserError: a sweep that is not possible, or one of a field that has a flag of its own.
    """
    sweep = sweeps.parse(words)
    known = sweeps.sweepable(config)
    paths = {known[sweeps.find(name, config)]: name for name in sweep}
    for path, name in paths.items():
        if path in flags:
            raise UserError(f"flag: --sweep {name} and --{path} exclude each other")
    if population is not None:
        if "seed" in paths:
            raise UserError("flag: --sweep seed and --population exclude each other")
        number = schema.convert_scalar(int, population, "population")
        schema.require(1 <= number <= sweeps.MOST, "population", number, f"1..{sweeps.MOST}")
        sweep["seed"] = [str(config.seed + i) for i in range(number)]
    if sweep:
        sweeps.members(config, sweep, Path())  # refuses what is not possible before anything is shown or computed
    return sweep


def table(
    rows: Sequence[tuple[str, Any, str]], sweep: Mapping[str, Sequence[str]], resolved: Resolved
) -> list[tuple[str, Any, str]]:
    """The rows of `--print-config`, with all values of what is swept."""
    known = sweeps.sweepable(resolved.config)
    swept = {known[sweeps.find(name, resolved.config)]: values for name, values in sweep.items()}
    return [(p, ",".join(swept[p]), "sweep") if p in swept else (p, value, source) for p, value, source in rows]


def finish(result: PopulationResult, command: str) -> int:
    """The last lines of a population, and its exit status."""
    from prdarts_jax.report import data as report_data
    from prdarts_jax.report import sweep as report_sweep

    number, workdir = len(result.members), result.workdir
    if (status := cli_flags.interrupted(result, workdir, command)) is not None:
        return status
    if result.status == "already-finished":
        print(f"all {number} searches are finished already; --overwrite starts them again: {command} --overwrite")
    found = report_data.population(workdir)
    if result.report and found:
        runs = [report_data.read(folder) for folder in found.folders]
        print("\n".join(report_sweep.lines(report_sweep.settings(runs, found.swept))))
        print(f"report: {result.report}")
    if result.failures:
        from prdarts_jax.errors import RunError

        first, why = next(iter(result.failures.items()))
        more = f" (and {len(result.failures) - 1} more)" if len(result.failures) > 1 else ""
        raise RunError(f"population: {first} failed: {why}{more}")
    return 0

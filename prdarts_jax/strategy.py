"""The contract between a search method and everything else: one NamedTuple of pure functions, a rule and events.

A method is a factory `(*, space, **options) -> Strategy`, a transform a function `Strategy -> Strategy`. The loop, the
compiled step, checkpoints, plots and reports know methods through this contract alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import jax
import numpy as np

from prdarts_jax.bilevel import Rule, alternating
from prdarts_jax.errors import UserError
from prdarts_jax.gates import AnyArray, Gates
from prdarts_jax.space.derive import derive_pairs
from prdarts_jax.space.genotype import Genotype
from prdarts_jax.space.spec import Space

if TYPE_CHECKING:
    from jaxtyping import Float

Arch = Any  # the architecture parameters, a pytree
Memory = Any  # what a method keeps beside them, a pytree of arrays
Numbers = Mapping[str, Any]  # numbers that change between epochs, as scalars: they enter the compiled step as arrays
Tables: TypeAlias = Mapping[str, AnyArray]  # {"normal", "reduce"} -> [E,O]

ROLES = ("weights", "arch", "eval")  # for whose step gates are sampled; "eval": no randomness


class Probe(Protocol):
    """Losses of the search network on validation images without augmentation, at the weights of now.

    `batches` says how many batches of the validation images are used, from the first on; None: all.
    """

    def loss(self, arch: Arch, *, batches: int | None = 1) -> float:
        """Cross-entropy at the gates of role "eval"."""

    def grad(self, arch: Arch, *, batches: int | None = 1) -> Arch:
        """Its gradient in the architecture."""

    def hvp(self, arch: Arch, vector: Arch, *, radius: float | None = None, batches: int | None = 1) -> Arch:
        """Its Hessian times a vector.

        Exact by plain automatic differentiation (slow to compile on large spaces), or, with a radius r, the central
        difference [grad(a + r v/|v|) - grad(a - r v/|v|)] |v| / 2r of the gradient above.
        """

    def gates_loss(self, gates: Gates, *, batches: int | None = None, first: int = 0) -> float:
        """Cross-entropy at given gates, on the batches from the `first` on, around the end of the images."""

    def gates_accuracy(self, gates: Gates, *, batches: int | None = None, first: int = 0) -> float:
        """Share of images classified correctly at given gates, on the same batches."""


class View(NamedTuple):
    """What `at_epoch` sees, on the host.

    Attributes:
      epoch: number of the epoch that has ended, from 0, within the stage.
      epochs: of the stage.
      arch, memory: host arrays.
      metrics: the row of the epoch in metrics.jsonl.
      numbers: of the epoch, as in `Strategy.schedule`.
      genotype: what the whole strategy, transforms included, derives now.
      probe: losses on validation images; compiled when first asked for.
      hyperparameters: of the optimizers now, with the names that a `Rollback` sets.
      derive: arch -> what the whole strategy derives from it; None: nothing is around the strategy that is asked.
      seed: (seed of the search, epoch of the search), for `numpy.random.default_rng`: what a method draws on the host.
    """

    epoch: int
    epochs: int
    arch: Arch
    memory: Memory
    metrics: Mapping[str, Any]
    numbers: Numbers
    genotype: Genotype
    probe: Probe
    hyperparameters: Mapping[str, float] = {}
    derive: Callable[[Arch], Genotype] | None = None
    seed: tuple[int, int] = (0, 0)


class Continue(NamedTuple):
    """The search goes on, with this memory.

    Attributes:
      memory: from now on.
      arch: from now on, of a method whose architecture is not moved by gradients; None: it stays.
    """

    memory: Memory
    arch: Arch | None = None


class Stop(NamedTuple):
    """The search ends with this genotype."""

    genotype: Genotype
    reason: str


class Restage(NamedTuple):
    """A new stage begins: the factory is called again, on another space.

    Attributes:
      space: of the stage; it may differ from the one before in cells, channels, operations and partial channels.
      epochs: of the stage; None: what is left of those of the search.
      memory: of the stage; None: the one the new strategy begins with.
      options: of the factory, beside those it had.
      keep_weights: whether weights of operations that are still there are kept; those of an edge go with it.
    """

    space: Space
    epochs: int | None = None
    memory: Memory | None = None
    options: Mapping[str, Any] = {}
    keep_weights: bool = False


class Rollback(NamedTuple):
    """The search goes back to the end of an earlier epoch of the stage, at most `Strategy.horizon` epochs ago.

    Attributes:
      epoch: whose end it goes back to, as `View.epoch` counts.
      hyperparameters: of the optimizers from there on: `weights.weight_decay`, `weights.momentum`,
        `arch.weight_decay` -> value.
      memory: from there on; None: that of the earlier epoch.
    """

    epoch: int
    hyperparameters: Mapping[str, float] = {}
    memory: Memory | None = None


Event: TypeAlias = Continue | Stop | Restage | Rollback


def cross_entropy_alone(
    ce: Float[jax.Array, ""], arch: Arch, gates: Gates, memory: Memory, numbers: Numbers
) -> tuple[Float[jax.Array, ""], dict[str, jax.Array]]:
    """The objective of a method without penalties: (ce, no terms)."""
    del arch, gates, memory, numbers
    return ce, {}


class _Fields(NamedTuple):
    space: Space
    init: Callable[[jax.Array], Arch]
    schedule: Callable[[int, int], dict[str, float]]
    sample: Callable[[jax.Array, Arch, Memory, Numbers, str], Gates]
    probabilities: Callable[[Arch, Numbers], dict[str, jax.Array]]
    scores: Callable[[Arch], Tables]
    objective: Callable[..., tuple[jax.Array, dict[str, jax.Array]]] = cross_entropy_alone
    weight_objective: Callable[..., tuple[jax.Array, dict[str, jax.Array]]] | None = None
    select: Callable[[Tables], Genotype] | None = None
    derive: Callable[[Arch], Genotype] | None = None
    rule: Rule = alternating()
    memory: Memory = ()
    at_epoch: Callable[[View], Event | None] = lambda view: None
    horizon: int = 0
    stage_epochs: Callable[[int], int] = lambda epochs: epochs


def _refuse_old(fields: Mapping[str, Any]) -> None:
    """One line for the fields of version 0.1.0."""
    for name in ("expected", "penalty", "end_epoch", "traits"):
        if name in fields:
            raise UserError(
                f"method.strategy: a Strategy has no field {name!r} any more; allowed: sample(..., role) for "
                "expected, objective for penalty, at_epoch for end_epoch, rule for traits (docs/adding_a_method.md)"
            )


class Strategy(_Fields):
    """A search method.

    Attributes:
      space: the search space; transforms read it.
      init: key -> arch.
      schedule: (epoch, epochs) of the stage -> {name: float}: the numbers of an epoch (temperature, coefficients), of
        the same names in every epoch of a stage.
        Names that the step knows: `arch_on`, `weights_on` (0: that half of the step is left out),
        `weight_learning_rate`, `arch_learning_rate` (in place of the config's), `drop_path`, `dropout/NAME` (noise in
        the network).
      sample: (key, arch, memory, numbers, role) -> Gates; differentiable in arch; one of `ROLES`, "eval" without
        randomness.
      probabilities: (arch, numbers) -> {"normal", "reduce"} -> float32[E,O]: what reports call P.
      scores: arch -> {"normal", "reduce"} -> [E,O], all >= 0: what ranks the pairs of a genotype.
      objective: (ce, arch, gates, memory, numbers) -> (scalar, {name: scalar}): what the architecture descends, and
        the summands it adds to the cross-entropy; their values and the norms of their gradients are logged.
      weight_objective: the same for the weights; None: the cross-entropy.
      select: scores -> Genotype; by default the best pairs of a node with distinct inputs (`derive_pairs`).
      derive: arch -> Genotype; by default `select(scores(arch))`.
      rule: how a step updates weights and architecture, see `bilevel`.
      memory: what the method keeps beside arch, at the start; a pytree of arrays.
      at_epoch: View -> Event or None (go on), on the host after every epoch; the same view must give the same event.
      horizon: how many epochs a Rollback may reach back; checkpoints within it are kept, but one Rollback removes those
        after the epoch it goes to, and what lies before that epoch may be gone.
      stage_epochs: epochs of the search -> those of its first stage.
    """

    __slots__ = ()

    def __new__(cls, *args: Any, **fields: Any) -> Strategy:
        """A strategy of these fields."""
        _refuse_old(fields)
        return super().__new__(cls, *args, **fields)

    def _replace(self, **fields: Any) -> Strategy:
        """The strategy with other values of these fields."""
        _refuse_old(fields)
        return super()._replace(**fields)

    @property
    def select(self) -> Callable[[Tables], Genotype]:
        """scores -> Genotype."""
        own, space = tuple.__getitem__(self, self._fields.index("select")), self.space
        return own or (lambda scores: derive_pairs({k: np.asarray(v) for k, v in scores.items()}, space))

    @property
    def derive(self) -> Callable[[Arch], Genotype]:
        """arch -> Genotype."""
        own = tuple.__getitem__(self, self._fields.index("derive"))
        return own or (lambda arch: self.select(self.scores(arch)))

    @property
    def derives_from_scores(self) -> bool:
        """Whether the genotype is `select(scores(arch))`, so that a transform may change either."""
        return tuple.__getitem__(self, self._fields.index("derive")) is None

"""The peers of the benchmarks compute the same numbers as ours: otherwise their seconds would compare nothing."""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_search
from oracles import quick_jit

from benchmarks import ours
from benchmarks.cases import FEW, METHODS, SearchCase
from prdarts_jax.bilevel import Batches
from prdarts_jax.config.search import SearchConfig
from prdarts_jax.data.batches import Batch
from prdarts_jax.gates import Gates
from prdarts_jax.network import module
from prdarts_jax.network.module import DerivedNetwork
from prdarts_jax.ops.drop_path import drop_path_draws
from prdarts_jax.ops.losses import cross_entropy
from prdarts_jax.searching import step as search_step
from prdarts_jax.space import Space, supernet
from prdarts_jax.space.genotype import Genotype
from prdarts_jax.space.noise import Noise, cell_noise
from prdarts_jax.strategies.sampling import gumbel_noise

if os.environ.get("CI") == "true":
    import torch
else:
    torch = pytest.importorskip("torch", reason="needs torch")

from benchmarks.peers import methods as peer_methods
from benchmarks.peers import search as peer_search
from benchmarks.peers import sides
from benchmarks.peers import train as peer_train
from benchmarks.peers.weights import derived_pairs, load, search_pairs

pytestmark = pytest.mark.reference
torch.set_num_threads(1)  # the tests already keep every core busy, and its threads would spin while they wait

# The separable convolution is in the step of DARTS below.
OPS = ("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect", "dil_conv_5x5")
CASE = SearchCase(cells=3, channels=4, ops=OPS, side=8, batch=4)


def _rows(space: Space, kind: str) -> list[tuple[str, dict[str, tuple[int, ...]]]]:
    return [(group.name, space.rows(kind, group)) for group in space.edge_groups(kind)]


def _pairs(network: Any, weights: Any, space: Space) -> list[tuple[Any, np.ndarray]]:
    return search_pairs(network, weights, supernet.by_cell(weights, space), lambda kind: _rows(space, kind))


def _network(case: SearchCase, space: Space, weights: Any) -> peer_search.SearchNetwork:
    network = sides.search_network(case).double()
    pairs = _pairs(network, weights, space)
    assert len(pairs) == len(list(network.parameters()))  # every weight of the peer is one of ours
    load(pairs)
    return network


def _double(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf, tree)


def _images(rng: np.random.Generator, case: SearchCase) -> tuple[np.ndarray, np.ndarray]:
    return rng.normal(size=(case.batch, case.side, case.side, 3)), rng.integers(0, 10, case.batch).astype(np.int32)


def _torch(batch: tuple[np.ndarray, np.ndarray]) -> tuple[Any, Any]:
    return torch.from_numpy(batch[0].transpose(0, 3, 1, 2).copy()), torch.from_numpy(batch[1].astype(np.int64))


def test_search_network_has_our_logits_and_gradients_for_the_same_gates() -> None:
    """Two executed operations an edge, one of them possibly `none`; an edge without any."""
    with jax.enable_x64(True):
        space = ours.search_parts(CASE)["space"]
        weights = _double(quick_jit(lambda key: supernet.init(key, space))(jax.random.key(0)))
        network = _network(CASE, space, weights)
        rng = np.random.default_rng(0)
        images, labels = _images(rng, CASE)
        executed = {k: np.stack([rng.permutation(len(OPS))[:2] for _ in range(14)]) for k in peer_methods.KINDS}
        executed["normal"][3] = len(OPS)  # nothing is executed there
        values = {k: rng.uniform(0.1, 1, (14, len(OPS))) for k in peer_methods.KINDS}

        def loss(weights: Any, values: Any) -> jax.Array:
            gates = Gates(values, jax.tree.map(lambda a: jnp.asarray(a, jnp.int32), executed))
            logits, _ = supernet.apply(weights, gates, jnp.asarray(images), space=space)
            return cross_entropy(logits, jnp.asarray(labels))

        value, (d_weights, d_values) = quick_jit(jax.value_and_grad(loss, (0, 1)))(weights, values)
    leaves = {k: torch.from_numpy(v.copy()).requires_grad_() for k, v in values.items()}
    slots = {
        k: [
            [(int(o), leaves[k][e, o]) for o in row if o < len(OPS) and OPS[o] != "none"]
            for e, row in enumerate(executed[k])
        ]
        for k in peer_methods.KINDS
    }
    x, y = _torch((images, labels))
    other = torch.nn.functional.cross_entropy(network(x, slots), y)
    other.backward()
    assert float(value) == pytest.approx(other.item(), rel=1e-9)
    for kind, leaf in leaves.items():
        np.testing.assert_allclose(np.asarray(d_values[kind]), leaf.grad.numpy(), atol=1e-9)
    for tensor, gradient in _pairs(network, d_weights, space):
        got = np.zeros(tensor.shape) if tensor.grad is None else tensor.grad.numpy()
        np.testing.assert_allclose(got, gradient, atol=1e-8)


@pytest.mark.slow
def test_darts_step_changes_weights_and_architecture_as_ours() -> None:
    """Nothing is drawn in DARTS, so the whole step is compared: both groups, both optimizers, their order."""
    case = CASE._replace(method="darts", ops=FEW)
    # Under x64 indices are int64 and labels are not; the metrics of the step compare them.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        parts = ours.search_parts(case)
        state = _double(quick_jit(lambda key: search_step.init_state(key, **parts))(jax.random.key(0)))
        rng = np.random.default_rng(1)
        train, val = _images(rng, case), _images(rng, case)
        network = _network(case, parts["space"], state.weights)
        peer = peer_search.Search(network, peer_methods.Softmax(), FEW, rule="arch-first")
        with torch.no_grad():
            for i, kind in enumerate(peer_methods.KINDS):
                peer.arch[i] = torch.from_numpy(np.array(state.arch[kind])).requires_grad_()
        peer.arch_opt = torch.optim.Adam(peer.arch, 3e-4, (0.5, 0.999), weight_decay=1e-3)
        batches = Batches(*(Batch(jnp.asarray(x), jnp.asarray(y)) for x, y in (train, val)))
        step = quick_jit(search_step.make_search_step(**parts))
        after, _ = step(state, batches, jax.random.key(2), {})
        peer.step(_torch(train), _torch(val))
        for i, kind in enumerate(peer_methods.KINDS):
            np.testing.assert_allclose(np.asarray(after.arch[kind]), peer.arch[i].detach().numpy(), atol=1e-8)
        moved = 0.0
        for tensor, array in _pairs(network, after.weights, parts["space"]):
            np.testing.assert_allclose(tensor.detach().numpy(), array, atol=1e-7)
        for old, new in zip(jax.tree.leaves(state.weights), jax.tree.leaves(after.weights), strict=True):
            moved = max(moved, float(jnp.abs(old - new).max()))
        assert moved > 1e-3  # the step is not so small that any two would agree


def _parameters(arch: Any, kind: str) -> Any:
    """Of a cell type, as the peer has them."""
    if "edges" in arch:
        return torch.from_numpy(np.concatenate([arch["base"][kind], arch["edges"][kind][:, None]], 1))
    return torch.from_numpy(np.array(arch[kind]))


def _draw_as_ours(peer: peer_search.Search, space: Space, key: Any) -> None:
    """The draws of a step of ours from its key, in the order in which the peer asks for them."""
    joint = peer.rule == "joint"
    noise = [gumbel_noise(k, space) for k in ([key] if joint else jax.random.split(key))]
    tables = iter([torch.from_numpy(np.asarray(n[kind], np.float64)) for n in noise for kind in peer_methods.KINDS])
    peer.method.noise = lambda alpha: next(tables)
    rates = {"drop_path": jnp.float32(sides.DROP_PATH)}
    own = Noise(jax.random.fold_in(key, search_step._NOISE), jnp.arange(CASE.batch), rates)
    for i, cell in enumerate(peer.network.cells):
        edges = torch.from_numpy(np.asarray(cell_noise(own, space, i).edges, np.float64))
        cell.kept = lambda x, edges=edges: edges[:, :, None, None, None]


@pytest.mark.parametrize(
    "method", [m if m in ("gdas", "pc-darts") else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]
)
def test_methods_have_our_gradient_of_the_architecture(method: str) -> None:
    """Of one step, the draws given: what the optimizer of the architecture gets, and what it makes of it."""
    ops = FEW[method == "fair-darts" :]
    case = CASE._replace(method=method, ops=ops, tau=0.7)
    case = case._replace(channels=8, partial=4) if method == "pc-darts" else case
    with jax.enable_x64(True):
        parts = ours.search_parts(case)
        space, strategy = parts["space"], parts["strategy"]
        data = torch_search.batches(space, case.batch, case.side)[:1]
        start, (found,) = torch_search.ours(
            strategy, SearchConfig(), numbers=ours.numbers_of(case, strategy), data=data, key=3
        )
        numbers, rule = sides.search_method(case)
        peer = peer_search.Search(_network(case, space, start.weights), numbers, ops, rule=rule)
        with torch.no_grad():
            peer.arch = [_parameters(start.arch, kind).requires_grad_() for kind in peer_methods.KINDS]
        peer.arch_opt = torch.optim.Adam(peer.arch, 3e-4, (0.5, 0.999), weight_decay=1e-3)
        if method in ("gdas", "snas"):
            _draw_as_ours(peer, space, jax.random.fold_in(jax.random.key(3), 0))
    peer.step(*map(_torch, data[0]))
    for kind, leaf in zip(peer_methods.KINDS, peer.arch, strict=True):
        expected = _parameters(found.gradient, kind).numpy()
        assert np.abs(expected).max() > 1e-4
        np.testing.assert_allclose(leaf.grad.numpy(), expected, atol=1e-8)
        np.testing.assert_allclose(leaf.detach().numpy(), _parameters(found.arch, kind).numpy(), atol=1e-7)
    moved = [pair for pair in _pairs(peer.network, found.weights, space) if pair[0].grad is not None]
    assert moved  # the peer leaves alone what was not executed; ours has momentum and weight decay there
    for tensor, array in moved:
        np.testing.assert_allclose(tensor.detach().numpy(), array, atol=1e-7)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_compiled_operations_have_the_eager_ones_gradients() -> None:
    """Of both steps: the weights' with plain gates, the architecture's with the weights frozen."""
    torch.manual_seed(0)
    eager = peer_search.SearchNetwork(FEW, 3, 4, head_norm=True)
    compiled = peer_search.SearchNetwork(FEW, 3, 4, head_norm=True)
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([1, 0, 2, 3])
    peer_search.compile_operations(compiled, x, FEW)
    compiled.load_state_dict(eager.state_dict())  # after the compilation, which moves the running statistics
    sides = [
        peer_search.Search(network, peer_methods.Softmax(), FEW, rule="arch-first", compiled=network is compiled)
        for network in (eager, compiled)
    ]
    for a, b in zip(sides[0].arch, sides[1].arch, strict=True):
        b.data.copy_(a.data)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    for side in sides:
        side.step((x, y), (x.flip(0), y.flip(0)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs  # no step had to compile
    for one, other in (sides[0].arch, sides[1].arch), (sides[0].weights, sides[1].weights):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a.grad.numpy(), b.grad.numpy(), rtol=1e-4, atol=1e-6)


def test_penalty_and_gates_of_the_peer() -> None:
    """The penalty equals ours; the distribution of the gates has our share of exact zeros and mean (Theorem 3)."""
    parts = ours.search_parts(SearchCase())
    strategy, ops = parts["strategy"], parts["space"].ops
    progress = {name: np.float32(v) for name, v in strategy.schedule(150, 200).items()}
    arch = strategy.init(jax.random.key(3))
    gates = strategy.sample(jax.random.key(4), arch, (), progress, "arch")
    expected, _ = strategy.objective(jnp.zeros(()), arch, gates, (), progress)
    peer = peer_methods.PathRegularized(float(progress["tau"]))
    betas = [torch.from_numpy(np.array(arch[kind])) for kind in peer_methods.KINDS]
    assert peer.penalty(betas, ops).item() == pytest.approx(float(expected), rel=1e-5)
    torch.manual_seed(0)
    late = peer_methods.PathRegularized(0.1)
    g, chosen = late.gates(torch.zeros(20_000, 8))
    assert float((g != 0).float().mean()) == pytest.approx(0.5597, abs=5e-3)  # P(g != 0) at tau = 0.1, beta = 0
    assert bool((torch.gather(g, 1, chosen).min(1)[0] >= torch.sort(g, 1)[0][:, -2]).all())
    counts = torch.bincount(chosen.flatten(), minlength=8) / chosen.numel()
    assert float(counts.max() - counts.min()) < 0.02  # many gates are exactly 1: ties are broken at random


def test_full_size_networks_have_our_parameter_counts() -> None:
    for case, expected in ((SearchCase(method="darts"), 1_930_618), (SearchCase(cells=6), 1_323_002)):
        network = sides.search_network(case)
        assert sum(p.numel() for p in network.parameters()) == expected
        space = ours.search_parts(case)["space"]
        shapes = jax.eval_shape(lambda key, space=space: supernet.init(key, space), jax.random.key(0))
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected
    genotype = Genotype.named("PRDARTS")
    net = DerivedNetwork(genotype, auxiliary=True)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32))
    peer = peer_train.DerivedNetwork(genotype, 36, 20)
    ours_count = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    assert ours_count == sum(p.numel() for p in peer.parameters())


def test_derived_network_has_our_outputs_with_drop_path(monkeypatch: pytest.MonkeyPatch) -> None:
    genotype = Genotype.named("PRDARTS")
    with jax.enable_x64(True):
        net = DerivedNetwork(genotype, 4, 3, auxiliary=True, dtype=jnp.float64)
        images = np.random.default_rng(0).normal(size=(4, 32, 32, 3))
        rng, shapes = np.random.default_rng(1), jax.eval_shape(net.init, jax.random.key(0), jnp.asarray(images))
        low = {"params": -1.0, "batch_stats": 0.5}
        variables = {
            name: jax.tree.map(
                lambda s, low=low[name]: jnp.asarray(rng.uniform(low, 1.5, s.shape) / np.sqrt(np.prod(s.shape[:-1]))),
                tree,
            )
            for name, tree in shapes.items()
        }
        rate, key = 0.5, jax.random.key(5)

        caught: list[jax.Array] = []
        real = drop_path_draws

        def catching(*args: Any) -> jax.Array:
            caught.append(real(*args))
            return caught[-1]

        def apply(variables: Any, images: jax.Array) -> Any:
            """Also the draws of drop-path [B, cells, width], caught where the network asks for them."""
            rngs = {"drop_path": key}
            out = net.apply(variables, images, train=True, drop_path=rate, rngs=rngs, mutable=["batch_stats"])
            return out, caught[-1]

        monkeypatch.setattr(module, "drop_path_draws", catching)
        ((logits, auxiliary), state), drawn = quick_jit(apply)(variables, jnp.asarray(images))
        peer = peer_train.DerivedNetwork(genotype, 4, 3).double().train()
        load(derived_pairs(peer, variables["params"]) + derived_pairs(peer, variables["batch_stats"]))
        draws = np.asarray(drawn)
        assert draws.shape == (4, 3, peer.drops)
    kept = torch.from_numpy((draws >= rate) / (1 - rate)).permute(1, 2, 0)[..., None, None, None]
    out = peer(_torch((images, np.zeros(4)))[0], kept)
    np.testing.assert_allclose(out[0].detach().numpy(), np.asarray(logits), atol=1e-7)
    np.testing.assert_allclose(out[1].detach().numpy(), np.asarray(auxiliary), atol=1e-7)
    for tensor, array in derived_pairs(peer, state["batch_stats"]):
        np.testing.assert_allclose(tensor.numpy(), array, atol=1e-7)

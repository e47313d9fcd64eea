"""Parameters and multiply-adds of the published cells: golden counts, and two other ways to count."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from prdarts_jax import cli
from prdarts_jax.errors import UserError
from prdarts_jax.network.counts import SCALES, Profile, has_second_norm, jaxpr_macs
from prdarts_jax.network.module import DerivedNetwork, profile
from prdarts_jax.space.genotype import Genotype, names

GOLDEN = json.loads((Path(__file__).parents[1] / "golden_genotypes.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Profile]]:
    """What `prdarts zoo --json` prints is made of: every published cell at every scale."""
    return {
        name: {
            data: profile(Genotype.named(name), data, auxiliary_second_norm=has_second_norm(name, data))
            for data in SCALES
        }
        for name in names()
    }


def golden_keys() -> list[tuple[str, str, int]]:
    return [(name, key, count) for name, counts in GOLDEN.items() for key, count in counts.items()]


@pytest.mark.parametrize(("name", "key", "count"), golden_keys())
def test_counts_equal_the_original_programs(rows, name: str, key: str, count: int) -> None:
    data, _, field = key.partition("_")  # every key is one of ours, or this fails
    assert getattr(rows[name][data], field) == count


def test_every_published_cell_is_counted_and_every_golden_name_is_published(rows) -> None:
    assert len(golden_keys()) >= 17 and set(GOLDEN) <= set(rows) == set(names())
    for counts in rows.values():
        assert set(counts) == {"cifar10", "cifar100", "imagenet"}
        assert all(0 < one.params < one.params_with_aux and one.macs > 1e8 for one in counts.values())


def test_cifar100_differs_from_cifar10_by_its_linear_layers(rows) -> None:
    for name, counts in rows.items():
        ten, hundred = counts["cifar10"], counts["cifar100"]
        features = (hundred.params - ten.params) // 90 - 1
        assert (hundred.params - ten.params) % 90 == 0 and features % 144 == 0, name
        assert hundred.macs - ten.macs == 90 * features
        assert hundred.params_with_aux - ten.params_with_aux == 90 * (features + 1 + 769)


# The published cells whose program has both batch normalisations in its ImageNet auxiliary head.
TWO_NORMS = {"PNASNet", "SNAS_mild", "SNAS_moderate", "SNAS_aggressive", "PDARTS", "GDAS_V1", "PRDARTS"}


def test_the_auxiliary_head_is_counted_as_in_the_program_of_each_family(rows) -> None:
    """Closed form, C channels coming in: 128 C + 256, 4 * 128 * 768, for a second norm 2 * 768, and 769 a class."""
    for name, counts in rows.items():
        for data, scale in SCALES.items():
            nodes = len({n for n in Genotype.named(name).reduce_concat if Genotype.named(name).reduce[n - 2]})
            channels = 4 * scale.channels * nodes
            second = 1536 if data != "imagenet" or name in TWO_NORMS else 0
            head = 128 * channels + 2 * 128 + 4 * 128 * 768 + second + 769 * scale.classes
            assert counts[data].params_with_aux - counts[data].params == head, (name, data)
    assert len(rows) - len(TWO_NORMS) == 18


@pytest.mark.parametrize("name", ["PRDARTS", "AmoebaNet_A", "FairDARTS_g"])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_parameters_are_those_init_makes(name: str, stem: str) -> None:
    genotype = Genotype.named(name)
    scale = SCALES[{"cifar": "cifar10", "imagenet": "imagenet"}[stem]]
    second_norm = name == "PRDARTS"
    data = "cifar10" if stem == "cifar" else "imagenet"
    counts = profile(genotype, data, channels=6, cells=5, auxiliary_second_norm=second_norm)
    images = jax.ShapeDtypeStruct((1, scale.pixels, scale.pixels, 3), jnp.float32)
    for auxiliary, expected in ((False, counts.params), (True, counts.params_with_aux)):
        net = DerivedNetwork(genotype, 6, 5, scale.classes, stem, auxiliary, auxiliary_second_norm=second_norm)
        made = jax.eval_shape(net.init, jax.random.key(0), images)
        assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(made["params"])) == expected


def test_a_hand_counted_network() -> None:
    """One node: a 3x3 separable convolution of each input; C = 2, three cells (normal, reduce, reduce), 32 pixels."""
    node = [[("sep_conv_3x3", 0), ("sep_conv_3x3", 1)]]
    counts = profile(Genotype(node, [2], node, [2]), "cifar10", channels=2, cells=3)

    def sep(c: int, size: int) -> tuple[int, int]:
        return 2 * (9 * c + c * c + 2 * c), size * size * 2 * (9 * c + c * c)

    def pre(channels_in: int, c: int, size: int) -> tuple[int, int]:
        return channels_in * c + 2 * c, size * size * channels_in * c

    parts = [
        (27 * 6 + 12, 32 * 32 * 27 * 6),
        *[pre(6, 2, 32)] * 2 + [sep(2, 32)] * 2,  # 6 -> 2 channels at 32x32
        *[pre(6, 4, 32), pre(2, 4, 32)] + [sep(4, 16)] * 2,  # the first convolution of each has stride 2
        *[pre(2, 8, 16), pre(4, 8, 16)] + [sep(8, 8)] * 2,  # the first is a FactorizedReduce: as many weights
        (8 * 10 + 10, 80),
    ]
    head = 8 * 128 + 2 * 128 + 4 * 128 * 768 + 2 * 768 + 768 * 10 + 10
    params = sum(p for p, _ in parts)
    assert counts == Profile(params, params + head, sum(m for _, m in parts))


def test_jaxpr_macs_counts_grouped_convolutions_and_inner_jaxprs() -> None:
    @jax.jit
    def inner(x):
        return jax.lax.conv_general_dilated(
            x,
            jnp.ones((3, 3, 1, 4)),
            (2, 2),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=4,
        )

    traced = jax.make_jaxpr(lambda x: inner(x) + 1)(jnp.ones((1, 8, 8, 4)))
    assert jaxpr_macs(traced.jaxpr) == 4 * 4 * 4 * 9


def test_profile_refuses_unknown_data_sets_and_operations() -> None:
    with pytest.raises(UserError, match=r"^dataset: unknown value 'cifar'; did you mean 'cifar10'"):
        profile(Genotype.named("PRDARTS"), "cifar")
    node = [[("conv_9x9", 0)]]
    with pytest.raises(UserError, match=r"^genotype\.normal\[0\]: unknown value 'conv_9x9'"):
        profile(Genotype(node, [2], node, [2]))


def test_the_command_prints_the_counts(rows, capsys) -> None:
    assert cli.main(["zoo", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    expected = [{"name": n, **{data: one._asdict() for data, one in counts.items()}} for n, counts in rows.items()]
    assert printed == expected
    assert set(printed[0]["imagenet"]) == {"params", "params_with_aux", "macs"}
    assert cli.main(["zoo", "PRDARTS"]) == 0
    out = capsys.readouterr().out
    assert "imagenet: 4.98 M parameters (6.24 M with the auxiliary head), 543.37 M multiply-adds" in out

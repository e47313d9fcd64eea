"""The table of search methods: a row a method. Its page is docs/methods/NAME.md, and the README names it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prdarts_jax.config.search import OPS

_ROOM = "prdarts_jax.strategies"


@dataclass(frozen=True)
class Row:
    """A search method: where its factory is, what it does in a step, and the settings it was published with."""

    name: str
    factory: str  # module:function, takes `space` and keyword options
    summary: str  # one line
    reference: str
    settings: Mapping[str, Any]  # dotted path of a config field -> the method's published value
    source: str  # where the settings were read
    competes: str  # what shares one budget, so that one grows at the cost of another
    executed: str  # operations an edge executes in a forward pass
    passes: str  # forward-backward passes through the search network in a step of both groups
    made_of: tuple[str, ...] = ()  # transforms it consists of, the innermost first
    not_claimed: str = ""  # in which points it is not, or is not known to be, what was published
    arrays: tuple[str, ...] = ()  # options that enter the compiled step through `schedule` alone: a sweep may name them


_DARTS: Mapping[str, Any] = {
    "epochs": 50,
    "batch_size": 64,
    "space.cells": 8,
    "space.channels": 16,
    "space.nodes": 4,
    "space.head_norm": False,
    "space.pool_norm": True,
    "weights.learning_rate": 0.025,
    "weights.learning_rate_min": 0.001,
    "weights.momentum": 0.9,
    "weights.nesterov": False,
    "weights.weight_decay": 3e-4,
    "weights.clip_norm": 5.0,
    "arch.learning_rate": 3e-4,
    "arch.beta1": 0.5,
    "arch.beta2": 0.999,
    "arch.eps": 1e-8,
    "arch.weight_decay": 1e-3,
}
_OF_AN_EDGE = "the operations of an edge"
_WITHOUT_NONE = tuple(name for name in OPS if name != "none")

ROWS = (
    Row(
        name="prdarts",
        factory=f"{_ROOM}.prdarts:prdarts",
        summary="independent hard-concrete gates, group-structured penalties and a path-depth term",
        reference=(
            "Zhou, Xiong, Socher, Hoi: Theory-Inspired Path-Regularized Differential Network Architecture Search, "
            "NeurIPS 2020"
        ),
        settings={
            **_DARTS,
            "epochs": 200,
            "batch_size": 128,
            "space.head_norm": True,
            "weights.nesterov": True,
            "weights.weight_decay": 5e-4,
        },
        source="arXiv 2006.16537; where it is silent, the program its authors released",
        competes="skip connections as a group with the other operations as a group",
        executed="2",
        passes="2",
        arrays=("tau_max", "tau_min", "lambda1", "lambda2", "lambda3", "gate_dropout"),
    ),
    Row(
        name="darts",
        factory=f"{_ROOM}.darts:darts",
        summary="a softmax mixture of all operations on every edge, of first or second order",
        reference="Liu, Simonyan, Yang: DARTS: Differentiable Architecture Search, ICLR 2019",
        settings=_DARTS,
        source="the program its authors released (quark0/darts)",
        competes=_OF_AN_EDGE,
        executed="all",
        passes="2; 5 with order=2",
        not_claimed="the exact second order (exact=True) is ours: the published one is the finite difference",
    ),
    Row(
        name="milenas",
        factory=f"{_ROOM}.milenas:milenas",
        summary="DARTS whose architecture descends the train and the validation loss",
        reference=(
            "He, Ye, Shen, Zhang: MiLeNAS: Efficient Neural Architecture Search via Mixed-Level Reformulation, "
            "CVPR 2020"
        ),
        settings=_DARTS,
        source="the program its authors released (chaoyanghe/MiLeNAS)",
        competes=_OF_AN_EDGE,
        executed="all",
        passes="3",
        not_claimed="the second-order variant and the early stop of the released program are not there",
    ),
    Row(
        name="darts+",
        factory=f"{_ROOM}.darts_plus:darts_plus",
        summary="DARTS that ends when its normal cell has two skip connections",
        reference=(
            "Liang, Zhang, Sun, He, Huang, Zhuang, Li: DARTS+: Improved Differentiable Architecture Search with Early "
            "Stopping, arXiv 1909.06035"
        ),
        settings=_DARTS,
        source="DARTS; the paper was not at hand",
        competes=_OF_AN_EDGE,
        executed="all",
        passes="2; 5 with order=2",
        made_of=("stop_at_skips",),
        not_claimed=(
            "that the criterion is the published one, which was not read; the other criterion that is told of it, a "
            "stable ranking of the operations, is not there"
        ),
    ),
    Row(
        name="pc-darts",
        factory=f"{_ROOM}.pc_darts:pc_darts",
        summary="DARTS on a quarter of the channels, with weights of the edges and a rest of the architecture at first",
        reference=(
            "Xu, Xie, Zhang, Chen, Qi, Tian, Xiong: PC-DARTS: Partial Channel Connections for Memory-Efficient "
            "Architecture Search, ICLR 2020"
        ),
        settings={
            **_DARTS,
            "batch_size": 256,
            "space.partial": 4,
            "weights.learning_rate": 0.1,
            "weights.learning_rate_min": 0.0,
            "arch.learning_rate": 6e-4,
        },
        source="the program its authors released (yuhuixu1993/PC-DARTS)",
        competes="the operations of an edge; the edges into a node",
        executed="all, on 1/4 of the channels",
        passes="2; 5 with order=2",
        made_of=("frozen", "edge_weights"),
        not_claimed="the search on ImageNet (three strided stem convolutions, K = 2) is not there",
    ),
    Row(
        name="p-darts",
        factory=f"{_ROOM}.p_darts:p_darts",
        summary="DARTS in three stages of growing depth and shrinking sets of operations",
        reference=(
            "Chen, Xie, Wu, Tian: Progressive Differentiable Architecture Search: Bridging the Depth Gap between "
            "Search and Evaluation, ICCV 2019"
        ),
        settings={
            **_DARTS,
            "epochs": 75,
            "batch_size": 96,
            "space.cells": 5,
            "weights.learning_rate_min": 0.0,
            "arch.learning_rate": 6e-4,
            "arch.clip_norm": 5.0,
        },
        source="the program its authors released (chenxin061/pdarts) and the command of its README",
        competes=_OF_AN_EDGE,
        executed="8, 5, 3 in the three stages",
        passes="2, in networks of 5, 11, 17 cells",
        made_of=("frozen", "at_most_skips"),
        not_claimed="wider networks in later stages (add_width of the released program) are not there",
    ),
    Row(
        name="robust-darts",
        factory=f"{_ROOM}.robust_darts:robust_darts",
        summary="DARTS that stops, or is regularised more, where its validation loss becomes sharp",
        reference=(
            "Zela, Elsken, Saikia, Marrakchi, Brox, Hutter: Understanding and Robustifying Differentiable Architecture "
            "Search, ICLR 2020"
        ),
        settings=_DARTS,
        source="the program its authors released (automl/RobustDARTS)",
        competes=_OF_AN_EDGE,
        executed="all",
        passes="5; 2 with order=1; 20 gradients more every other epoch",
        made_of=("hessian_stop",),
        not_claimed=(
            "the choice among four searches of different regularisation (R-DARTS) is the user's, and no search raises "
            "the probability of cutout in a ramp"
        ),
    ),
    Row(
        name="snas",
        factory=f"{_ROOM}.snas:snas",
        summary="a relaxed one-hot an edge, both groups on one batch, with the cost of what was drawn",
        reference="Xie, Zheng, Liu, Lin: SNAS: Stochastic Neural Architecture Search, ICLR 2019",
        settings={
            **_DARTS,
            "epochs": 150,
            "data.split": "shared",
            "arch.optimizer": "sgd",
            "arch.weight_decay": 0.0,
            "arch.clip_norm": 10.0,
        },
        source="the program its authors released (SNAS-Series/SNAS-Series), on one GPU",
        competes=_OF_AN_EDGE,
        executed="all",
        passes="1",
        not_claimed=(
            "the search of 20 cells on several GPUs, whose architecture moves by Adam, and the resource terms by "
            "policy gradient and without a logarithm are not there"
        ),
        arrays=("tau_max", "tau_min", "resource"),
    ),
    Row(
        name="gdas",
        factory=f"{_ROOM}.gdas:gdas",
        summary="one sampled operation an edge, with the gradient of its relaxed probability",
        reference="Dong, Yang: Searching for a Robust Neural Architecture in Four GPU Hours, CVPR 2019",
        settings={
            **_DARTS,
            "epochs": 250,
            "batch_size": 256,
            "space.cells": 6,
            "space.head_norm": True,
            "space.pool_norm": False,
            "weights.nesterov": True,
            "weights.weight_decay": 5e-4,
        },
        source="the program its authors released (D-X-Y/AutoDL-Projects), NASNet space",
        competes=_OF_AN_EDGE,
        executed="1; all in the step of the architecture with grad=all",
        passes="2",
        not_claimed="the search of the normal cell alone, beside a fixed reduction cell, is not there",
        arrays=("tau_max", "tau_min"),
    ),
    Row(
        name="fair-darts",
        factory=f"{_ROOM}.fair_darts:fair_darts",
        summary="operations that do not compete, driven to 0 or 1, and kept above a threshold",
        reference=(
            "Chu, Zhou, Zhang, Li: Fair DARTS: Eliminating Unfair Advantages in Differentiable Architecture Search, "
            "ECCV 2020"
        ),
        settings={
            **_DARTS,
            "batch_size": 128,
            "space.ops": _WITHOUT_NONE,
            "weights.learning_rate": 0.005,
            "arch.learning_rate": 3e-3,
            "arch.beta1": 0.9,
        },
        source="the program its authors released (xiaomi-automl/FairDARTS)",
        competes="nothing",
        executed="all",
        passes="2",
        not_claimed="the single-level variant of the released program is not there",
        arrays=("w01",),
    ),
    Row(
        name="proxyless",
        factory=f"{_ROOM}.proxyless:proxyless",
        summary="one drawn operation an edge for the weights, a gradient of all gates, or of two, for the architecture",
        reference=(
            "Cai, Zhu, Han: ProxylessNAS: Direct Neural Architecture Search on Target Task and Hardware, ICLR 2019"
        ),
        settings={
            **_DARTS,
            "epochs": 160,
            "batch_size": 256,
            "weights.learning_rate_min": 0.0,
            "weights.nesterov": True,
            "weights.weight_decay": 4e-5,
            "weights.clip_norm": float("inf"),
            "arch.learning_rate": 1e-3,
            "arch.beta1": 0.0,
            "arch.weight_decay": 0.0,
        },
        source="the program its authors released (mit-han-lab/proxylessnas), whose space is another",
        competes=_OF_AN_EDGE,
        executed="1; all, or 2 with mode=two, in the step of the architecture",
        passes="1.2",
        made_of=("frozen",),
        not_claimed=(
            "its own space, a chain of blocks, the latency of a device, label smoothing and reinforcement learning are "
            "not there: this is its path binarisation in the cells of DARTS"
        ),
    ),
    Row(
        name="bayesnas",
        factory=f"{_ROOM}.bayesnas:bayesnas",
        summary="after BayesNAS: scalar switches under a group lasso with learnt weights, pruned by their variance",
        reference="Zhou, Yang, Wang, Pan: BayesNAS: A Bayesian Approach for Neural Architecture Search, ICML 2019",
        settings={
            **_DARTS,
            "epochs": 2,
            "batch_size": 18,
            "data.split": "shared",
            "space.channels": 36,
            "space.head_norm": True,
            "space.ops": _WITHOUT_NONE,
            "weights.learning_rate": 0.1,
            "weights.learning_rate_min": 0.1,
            "weights.weight_decay": 1e-4,
            "weights.clip_norm": float("inf"),
            "arch.optimizer": "sgd",
            "arch.learning_rate": 0.1,
            "arch.momentum": 0.9,
            "arch.weight_decay": 0.0,
        },
        source="the program its authors released (BayesNAS/BayesNAS), whose space is another",
        competes="nothing; a group lasso prunes operations and edges",
        executed="all",
        passes="1",
        made_of=("frozen",),
        not_claimed=(
            "parity with the published figures cannot be claimed: the authors prune by hand and say that their program "
            "does not reproduce them, and the estimate of the Hessian and the space are others here"
        ),
    ),
    Row(
        name="random",
        factory=f"{_ROOM}.random_search:random_search",
        summary="random cells judged on shared weights that random cells have trained: the baseline",
        reference="Li, Talwalkar: Random Search and Reproducibility for Neural Architecture Search, UAI 2019",
        settings=_DARTS,
        source="DARTS; the paper was not at hand",
        competes="whole cells",
        executed="1",
        passes="1; 20 cells on the validation images an epoch, forward",
        not_claimed=(
            "the published settings, and that cells are judged in two steps, many on a part of the images and the best "
            "on all"
        ),
    ),
    Row(
        name="evolution",
        factory=f"{_ROOM}.evolution:evolution",
        summary="regularized evolution on shared weights: tournament, one mutation, the oldest dies",
        reference=(
            "Real, Aggarwal, Huang, Le: Regularized Evolution for Image Classifier Architecture Search, AAAI 2019"
        ),
        settings=_DARTS,
        source="DARTS for the weights; the notebook of its authors for the algorithm",
        competes="whole cells",
        executed="1",
        passes="1; 20 cells on the validation images an epoch, forward",
        not_claimed=(
            "the published search, which trains each of its cells by itself, and has other operations, five nodes and "
            "outputs of unused nodes alone: this is its algorithm on shared weights"
        ),
    ),
    Row(
        name="enas",
        factory=f"{_ROOM}.enas:enas",
        summary="after ENAS: a policy over cells, by REINFORCE on shared weights that it trains",
        reference="Pham, Guan, Zoph, Le, Dean: Efficient Neural Architecture Search via Parameter Sharing, ICML 2018",
        settings={
            **_DARTS,
            "epochs": 150,
            "batch_size": 160,
            "data.split": "0.9,0.1",
            "space.channels": 20,
            "space.nodes": 5,
            "weights.learning_rate": 0.05,
            "weights.learning_rate_min": 0.0005,
            "weights.nesterov": True,
            "weights.weight_decay": 2e-4,
            "weights.clip_norm": float("inf"),
        },
        source="the program its authors released (melodyguan/enas), micro search",
        competes="whole cells",
        executed="1",
        passes="1; 300 cells on a batch and 11 on the validation images an epoch, forward",
        not_claimed=(
            "the LSTM policy, the operations, the warm restarts of the learning rate, drop-path and the auxiliary "
            "heads of the program are not there: the policy here factorises over edges"
        ),
    ),
    Row(
        name="pnas",
        factory=f"{_ROOM}.pnas:pnas",
        summary="after PNAS: cells grow node by node, chosen by a surrogate of what was judged on shared weights",
        reference=(
            "Liu, Zoph, Neumann, Shlens, Hua, Li, Fei-Fei, Yuille, Huang, Murphy: Progressive Neural Architecture "
            "Search, ECCV 2018"
        ),
        settings=_DARTS,
        source="DARTS; the paper was not at hand",
        competes="whole cells",
        executed="1",
        passes="1; 20 cells on the validation images an epoch, forward",
        not_claimed=(
            "the published search, which trains each of its cells by itself, and whose surrogate is an ensemble of "
            "LSTMs or perceptrons: sizes, beam and surrogate are smaller here"
        ),
    ),
)

"""Figures that the papers report of their own networks, by hand; what this library counts or measures stands beside.

But for those of PR-DARTS they were entered from memory and have not been compared with the papers: look them up before
relying on one.
"""

from __future__ import annotations

from typing import NamedTuple


class Cited(NamedTuple):
    """What a paper reports of one network.

    Attributes:
      source: where it is from, an arXiv number.
      cifar10, cifar100: test error in percent, as text; "" where none is cited here.
      cost: GPU-days of the search.
      imagenet: top-1 and top-5 error in percent.
      params, macs: millions, on ImageNet; of a network without a cell in the zoo.
    """

    source: str
    cifar10: str = ""
    cifar100: str = ""
    cost: str = ""
    imagenet: str = ""
    params: str = ""
    macs: str = ""


# By the name in the zoo.
CELLS = {
    "NASNet_A": Cited("1707.07012", "2.65", "", "2000", "26.0 / 8.4"),
    "AmoebaNet_A": Cited("1802.01548", "3.34 +- 0.06", "", "3150", "25.5 / 8.0"),
    "PNASNet": Cited("1712.00559", "3.41 +- 0.09", "", "225", "25.8 / 8.1"),
    "ENASNet": Cited("1802.03268", "2.89", "", "0.5"),
    "DARTS_V1": Cited("1806.09055, CIFAR-100: 1904.12760", "3.00 +- 0.14", "17.76", "1.5"),
    "DARTS_V2": Cited("1806.09055, CIFAR-100: 1904.12760", "2.76 +- 0.09", "17.54", "4", "26.7 / 8.7"),
    "SNAS_mild": Cited("1812.09926", "2.98", "", "1.5", "27.3 / 9.2"),
    "SNAS_moderate": Cited("1812.09926", "2.85 +- 0.02", "", "1.5"),
    "SNAS_aggressive": Cited("1812.09926", "3.10 +- 0.04", "", "1.5"),
    "PDARTS": Cited("1904.12760", "2.50", "16.55", "0.3", "24.4 / 7.4"),
    "PC_DARTS_cifar": Cited("1907.05737", "2.57 +- 0.07", "", "0.1", "25.1 / 7.8"),
    "PC_DARTS_image": Cited("1907.05737", "", "", "3.8", "24.2 / 7.3"),
    "GDAS_V1": Cited("1910.04465", "2.93", "18.38", "0.21", "26.0 / 8.5"),
    "MdeNAS": Cited("1905.07529", "2.55", "", "0.16"),
    "FairDARTS_a": Cited("1911.12126", "2.54", "", "0.4", "26.3 / 8.3"),
    "FairDARTS_b": Cited("1911.12126", "", "", "0.4", "24.9 / 7.5"),
    "PRDARTS": Cited("2006.16537", "2.32", "16.45", "0.17", "24.1 / 7.3"),
    "BayesNAS_0.005": Cited("1905.04919", "2.81 +- 0.04", "", "0.2"),
    "BayesNAS_0.007": Cited("1905.04919", "2.90 +- 0.05", "", "0.2"),
    "BayesNAS_0.01": Cited("1905.04919", "3.02 +- 0.04", "", "0.2", "26.5 / 8.9"),
}

# Networks made by hand, which the paper's tables list first.
MANUAL_CIFAR = {"DenseNet-BC": Cited("1608.06993", "3.46", "17.18", "", params="25.6")}
MANUAL_IMAGENET = {
    "Inception-v1": Cited("1409.4842", imagenet="30.2 / 10.1", params="6.6", macs="1448"),
    "MobileNet": Cited("1704.04861", imagenet="29.4 / 10.5", params="4.2", macs="569"),
    "ShuffleNet 2x (v1)": Cited("1707.01083", imagenet="26.4 / 10.2", params="5", macs="524"),
}
NOTE = (
    "Columns that say cited are what the papers report (arXiv numbers in the last column), entered from memory: "
    "but for those of PR-DARTS they were **not compared with the papers**. A cited error is that of the network which "
    "its authors trained: that of BayesNAS differs from the one counted here in more than its cells, and the published "
    "cell of P-DARTS is from another run than its figure."
)

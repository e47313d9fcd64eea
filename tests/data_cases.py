"""What the tests of the sources share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from prdarts_jax.data import folder_source, tfds_source
from prdarts_jax.errors import UserError

_RNG = np.random.default_rng(0)


def one_line(call: Callable[[], object], *words: str) -> str:
    """The UserError of `call`: one line that holds every word and says what is allowed."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in (*words, "allowed:"):
        assert word in message, message
    return message


def random_image(*shape: int) -> np.ndarray:
    return _RNG.integers(0, 256, shape).astype(np.uint8)


def forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(folder_source.Folder, "_decode", fail)
    monkeypatch.setattr(tfds_source.Prepared, "_decode", fail)

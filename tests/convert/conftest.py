"""The test models are small: let them take the prepacked path that real layers take."""

import pytest

from dl4ds_kernels import _packing


@pytest.fixture(autouse=True)
def prepack_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_packing, "MIN_MACS", 0)

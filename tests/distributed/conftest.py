"""The ranks that all tests of this folder share."""

import pytest
from torch import distributed

from tests.distributed.ranks import Ranks


@pytest.fixture(scope="session")
def ranks():
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    ranks = Ranks()
    yield ranks
    ranks.close()

"""The ranks that all tests of this folder share."""

import pytest
import torch
from torch import distributed

from tests.distributed.ranks import Ranks


def pytest_collection_modifyitems(items):
    """Skips what needs a mesh for each parameter, where ``fully_shard`` has one for a module."""
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_common import ShardPlacementResult  # noqa: F401
    except ImportError:
        for item in items:
            if item.get_closest_marker("needs_fsdp"):
                item.add_marker(pytest.mark.skip(reason="this PyTorch's fully_shard has one mesh for a module"))


@pytest.fixture(autouse=True)
def _threads_of_a_rank(_seed_and_threads):
    """One, as a rank has: PyTorch's own products, such as a router's, change by a bit with the number of threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks():
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    ranks = Ranks()
    yield ranks
    ranks.close()

"""Helpers for testing kernels against their references, for this repository and for users' own kernels."""

from moe_kernels.testing.close import assert_close_to_reference
from moe_kernels.testing.routing import random_routing

__all__ = ["assert_close_to_reference", "random_routing"]

"""Memory that the CPU kernels keep for their next results: :func:`empty_cache`."""

import torch

from moe_kernels._extension import cpu_missing_reason

torch.library.define("moe_kernels::empty_cache", "() -> int")


def empty_cache() -> int:
    """Gives the memory that the CPU kernels keep back to the system, like :func:`torch.cuda.empty_cache`.

    Results of 8 MiB and more (weight gradients above all) are put into memory that earlier results have freed, since
    fresh memory costs more than filling it: the system clears every page. What is kept never exceeds, together with the
    results in use, what was in use at once before.

    Returns:
        How many bytes were given back; tensors in use keep theirs.
    """
    return 0 if cpu_missing_reason() is not None else torch.ops.moe_kernels.empty_cache()

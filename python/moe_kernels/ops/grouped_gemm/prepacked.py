"""Expert weights copied into the order in which the CPU kernels read them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PrepackedWeights:
    """Result of :func:`moe_kernels.prepack`; give it wherever an op takes ``expert_weights``. For inference only.

    Attributes:
        data: [num_experts, num_splits, panels, steps, panel_rows, step] contiguous. A panel holds ``panel_rows`` rows
            of one expert, interleaved every ``step`` (one vector) along the inner dimension and padded with zeros.
        shape: [num_experts, out, in] of the tensor it was made from.
        interleaved: whether the rows were interleaved gate/up pairs (they are split in ``data``).
    """

    data: Tensor
    shape: tuple[int, int, int]
    interleaved: bool

    @property
    def dtype(self):
        return self.data.dtype

    @property
    def device(self):
        return self.data.device

    @property
    def requires_grad(self) -> bool:
        return False

    @property
    def nbytes(self) -> int:
        """Memory of the packed copy in bytes; the original is not needed beside it."""
        return self.data.numel() * self.data.element_size()

"""A module of which some adapters have a whole copy of their own (PEFT's ``modules_to_save``)."""

from torch import Tensor, nn

from moe_kernels._checks import shape_error, value_error
from moe_kernels.nn.multi_lora import AdapterRouting


class PerAdapterModule(nn.Module):
    """Runs each sequence through its adapter's copy of a module, all others through the module itself.

    The sequences of one copy run together. Which copies a batch needs is read on the host, so on a GPU a call waits.

    Args:
        base_layer: any module whose first input and whose output have the batch as first dimension.
        routing: whose ``adapter_ids`` say which copy; one adapter a sequence where copies are concerned.
    """

    def __init__(self, base_layer: nn.Module, routing: AdapterRouting):
        super().__init__()
        self.base_layer, self.routing, self.copies = base_layer, routing, nn.ModuleDict()

    def __getattr__(self, name: str):
        """What the module itself has (``weight``, ``in_features``), for code that looks there."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, x: Tensor, *arguments, **options) -> Tensor:
        ids = self.routing.adapter_ids
        if ids is None or not self.copies:
            return self.base_layer(x, *arguments, **options)
        if self.routing.per != "sequence" or ids.shape[0] != x.shape[0]:
            raise shape_error("PerAdapterModule", "adapter_ids", f"[batch={x.shape[0]}], one a sequence", ids)
        rows: dict[str, list[int]] = {}
        for row, of_row in enumerate(ids.reshape(len(ids), -1).tolist()):
            named = [str(slot) for slot in of_row if str(slot) in self.copies]
            if named and len(of_row) > 1:
                expected = "one for a sequence whose adapter has a module of its own"
                raise value_error("PerAdapterModule", "adapter_ids", expected, of_row, "do not mix it with others")
            rows.setdefault(named[0] if named else "", []).append(row)
        if len(rows) == 1:
            (slot,) = rows
            return (self.copies[slot] if slot else self.base_layer)(x, *arguments, **options)
        out = None
        for slot, of_slot in rows.items():
            part = (self.copies[slot] if slot else self.base_layer)(x[of_slot], *arguments, **options)
            out = part.new_empty(len(ids), *part.shape[1:]) if out is None else out
            out[of_slot] = part
        return out

"""``ep_implementation="moe_kernels"``: transformers' expert parallelism with each token sent once to a rank."""

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface

from moe_kernels.distributed.faults import announcing
from moe_kernels.distributed.sizes import Team
from moe_kernels.distributed.trip import Trip


class DeduplicatedEP(EPImplementation):
    """Brings the experts of a transformers model their tokens by :class:`moe_kernels.distributed.trip.Trip`.

    ::

        config = DistributedConfig(fsdp_size=8, ep_size=8, ep_implementation="moe_kernels")
        AutoModelForCausalLM.from_pretrained(name, distributed_config=config, experts_implementation="moe_kernels")

    transformers' ``all_to_all`` sends a row for each (token, expert) pair each way; this one a row for each (token,
    rank). Any ``experts_implementation`` that skips ids outside its experts runs on the ranks: ours does, and
    transformers' own do where they know that they are expert parallel.

    Ranks of a tensor-parallel group share a batch. Each sends its part of the tokens, and they gather the results.
    """

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[num_tokens, hidden_size] and [num_tokens, top_k] of this rank's batch -> [num_tokens, hidden_size]."""
        shape = hidden_states.shape
        batch = (hidden_states, top_k_index, top_k_weights)
        if self.tp_mesh.size() > 1:  # no exchange forward; backward gathers the gradients of the parts
            whole = [DTensor.from_local(tensor, self.tp_mesh, [Replicate()], run_check=False) for tensor in batch]
            batch = [tensor.redistribute(placements=[Shard(0)]).to_local() for tensor in whole]
        num_experts = self.num_local_experts * self.ep_mesh.size()
        team = Team(self.ep_mesh.get_group(), "transformers' experts", num_experts)
        with announcing(team.group, team.layer):
            out = Trip(*batch, team).run(self._run).finish()
        if self.tp_mesh.size() == 1:
            return out
        parts = {"device_mesh": self.tp_mesh, "placements": [Shard(0)], "run_check": False}
        return DTensor.from_local(out, **parts, shape=shape, stride=(shape[1], 1)).full_tensor()

    def _run(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        # transformers marks a pair of another rank by the number of local experts, and counts ids one-hot
        return self.experts_forward(rows, ids.long().masked_fill(ids < 0, self.num_local_experts), weights)


def register(name: str) -> None:
    EPImplementationInterface.register(name, DeduplicatedEP)

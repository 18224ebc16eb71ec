"""onnxruntime's contrib op ``com.microsoft.MoE`` (float32 on the CPU)."""

import torch
from torch import Tensor

from benchmarks.providers.base import Batch, Layer, Provider, Run, module_missing


class OnnxRuntimeMoE(Provider):
    name = "onnxruntime"
    what = "onnxruntime, com.microsoft.MoE with fused SwiGLU, given logits that lead to the same routing"
    distribution = "onnxruntime"
    copies = 2.0  # the interleaved first projection and the session's own packing

    def missing(self) -> str | None:
        return module_missing("onnxruntime", "onnxruntime onnx") or module_missing("onnx", "onnx")

    def unsuited(self, layer: Layer, num_tokens: int | None = None) -> str | None:
        return None if layer.dtype == torch.float32 else "float32 only on the CPU"

    def prepare(self, layer: Layer) -> Run:
        import onnxruntime
        from onnx import TensorProto, helper

        shape = layer.shape
        # on the CPU the fused SwiGLU takes alternating gate and up rows only
        first = torch.stack(layer.gate_up_proj.detach().chunk(2, dim=1), dim=2).flatten(1, 2)
        weights = {"gate_up": first, "down": layer.down_proj.detach()}

        def external(name: str, tensor: Tensor) -> TensorProto:
            # only announced here, handed over below: a model file ends at 2 GiB
            proto = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=list(tensor.shape))
            proto.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "weights"), ("offset", 0), ("length", tensor.numel() * 4)):
                entry = proto.external_data.add()
                entry.key, entry.value = key, str(value)
            return proto

        node = helper.make_node(
            "MoE",
            ["hidden_states", "router_logits", "gate_up", "", "down"],
            ["out"],
            domain="com.microsoft",
            k=shape.top_k,
            activation_type="swiglu",
            swiglu_fusion=1,
            activation_alpha=1.0,
            activation_beta=0.0,
            normalize_routing_weights=1,
        )
        inputs = [
            helper.make_tensor_value_info("hidden_states", TensorProto.FLOAT, ["num_tokens", shape.hidden_size]),
            helper.make_tensor_value_info("router_logits", TensorProto.FLOAT, ["num_tokens", shape.num_experts]),
        ]
        output = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["num_tokens", shape.hidden_size])
        graph = helper.make_graph([node], "moe", inputs, [output], [external(n, t) for n, t in weights.items()])
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = layer.threads
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy()) for tensor in weights.values()]
        options.add_external_initializers(list(weights), values)
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        logits_of: dict[int, tuple[Batch, Tensor]] = {}

        def run(batch: Batch, _keep=(weights, values)) -> Tensor:
            if id(batch) not in logits_of:
                # softmax over these, renormalised over the chosen, gives exactly this batch's weights
                logits = torch.full((batch.topk_ids.shape[0], shape.num_experts), -1e4)
                logits_of[id(batch)] = batch, logits.scatter_(1, batch.topk_ids, batch.topk_weights_fp32.log())
            logits = logits_of[id(batch)][1]
            feeds = {"hidden_states": batch.hidden_states.numpy(), "router_logits": logits.numpy()}
            return torch.from_numpy(session.run(None, feeds)[0])

        return run

// Memory of large results that is kept when they are freed, for the next result of about that size.
//
// A training step frees its weight gradients and asks for as many bytes again. Fresh memory costs more than filling it:
// the kernel clears every page (shape A in float32, 2.4 GB of gradients: half of the backward's time), and in a virtual
// machine the host may have to find it first. Nothing is kept beyond what was in use at once before.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>

namespace moe {

// An uninitialised contiguous tensor with the dtype and device of `like`: kept memory for 8 MiB or more, else new_empty.
torch::stable::Tensor new_result(const torch::stable::Tensor& like, std::initializer_list<int64_t> shape);

// Gives what is kept and not in use back to the system; returns how many bytes that was.
int64_t empty_cache();

}  // namespace moe

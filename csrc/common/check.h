// The only error macro. Full checks live in the Python api; C++ repeats what would otherwise read out of bounds.
#pragma once

#include <torch/headeronly/util/Exception.h>

// MOE_CHECK(rows.dim() == 2, "permute: rows must be 2-dimensional, got ", rows.dim());
#define MOE_CHECK(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)

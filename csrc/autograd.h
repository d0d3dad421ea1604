// The CPU ops with their gradients, as graph nodes in C++. Operands as in cpu/ops.h, checked by the caller; the factors, x
// and rank_scales may require gradients.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

#include "cpu/lora_delta.h"

namespace adaptlora {

// x (..., K) -> the y_i (..., N_i); R_i >= 1. A layer alone is a group of one.
std::vector<at::Tensor> lora_group_autograd(const at::Tensor& x, const std::vector<at::Tensor>& weights,
                                            const OptionalTensors& biases, const Group& group);

std::tuple<at::Tensor, at::Tensor> rank_norms_autograd(const std::vector<at::Tensor>& As,
                                                       const std::vector<at::Tensor>& Bs);

}  // namespace adaptlora

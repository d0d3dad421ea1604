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

// (A_eff, B_eff), products that are there already, as functions of A and B; more rank vectors may follow the products'.
std::tuple<at::Tensor, at::Tensor> composed_autograd(const at::Tensor& A, const at::Tensor& B,
                                                     const at::Tensor& outer_A, const at::Tensor& outer_B,
                                                     const at::Tensor& A_eff, const at::Tensor& B_eff);

}  // namespace adaptlora

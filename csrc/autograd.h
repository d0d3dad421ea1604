// The CPU ops with their gradients, as graph nodes in C++. Operands as in cpu/ops.h, checked by the caller; the factors, x
// and rank_scales may require gradients.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

#include "cpu/ops.h"

namespace adaptlora {

// One module of lora_group.
struct GroupModule {
  at::Tensor weight;
  std::optional<at::Tensor> bias;
  at::Tensor A, B;
  std::optional<at::Tensor> rank_scale;
  double scaling;
  std::optional<at::Tensor> seed;  // given if dropout_p > 0
};

// x (..., K) -> the y_i (..., N_i); R_i >= 1. lora_linear is a group of one.
std::vector<at::Tensor> lora_group_autograd(const at::Tensor& x, const std::vector<GroupModule>& modules,
                                            double dropout_p);

std::tuple<at::Tensor, at::Tensor> rank_norms_autograd(const std::vector<at::Tensor>& As,
                                                       const std::vector<at::Tensor>& Bs);

}  // namespace adaptlora

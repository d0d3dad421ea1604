// The low-rank term as lora_delta_ and lora_linear share it.
#pragma once

#include <optional>

#include "ops.h"

namespace adaptlora {

// A (R, K), B (N, R) and what scales and drops: operands of ops.h, held for the length of one call.
struct Adapter {
  const at::Tensor &A, &B;
  const std::optional<at::Tensor>& rank_scale;
  double scaling, dropout_p;
  int64_t threshold;
  const std::optional<at::Tensor>& seed;
};

// y (M, N) = (add ? y : 0) + bias + (S ∘ e) Bᵀ;  y has unit column stride and the dtype and rows of x. Returns S (M, R).
at::Tensor lora_expand_into(const char* op, const at::Tensor& y, bool add, const std::optional<at::Tensor>& bias,
                            const at::Tensor& x, const Adapter& adapter);

// As lora_delta_backward_cpu, under the name `op` in messages; dx is contiguous and nobody else's.
Gradients lora_delta_gradients(const char* op, const at::Tensor& dy, const at::Tensor& x, const at::Tensor& S,
                               const Adapter& adapter, bool need_dx, bool need_dA, bool need_dB, bool need_dE);

}  // namespace adaptlora

// The low-rank terms of modules that share x: what lora_linear, lora_group and lora_delta_ have in common. A layer alone
// is a group of one.
#pragma once

#include <optional>
#include <ostream>
#include <vector>

#include "ops.h"

namespace adaptlora {

// Whose operand a message is about: "lora_linear", or "lora_group: module 2".
struct Where {
  const char* op;
  int64_t module = -1;
};

inline std::ostream& operator<<(std::ostream& out, const Where& where) {
  out << where.op;
  if (where.module >= 0) out << ": module " << where.module;
  return out;
}

// A (R, K), B (N, R) and what scales and drops one module.
struct Adapter {
  at::Tensor A, B;
  std::optional<at::Tensor> rank_scale;
  double scaling;
  std::optional<int64_t> seed;
};

// Modules that share x and the rate of dropout. `grouped`: messages number the modules.
struct Group {
  const char* op;
  bool grouped;
  std::vector<Adapter> modules;
  double dropout_p;
  int64_t threshold;

  Where where(size_t i) const { return {op, grouped ? static_cast<int64_t>(i) : -1}; }
};

// A layer alone, with the seed as the ops take it.
Group group_of_one(const char* op, const at::Tensor& A, const at::Tensor& B,
                   const std::optional<at::Tensor>& rank_scale, double scaling, double dropout_p, int64_t threshold,
                   const std::optional<at::Tensor>& seed);

// Raises unless x is (M, K), M, K >= 1, in a dtype that has kernels.
void check_tokens(const Where& where, const at::Tensor& x);

// Raises unless the rate is one and every module has a seed where there is dropout.
void check_dropout(const Group& group);

// y_i (M, N_i) = (add ? y_i : 0) + bias_i + (S_i ∘ e_i) B_iᵀ;  each y has unit column stride and the dtype and rows of x,
// of which every element is read from memory once. Returns S (M, sum R_i).
at::Tensor lora_expand_into(const std::vector<at::Tensor>& ys, bool add, const OptionalTensors& biases,
                            const at::Tensor& x, const Group& group);

// dA needs x; dB and dE need S. dx needs neither.
struct Wanted {
  bool dA, dB, dE;
};

// As lora_group_backward_cpu, without Σ dy_i W_i; dx is contiguous and nobody else's, undefined if it is not needed. Each
// dy and x is read from memory once and dx written to it once; it is rounded once for each module.
struct DeltaGradients {
  at::Tensor dx;
  OptionalTensors dAs, dBs, dEs;
};

DeltaGradients lora_delta_gradients(const OptionalTensors& dys, const std::optional<at::Tensor>& x,
                                    const std::optional<at::Tensor>& S, const Group& group, bool need_dx,
                                    const std::vector<Wanted>& wanted);

// The whole layers: the y_i and S, and the gradients with dx = Σ dy_i W_i + …
std::tuple<std::vector<at::Tensor>, at::Tensor> lora_group_forward(const at::Tensor& x,
                                                                   const std::vector<at::Tensor>& weights,
                                                                   const OptionalTensors& biases, const Group& group);

GroupGradients lora_group_gradients(const OptionalTensors& dys, const std::optional<at::Tensor>& x,
                                    const std::vector<at::Tensor>& weights, const std::optional<at::Tensor>& S,
                                    const Group& group, bool need_dx, const std::vector<Wanted>& wanted);

}  // namespace adaptlora

// The functions of adaptlora._C, on CPU tensors. Equations and shapes: adaptlora/ops/<op>.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace adaptlora {

// x (M, K), weight (N, K), bias (N) in one dtype (fp32, bf16, fp16); A (R, K), B (N, R) and the rank scale E (R) fp32,
// bf16 or fp16. Any strides. M, K, N >= 1, 1 <= R <= kMaxRank. e = scaling · E, E = 1 where there is none.
// y (M, N) = x Wᵀ + bias + (S ∘ e) Bᵀ, dtype of x;  S (M, R) = drop(x) Aᵀ, fp32.
std::tuple<at::Tensor, at::Tensor> lora_linear_cpu(const at::Tensor& x, const at::Tensor& weight,
                                                   const std::optional<at::Tensor>& bias, const at::Tensor& A,
                                                   const at::Tensor& B, const std::optional<at::Tensor>& rank_scale,
                                                   double scaling, double dropout_p, int64_t threshold,
                                                   const std::optional<at::Tensor>& seed);

// (dx, dA, dB, dE), each None unless asked for. x is read for dA alone, S for dB and dE: without those they may be None.
using Gradients = std::tuple<std::optional<at::Tensor>, std::optional<at::Tensor>, std::optional<at::Tensor>,
                             std::optional<at::Tensor>>;

// dx (M, K) = dy W + mask ∘ (dS A) / (1 - p), dtype of dy;  dA (R, K) = dSᵀ drop(x), dtype of A;  dB = G ∘ e, dtype of B,
// (N, R) with strides (1, N);  dE (R) = scaling · Σ_n G B, dtype of E;  dS = (dy B) ∘ e,  G (N, R) = dyᵀ S.
Gradients lora_linear_backward_cpu(const at::Tensor& dy, const std::optional<at::Tensor>& x, const at::Tensor& weight,
                                   const std::optional<at::Tensor>& S, const at::Tensor& A, const at::Tensor& B,
                                   const std::optional<at::Tensor>& rank_scale, double scaling, double dropout_p,
                                   int64_t threshold, const std::optional<at::Tensor>& seed, bool need_dx, bool need_dA,
                                   bool need_dB, bool need_dE);

using OptionalTensors = std::vector<std::optional<at::Tensor>>;
using OptionalSeeds = std::optional<std::vector<at::Tensor>>;

// Modules that share x, each with operands as in lora_linear and a rank R_i >= 0 of its own: the y_i, and S (M, sum R_i)
// with the modules' columns in order. seeds: one for each module; nothing without dropout.
std::tuple<std::vector<at::Tensor>, at::Tensor> lora_group_cpu(
    const at::Tensor& x, const std::vector<at::Tensor>& weights, const OptionalTensors& biases,
    const std::vector<at::Tensor>& As, const std::vector<at::Tensor>& Bs, const OptionalTensors& rank_scales,
    const std::vector<double>& scalings, double dropout_p, int64_t threshold, const OptionalSeeds& seeds);

// (dx, dAs, dBs, dEs), each None unless asked for.
using GroupGradients = std::tuple<std::optional<at::Tensor>, OptionalTensors, OptionalTensors, OptionalTensors>;

// dx is the sum over the modules. dys: None for a module whose y nothing depends on; all its gradients are None then.
GroupGradients lora_group_backward_cpu(const OptionalTensors& dys, const std::optional<at::Tensor>& x,
                                       const std::vector<at::Tensor>& weights, const std::optional<at::Tensor>& S,
                                       const std::vector<at::Tensor>& As, const std::vector<at::Tensor>& Bs,
                                       const OptionalTensors& rank_scales, const std::vector<double>& scalings,
                                       double dropout_p, int64_t threshold, const OptionalSeeds& seeds, bool need_dx,
                                       const std::vector<bool>& need_dA, const std::vector<bool>& need_dB,
                                       const std::vector<bool>& need_dE);

// y (M, N) += (S ∘ e) Bᵀ in place, any strides without overlap, rounded once; returns S. Operands as in lora_linear.
at::Tensor lora_delta_cpu(const at::Tensor& y, const at::Tensor& x, const at::Tensor& A, const at::Tensor& B,
                          const std::optional<at::Tensor>& rank_scale, double scaling, double dropout_p,
                          int64_t threshold, const std::optional<at::Tensor>& seed);

// As lora_linear_backward without dy W.
Gradients lora_delta_backward_cpu(const at::Tensor& dy, const std::optional<at::Tensor>& x,
                                  const std::optional<at::Tensor>& S, const at::Tensor& A, const at::Tensor& B,
                                  const std::optional<at::Tensor>& rank_scale, double scaling, double dropout_p,
                                  int64_t threshold, const std::optional<at::Tensor>& seed, bool need_dx, bool need_dA,
                                  bool need_dB, bool need_dE);

// keep (M, K) bool: which elements the dropout of this seed keeps.
at::Tensor dropout_keep_cpu(const at::Tensor& seed, int64_t M, int64_t K, int64_t threshold);

// A (R, r_out), B (r_out, R), outer_A (r_out, K), outer_B (r_out, N), all fp32, any strides. A_eff (R, K) = A outer_A
// and B_eff (N, R) = outer_Bᵀ B, which is the transpose of contiguous rows.
std::tuple<at::Tensor, at::Tensor> compose_cpu(const at::Tensor& A, const at::Tensor& B, const at::Tensor& outer_A,
                                               const at::Tensor& outer_B);

// dA (R, r_out) = dA_eff outer_Aᵀ and dB (r_out, R) = outer_B dB_eff, the transpose of contiguous rows, for those given.
std::tuple<std::optional<at::Tensor>, std::optional<at::Tensor>> compose_backward_cpu(
    const std::optional<at::Tensor>& dA_eff, const std::optional<at::Tensor>& dB_eff, const at::Tensor& outer_A,
    const at::Tensor& outer_B);

// sources: (R_i, L_i), any real dtypes and strides. rows: int64, counts[i] row indices for each source in turn, -1
// for a row of zeros. New contiguous tensors (counts[i], L_i), bit for bit.
std::vector<at::Tensor> rank_gather_cpu(const std::vector<at::Tensor>& sources, const at::Tensor& rows,
                                        const std::vector<int64_t>& counts);

// As: (R_i, K_i), Bs: (N_i, R_i). The norms of all rows of A and all columns of B, module after module, fp32 (sum R_i).
std::tuple<at::Tensor, at::Tensor> rank_norms_cpu(const std::vector<at::Tensor>& As, const std::vector<at::Tensor>& Bs);

// Every row of A times its factor in fA, every column of B times its factor in fB (fp32, sum R_i); dtypes are kept.
// New tensors: A (R, K) contiguous, B (N, R) with strides (1, N).
std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> rank_scale_cpu(const std::vector<at::Tensor>& As,
                                                                            const std::vector<at::Tensor>& Bs,
                                                                            const at::Tensor& fA, const at::Tensor& fB);

void rank_scale_inplace_cpu(const std::vector<at::Tensor>& As, const std::vector<at::Tensor>& Bs, const at::Tensor& fA,
                            const at::Tensor& fB);

// a (b, R, R), fp32 or fp64, R <= kMaxRank, any strides: U, S (b, R) descending, Vh with a = U diag(S) Vh by one-sided
// Jacobi, and info (b) int32: the sweeps it took, -1 where it did not converge.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> jacobi_svd_cpu(const at::Tensor& a);

// gram (b, l, l), fp32 or fp64, l <= kMaxRank: the upper triangular R of gram = RᵀR, R⁻¹, and the condition (b) of the
// columns that gram was made of, see linalg/cholesky_qr.h; infinite, with R = R⁻¹ = 0, where gram is singular.
std::tuple<at::Tensor, at::Tensor, at::Tensor> cholesky_inverse_cpu(const at::Tensor& gram);

}  // namespace adaptlora

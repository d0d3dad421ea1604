// lora_linear: y and dx are first filled with the low-rank term (and the bias) and then handed to the base GEMM, which
// adds to them.
#include "host.h"
#include "lora_delta.h"
#include "ops.h"

namespace adaptlora {
namespace {

void check_weight(const char* op, const at::Tensor& x, const at::Tensor& weight) {
  TORCH_CHECK(is_supported(x) && x.dim() == 2, op,
              ": x must be a dense float32, bfloat16 or float16 CPU tensor of shape (M, K), got ", x.scalar_type(), " ",
              x.sizes(), " on ", x.device());
  TORCH_CHECK(weight.dim() == 2 && weight.size(0) >= 1 && weight.size(1) == x.size(1), op,
              ": weight must have shape (N, K) with N >= 1 and K=", x.size(1), " (x.shape[1]), got ", weight.sizes());
  TORCH_CHECK(is_supported(weight) && weight.scalar_type() == x.scalar_type(), op,
              ": weight must have the dtype of x, ", x.scalar_type(), ", on the CPU, got ", weight.scalar_type(),
              " on ", weight.device());
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> lora_linear_cpu(const at::Tensor& x, const at::Tensor& weight,
                                                   const std::optional<at::Tensor>& bias, const at::Tensor& A,
                                                   const at::Tensor& B, const std::optional<at::Tensor>& rank_scale,
                                                   double scaling, double dropout_p, int64_t threshold,
                                                   const std::optional<at::Tensor>& seed) {
  const PlainDispatch plain;
  const char* op = "lora_linear";
  check_weight(op, x, weight);
  const int64_t M = x.size(0), N = weight.size(0);
  if (bias.has_value()) {
    TORCH_CHECK(is_supported(*bias) && bias->scalar_type() == x.scalar_type() && bias->dim() == 1 && bias->size(0) == N,
                op, ": bias must be ", x.scalar_type(), " of shape (N,) = (", N, ",) on the CPU, got ",
                bias->scalar_type(), " ", bias->sizes());
  }
  const at::Tensor y = at::empty({M, N}, x.options());
  const at::Tensor S =
      lora_expand_into(op, y, false, bias, x, {A, B, rank_scale, scaling, dropout_p, threshold, seed});
  return {y.addmm_(x, weight.t()), S};
}

Gradients lora_linear_backward_cpu(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                                   const at::Tensor& S, const at::Tensor& A, const at::Tensor& B,
                                   const std::optional<at::Tensor>& rank_scale, double scaling, double dropout_p,
                                   int64_t threshold, const std::optional<at::Tensor>& seed, bool need_dx, bool need_dA,
                                   bool need_dB, bool need_dE) {
  const PlainDispatch plain;
  const char* op = "lora_linear_backward";
  check_weight(op, x, weight);
  Gradients grads = lora_delta_gradients(op, dy, x, S, {A, B, rank_scale, scaling, dropout_p, threshold, seed}, need_dx,
                                         need_dA, need_dB, need_dE);
  if (need_dx) std::get<0>(grads)->addmm_(dy, weight);
  return grads;
}

}  // namespace adaptlora

// lora_linear and lora_group: y and dx are first filled with the low-rank terms (and the bias) and then handed to the
// base GEMM, which adds to them.
#include "host.h"
#include "lora_delta.h"
#include "ops.h"

namespace adaptlora {
namespace {

// For a weight that multiplies x, or makes a dx.
void check_weight(const Where& where, const at::Tensor& x, const at::Tensor& weight) {
  TORCH_CHECK(weight.dim() == 2 && weight.size(0) >= 1 && weight.size(1) == x.size(1), where,
              ": weight must have shape (N, K) with N >= 1 and K=", x.size(1), " (x.shape[1]), got ", weight.sizes());
  TORCH_CHECK(is_supported(weight) && weight.scalar_type() == x.scalar_type(), where,
              ": weight must have the dtype of x, ", x.scalar_type(), ", on the CPU, got ", weight.scalar_type(),
              " on ", weight.device());
}

void check_bias(const Where& where, const at::Tensor& x, const at::Tensor& bias, int64_t N) {
  TORCH_CHECK(is_supported(bias) && bias.scalar_type() == x.scalar_type() && bias.dim() == 1 && bias.size(0) == N,
              where, ": bias must be ", x.scalar_type(), " of shape (N,) = (", N, ",) on the CPU, got ",
              bias.scalar_type(), " ", bias.sizes());
}

Group group_of(const char* op, const std::vector<at::Tensor>& weights, const std::vector<at::Tensor>& As,
               const std::vector<at::Tensor>& Bs, const OptionalTensors& rank_scales,
               const std::vector<double>& scalings, double dropout_p, int64_t threshold, const OptionalSeeds& seeds) {
  const size_t n = weights.size();
  TORCH_CHECK(n > 0, op, ": weights must hold at least one tensor, got none");
  const auto check = [&](const char* name, size_t length) {
    TORCH_CHECK(length == n, op, ": ", name, " must be as long as weights, ", n, ", got ", length);
  };
  check("As", As.size());
  check("Bs", Bs.size());
  check("rank_scales", rank_scales.size());
  check("scalings", scalings.size());
  if (seeds.has_value()) check("seeds", seeds->size());
  Group group{op, true, {}, dropout_p, threshold};
  for (size_t i = 0; i < n; ++i) {
    const auto seed = seeds.has_value() ? std::optional(seed_value(op, (*seeds)[i])) : std::nullopt;
    group.modules.push_back({As[i], Bs[i], rank_scales[i], scalings[i], seed});
  }
  return group;
}

}  // namespace

std::tuple<std::vector<at::Tensor>, at::Tensor> lora_group_forward(const at::Tensor& x,
                                                                   const std::vector<at::Tensor>& weights,
                                                                   const OptionalTensors& biases, const Group& group) {
  for (size_t i = 0; i < weights.size(); ++i) {
    check_tokens(group.where(i), x);
    check_weight(group.where(i), x, weights[i]);
    if (biases[i].has_value()) check_bias(group.where(i), x, *biases[i], weights[i].size(0));
  }
  std::vector<at::Tensor> ys;
  for (const at::Tensor& weight : weights) ys.push_back(at::empty({x.size(0), weight.size(0)}, x.options()));
  const at::Tensor S = lora_expand_into(ys, false, biases, x, group);
  for (size_t i = 0; i < ys.size(); ++i) ys[i].addmm_(x, weights[i].t());
  return {ys, S};
}

GroupGradients lora_group_gradients(const OptionalTensors& dys, const std::optional<at::Tensor>& x,
                                    const std::vector<at::Tensor>& weights, const std::optional<at::Tensor>& S,
                                    const Group& group, bool need_dx, const std::vector<Wanted>& wanted) {
  auto [dx, dAs, dBs, dEs] = lora_delta_gradients(dys, x, S, group, need_dx, wanted);
  if (!dx.defined()) return {std::nullopt, dAs, dBs, dEs};
  for (size_t i = 0; i < weights.size(); ++i) check_weight(group.where(i), dx, weights[i]);
  for (size_t i = 0; i < weights.size(); ++i) {
    if (dys[i].has_value()) dx.addmm_(*dys[i], weights[i]);
  }
  return {dx, dAs, dBs, dEs};
}

std::tuple<at::Tensor, at::Tensor> lora_linear_cpu(const at::Tensor& x, const at::Tensor& weight,
                                                   const std::optional<at::Tensor>& bias, const at::Tensor& A,
                                                   const at::Tensor& B, const std::optional<at::Tensor>& rank_scale,
                                                   double scaling, double dropout_p, int64_t threshold,
                                                   const std::optional<at::Tensor>& seed) {
  const PlainDispatch plain;
  const Group group = group_of_one("lora_linear", A, B, rank_scale, scaling, dropout_p, threshold, seed);
  auto [ys, S] = lora_group_forward(x, {weight}, {bias}, group);
  return {ys[0], S};
}

Gradients lora_linear_backward_cpu(const at::Tensor& dy, const std::optional<at::Tensor>& x, const at::Tensor& weight,
                                   const std::optional<at::Tensor>& S, const at::Tensor& A, const at::Tensor& B,
                                   const std::optional<at::Tensor>& rank_scale, double scaling, double dropout_p,
                                   int64_t threshold, const std::optional<at::Tensor>& seed, bool need_dx, bool need_dA,
                                   bool need_dB, bool need_dE) {
  const PlainDispatch plain;
  const Group group = group_of_one("lora_linear_backward", A, B, rank_scale, scaling, dropout_p, threshold, seed);
  auto [dx, dAs, dBs, dEs] = lora_group_gradients({dy}, x, {weight}, S, group, need_dx, {{need_dA, need_dB, need_dE}});
  return {dx, dAs[0], dBs[0], dEs[0]};
}

std::tuple<std::vector<at::Tensor>, at::Tensor> lora_group_cpu(
    const at::Tensor& x, const std::vector<at::Tensor>& weights, const OptionalTensors& biases,
    const std::vector<at::Tensor>& As, const std::vector<at::Tensor>& Bs, const OptionalTensors& rank_scales,
    const std::vector<double>& scalings, double dropout_p, int64_t threshold, const OptionalSeeds& seeds) {
  const PlainDispatch plain;
  const char* op = "lora_group";
  TORCH_CHECK(biases.size() == weights.size(), op, ": biases must be as long as weights, ", weights.size(), ", got ",
              biases.size());
  const Group group = group_of(op, weights, As, Bs, rank_scales, scalings, dropout_p, threshold, seeds);
  return lora_group_forward(x, weights, biases, group);
}

GroupGradients lora_group_backward_cpu(const OptionalTensors& dys, const std::optional<at::Tensor>& x,
                                       const std::vector<at::Tensor>& weights, const std::optional<at::Tensor>& S,
                                       const std::vector<at::Tensor>& As, const std::vector<at::Tensor>& Bs,
                                       const OptionalTensors& rank_scales, const std::vector<double>& scalings,
                                       double dropout_p, int64_t threshold, const OptionalSeeds& seeds, bool need_dx,
                                       const std::vector<bool>& need_dA, const std::vector<bool>& need_dB,
                                       const std::vector<bool>& need_dE) {
  const PlainDispatch plain;
  const char* op = "lora_group_backward";
  const Group group = group_of(op, weights, As, Bs, rank_scales, scalings, dropout_p, threshold, seeds);
  const size_t n = weights.size();
  TORCH_CHECK(dys.size() == n && need_dA.size() == n && need_dB.size() == n && need_dE.size() == n, op,
              ": dys, need_dA, need_dB and need_dE must be as long as weights, ", n, ", got ", dys.size(), ", ",
              need_dA.size(), ", ", need_dB.size(), " and ", need_dE.size());
  std::vector<Wanted> wanted;
  for (size_t i = 0; i < n; ++i) wanted.push_back({need_dA[i], need_dB[i], need_dE[i]});
  return lora_group_gradients(dys, x, weights, S, group, need_dx, wanted);
}

}  // namespace adaptlora

#include "autograd.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>

#include <cmath>

#include "cpu/host.h"

namespace adaptlora {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

std::vector<at::Tensor> present(const OptionalTensors& tensors) {
  std::vector<at::Tensor> out;
  for (const auto& t : tensors) {
    if (t.has_value()) out.push_back(*t);
  }
  return out;
}

void append(variable_list& list, at::TensorList tensors) { list.insert(list.end(), tensors.begin(), tensors.end()); }

at::Tensor as_2d(const at::Tensor& t) {
  if (t.dim() == 2) return t;
  const int64_t width = t.size(-1);
  return t.reshape({t.numel() / width, width});
}

// Gradients are made outside of any graph. Where one of the gradients themselves is being built (create_graph), they get
// a node that raises instead of a wrong second derivative.
variable_list without_second_derivative(const char* op, variable_list grads) {
  if (!at::GradMode::is_enabled()) return grads;
  const std::string message = std::string("adaptlora::") + op + ": second derivatives are not implemented";
  torch::autograd::DelayedError node(message, static_cast<int64_t>(grads.size()));
  for (at::Tensor& grad : grads) {
    if (grad.defined()) grad.requires_grad_();
  }
  return node.apply(std::move(grads));
}

class LoraGroupFunction : public torch::autograd::Function<LoraGroupFunction> {
 public:
  // rank_scales holds those that there are; which modules have one is in `modules`.
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, at::TensorList As, at::TensorList Bs,
                               at::TensorList rank_scales, const std::vector<GroupModule>& modules, double dropout_p) {
    std::vector<at::Tensor> weights;
    OptionalTensors biases, all_rank_scales;
    std::vector<double> scalings;
    std::vector<int64_t> has_rank_scale;
    OptionalSeeds seeds;
    if (dropout_p > 0) seeds.emplace();
    for (const GroupModule& module : modules) {
      weights.push_back(module.weight);
      biases.push_back(module.bias);
      all_rank_scales.push_back(module.rank_scale);
      has_rank_scale.push_back(module.rank_scale.has_value());
      scalings.push_back(module.scaling);
      if (seeds) seeds->push_back(*module.seed);
    }
    auto [ys, S] = lora_group_cpu(as_2d(x), weights, biases, As.vec(), Bs.vec(), all_rank_scales, scalings, dropout_p,
                                  dropout_threshold(dropout_p), seeds);
    auto shape = x.sizes().vec();
    for (at::Tensor& y : ys) {
      shape.back() = y.size(1);
      y = y.view(shape);
    }

    variable_list saved{x, S};
    for (const at::TensorList tensors : {at::TensorList(weights), As, Bs, rank_scales}) append(saved, tensors);
    if (seeds) append(saved, *seeds);
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    ctx->saved_data["scalings"] = scalings;
    ctx->saved_data["has_rank_scale"] = has_rank_scale;
    ctx->saved_data["dropout_p"] = dropout_p;
    return ys;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dys) {
    const std::vector<double> scalings = ctx->saved_data["scalings"].toDoubleVector();
    const std::vector<int64_t> has_rank_scale = ctx->saved_data["has_rank_scale"].toIntVector();
    const double dropout_p = ctx->saved_data["dropout_p"].toDouble();
    const size_t n = scalings.size();
    size_t n_scales = 0;
    for (const int64_t has : has_rank_scale) n_scales += has;

    const variable_list saved = ctx->get_saved_variables();
    auto next = saved.begin() + 2;
    const auto take = [&](size_t count) {
      next += static_cast<int64_t>(count);
      return std::vector<at::Tensor>(next - static_cast<int64_t>(count), next);
    };
    const at::Tensor &x = saved[0], &S = saved[1];
    const auto weights = take(n), As = take(n), Bs = take(n), scales = take(n_scales);
    const OptionalSeeds seeds = dropout_p > 0 ? OptionalSeeds(take(n)) : std::nullopt;

    OptionalTensors rank_scales(n), dys_2d(n);
    std::vector<bool> need_dA(n), need_dB(n), need_dE(n);
    bool any = false;
    for (size_t i = 0, scale = 0; i < n; ++i) {
      const bool has = has_rank_scale[i] != 0;
      if (has) rank_scales[i] = scales[scale];
      if (dys[i].defined()) {
        any = true;
        dys_2d[i] = as_2d(dys[i]);
        need_dA[i] = ctx->needs_input_grad(1 + i);
        need_dB[i] = ctx->needs_input_grad(1 + n + i);
        need_dE[i] = has && ctx->needs_input_grad(1 + 2 * n + scale);
      }
      scale += has;
    }
    variable_list grads(1 + 2 * n + n_scales);
    if (any) {
      auto [dx, dAs, dBs, dEs] =
          lora_group_backward_cpu(dys_2d, as_2d(x), weights, S, As, Bs, rank_scales, scalings, dropout_p,
                                  dropout_threshold(dropout_p), seeds, ctx->needs_input_grad(0), need_dA, need_dB,
                                  need_dE);
      if (dx.has_value()) grads[0] = dx->view(x.sizes());
      for (size_t i = 0, scale = 0; i < n; ++i) {
        if (dAs[i].has_value()) grads[1 + i] = *dAs[i];
        if (dBs[i].has_value()) grads[1 + n + i] = *dBs[i];
        if (dEs[i].has_value()) grads[1 + 2 * n + scale] = *dEs[i];
        scale += has_rank_scale[i];
      }
    }
    grads = without_second_derivative("lora_group_backward", std::move(grads));
    grads.resize(grads.size() + 2);  // modules and dropout_p
    return grads;
  }
};

class RankNormsFunction : public torch::autograd::Function<RankNormsFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, at::TensorList As, at::TensorList Bs) {
    auto [norms_A, norms_B] = rank_norms_cpu(As.vec(), Bs.vec());
    variable_list saved;
    append(saved, As);
    append(saved, Bs);
    saved.insert(saved.end(), {norms_A, norms_B});
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    return {norms_A, norms_B};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const auto n = static_cast<int64_t>(saved.size() / 2 - 1);
    if (!grads[0].defined() && !grads[1].defined()) return variable_list(2 * n);
    // The gradient of ‖v‖ is v / ‖v‖, and 0 at v = 0.
    const auto factors = [&](size_t side) {
      const at::NoGradGuard no_grad;
      const at::Tensor& norms = saved[2 * n + side];
      if (!grads[side].defined()) return at::zeros_like(norms);
      return at::where(norms > 0, grads[side] / norms, at::zeros({}, norms.options()));
    };
    const auto first = saved.begin();
    auto [scaled, scaled_Bs] = rank_scale_cpu({first, first + n}, {first + n, first + 2 * n}, factors(0), factors(1));
    append(scaled, scaled_Bs);
    return without_second_derivative("rank_scale", std::move(scaled));
  }
};

}  // namespace

std::vector<at::Tensor> lora_group_autograd(const at::Tensor& x, const std::vector<GroupModule>& modules,
                                            double dropout_p) {
  std::vector<at::Tensor> As, Bs;
  OptionalTensors rank_scales;
  for (const GroupModule& module : modules) {
    As.push_back(module.A);
    Bs.push_back(module.B);
    rank_scales.push_back(module.rank_scale);
  }
  const std::vector<at::Tensor> given_scales = present(rank_scales);
  return LoraGroupFunction::apply(x, at::TensorList(As), at::TensorList(Bs), at::TensorList(given_scales), modules,
                                  dropout_p);
}

std::tuple<at::Tensor, at::Tensor> rank_norms_autograd(const std::vector<at::Tensor>& As,
                                                       const std::vector<at::Tensor>& Bs) {
  const variable_list norms = RankNormsFunction::apply(at::TensorList(As), at::TensorList(Bs));
  return {norms[0], norms[1]};
}

}  // namespace adaptlora

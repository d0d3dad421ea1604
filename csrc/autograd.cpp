#include "autograd.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <ATen/record_function.h>

#include <algorithm>

#include "cpu/host.h"
#include "plain.h"

namespace adaptlora {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

void append(variable_list& list, at::TensorList tensors) { list.insert(list.end(), tensors.begin(), tensors.end()); }

at::Tensor as_2d(const at::Tensor& t) {
  if (t.dim() == 2) return t;
  const int64_t width = t.size(-1);
  return t.reshape({t.numel() / width, width});
}

// The op of this name on the operands: what a backward does whose surroundings or upstream gradients are not plain, as
// those of a plain forward need not be (a FLOP counter around the backward, batched or lazily negated gradients), and what it
// does with create_graph: the op has a gradient of its own, which says that there is no second derivative.
torch::jit::Stack call_op(const char* name, torch::jit::Stack operands) {
  c10::Dispatcher::singleton().findSchemaOrThrow(name, "").callBoxed(operands);
  return operands;
}

bool plain_backward() { return !at::GradMode::is_enabled() && plain_context(); }

bool all_plain(const variable_list& tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const at::Tensor& t) { return !t.defined() || is_plain(t); });
}

// What of x and S some gradient is made of: dA of x, dB and dE of S, dx of neither. ops/lora_delta.py's to_save.
variable_list to_save(const at::Tensor& x, const at::Tensor& S, const Group& group) {
  bool trains_A = false, trains_S = false;
  for (const auto& [A, B, rank_scale, scaling, seed] : group.modules) {
    trains_A = trains_A || A.requires_grad();
    trains_S = trains_S || B.requires_grad() || (rank_scale.has_value() && rank_scale->requires_grad());
  }
  return {trains_A ? x : at::Tensor(), trains_S ? S : at::Tensor()};
}

std::optional<at::Tensor> if_defined(const at::Tensor& t) { return t.defined() ? std::optional(t) : std::nullopt; }

class LoraGroupFunction : public torch::autograd::Function<LoraGroupFunction> {
 public:
  // As, Bs and the rank_scales that there are: those of `group`, as inputs of the graph.
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, at::TensorList As, at::TensorList Bs,
                               at::TensorList rank_scales, const std::vector<at::Tensor>& weights,
                               const OptionalTensors& biases, const Group& group) {
    RECORD_FUNCTION(group.grouped ? "adaptlora::lora_group" : "adaptlora::lora_linear", std::vector<c10::IValue>());
    const PlainDispatch plain;
    auto [ys, S] = lora_group_forward(as_2d(x), weights, biases, group);
    if (x.dim() != 2) {
      auto shape = x.sizes().vec();
      for (at::Tensor& y : ys) {
        shape.back() = y.size(1);
        y = y.view(shape);
      }
    }
    // What the registered ops save, in their order: a checkpoint may recompute on the other path.
    variable_list saved = to_save(x, S, group);
    for (const at::TensorList tensors : {at::TensorList(weights), As, Bs}) append(saved, tensors);
    for (const Adapter& adapter : group.modules) {
      if (adapter.rank_scale.has_value()) {
        saved.push_back(*adapter.rank_scale);
      } else if (group.grouped) {
        saved.push_back(at::empty({0}, x.options()));
      }
    }
    std::vector<double> scalings;
    std::vector<int64_t> has_rank_scale;
    for (const Adapter& adapter : group.modules) {
      scalings.push_back(adapter.scaling);
      has_rank_scale.push_back(adapter.rank_scale.has_value());
      if (group.dropout_p > 0) saved.push_back(at::scalar_tensor(*adapter.seed, at::kLong));
    }
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    ctx->saved_data["scalings"] = std::move(scalings);
    ctx->saved_data["has_rank_scale"] = std::move(has_rank_scale);
    ctx->saved_data["dropout_p"] = group.dropout_p;
    ctx->saved_data["grouped"] = group.grouped;
    return ys;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dys) {
    const std::vector<double> scalings = ctx->saved_data["scalings"].toDoubleVector();
    const std::vector<int64_t> has_rank_scale = ctx->saved_data["has_rank_scale"].toIntVector();
    const double dropout_p = ctx->saved_data["dropout_p"].toDouble();
    const size_t n = scalings.size();

    const bool grouped = ctx->saved_data["grouped"].toBool();
    const char* op = grouped ? "lora_group_backward" : "lora_linear_backward";
    const variable_list saved = ctx->get_saved_variables();
    const auto x = if_defined(saved[0]), S = if_defined(saved[1]);
    const at::Tensor *weights = saved.data() + 2, *As = weights + n, *Bs = As + n, *rank_scales = Bs + n;
    const at::Tensor* seeds = saved.data() + saved.size() - n;  // with dropout
    const auto n_scales = static_cast<size_t>(std::count(has_rank_scale.begin(), has_rank_scale.end(), 1));

    Group group{op, grouped, {}, dropout_p, dropout_threshold(dropout_p)};
    std::vector<Wanted> wanted(n);
    bool any = false;
    for (size_t i = 0, scale = 0; i < n; ++i) {
      const bool has = has_rank_scale[i] != 0;
      const auto seed = dropout_p > 0 ? std::optional(seed_value(op, seeds[i])) : std::nullopt;
      const auto rank_scale = has ? std::optional(rank_scales[grouped ? i : scale]) : std::nullopt;
      group.modules.push_back({As[i], Bs[i], rank_scale, scalings[i], seed});
      if (dys[i].defined()) {
        any = true;
        wanted[i] = {ctx->needs_input_grad(1 + i), ctx->needs_input_grad(1 + n + i),
                     has && ctx->needs_input_grad(1 + 2 * n + scale)};
      }
      scale += has;
    }
    variable_list grads(1 + 2 * n + n_scales);
    if (any) {
      const bool need_dx = ctx->needs_input_grad(0);
      auto [dx, dAs, dBs, dEs] = plain_backward() && all_plain(dys) && all_plain(saved)
                                     ? plain_gradients(dys, x, {weights, weights + n}, S, group, need_dx, wanted)
                                     : dispatched_gradients(dys, x, {weights, weights + n}, S, group, need_dx, wanted);
      if (dx.has_value()) grads[0] = *dx;
      for (size_t i = 0, scale = 0; i < n; ++i) {
        if (dAs[i].has_value()) grads[1 + i] = *dAs[i];
        if (dBs[i].has_value()) grads[1 + n + i] = *dBs[i];
        if (dEs[i].has_value()) grads[1 + 2 * n + scale] = *dEs[i];
        scale += has_rank_scale[i];
      }
    }
    grads.resize(grads.size() + 3);  // weights, biases and group
    return grads;
  }

 private:
  static GroupGradients plain_gradients(const variable_list& dys, const std::optional<at::Tensor>& x,
                                        const std::vector<at::Tensor>& weights, const std::optional<at::Tensor>& S,
                                        const Group& group, bool need_dx, const std::vector<Wanted>& wanted) {
    RECORD_FUNCTION(std::string("adaptlora::") + group.op, std::vector<c10::IValue>());
    const PlainDispatch plain;
    OptionalTensors dys_2d;
    std::vector<int64_t> shape;  // of x
    for (const at::Tensor& dy : dys) {
      dys_2d.push_back(dy.defined() ? std::optional(as_2d(dy)) : std::nullopt);
      if (dy.defined()) shape = dy.sizes().vec();
    }
    const auto tokens = x.has_value() ? std::optional(as_2d(*x)) : std::nullopt;
    GroupGradients grads = lora_group_gradients(dys_2d, tokens, weights, S, group, need_dx, wanted);
    auto& dx = std::get<0>(grads);
    if (dx.has_value() && shape.size() != 2) {
      shape.back() = dx->size(1);
      dx = dx->view(shape);
    }
    return grads;
  }

  // Module after module: torch's fallbacks, for lazily negated tensors above all, do not look into a list of optional ones.
  static GroupGradients dispatched_gradients(const variable_list& dys, const std::optional<at::Tensor>& x,
                                             const std::vector<at::Tensor>& weights, const std::optional<at::Tensor>& S,
                                             const Group& group, bool need_dx, const std::vector<Wanted>& wanted) {
    const size_t n = dys.size();
    std::optional<at::Tensor> dx;
    OptionalTensors dAs(n), dBs(n), dEs(n);
    int64_t column = 0;
    for (size_t i = 0; i < n; ++i) {
      const auto& [A, B, rank_scale, scaling, seed] = group.modules[i];
      const c10::IValue S_i = S.has_value() ? c10::IValue(S->narrow(1, column, A.size(0))) : c10::IValue();
      column += A.size(0);
      if (!dys[i].defined()) continue;
      const c10::IValue seed_value = seed ? c10::IValue(at::scalar_tensor(*seed, at::kLong)) : c10::IValue();
      const std::vector<bool> need{need_dx, wanted[i].dA, wanted[i].dB, wanted[i].dE};
      if (std::find(need.begin(), need.end(), true) == need.end()) continue;
      const auto grads = call_op("adaptlora::lora_linear_backward",
                                 {dys[i], x, weights[i], S_i, A, B, rank_scale, seed_value, scaling, group.dropout_p,
                                  c10::List<bool>({need[0], need[1], need[2], need[3]})});
      const auto gradient = [&](size_t which) {
        return need[which] ? std::optional(grads[which].toTensor()) : std::nullopt;
      };
      if (need_dx) dx = dx.has_value() ? *dx + *gradient(0) : *gradient(0);
      dAs[i] = gradient(1);
      dBs[i] = gradient(2);
      dEs[i] = gradient(3);
    }
    return {dx, dAs, dBs, dEs};
  }
};

class RankNormsFunction : public torch::autograd::Function<RankNormsFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, at::TensorList As, at::TensorList Bs) {
    RECORD_FUNCTION("adaptlora::rank_norms", std::vector<c10::IValue>());
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
      const at::Tensor& norms = saved[2 * n + side];
      if (!grads[side].defined()) return at::zeros_like(norms);
      return at::where(norms > 0, grads[side] / norms, at::zeros({}, norms.options()));
    };
    const auto first = saved.begin();
    const std::vector<at::Tensor> As(first, first + n), Bs(first + n, first + 2 * n);
    const at::Tensor factors_A = factors(0), factors_B = factors(1);
    variable_list scaled;
    if (plain_backward() && all_plain(saved) && all_plain({factors_A, factors_B})) {
      RECORD_FUNCTION("adaptlora::rank_scale", std::vector<c10::IValue>());
      auto [scaled_As, scaled_Bs] = rank_scale_cpu(As, Bs, factors_A, factors_B);
      scaled = std::move(scaled_As);
      append(scaled, scaled_Bs);
    } else {
      scaled = call_op("adaptlora::rank_scale", {As, Bs, factors_A, factors_B})[0].toTensorVector();
    }
    return scaled;
  }
};

class ComposedFunction : public torch::autograd::Function<ComposedFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& A, const at::Tensor& B,
                               const at::Tensor& outer_A, const at::Tensor& outer_B, const at::Tensor& A_eff,
                               const at::Tensor& B_eff) {
    ctx->save_for_backward({outer_A, outer_B});
    ctx->set_materialize_grads(false);
    ctx->saved_data["rank"] = A.size(0);
    // Aliases: a graph must not hang on the tensors that the caller keeps.
    return {A_eff.detach(), B_eff.detach()};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const int64_t rank = ctx->saved_data["rank"].toInt();
    std::optional<at::Tensor> upstream[2];
    for (int64_t side = 0; side < 2; ++side) {
      if (grads[side].defined() && ctx->needs_input_grad(side)) upstream[side] = grads[side].narrow(side, 0, rank);
    }
    const auto& [dA_eff, dB_eff] = upstream;
    variable_list out(6);
    if (!dA_eff && !dB_eff) return out;
    if (plain_backward() && all_plain(saved) && all_plain(grads)) {
      RECORD_FUNCTION("adaptlora::compose_backward", std::vector<c10::IValue>());
      const auto [dA, dB] = compose_backward_cpu(dA_eff, dB_eff, saved[0], saved[1]);
      if (dA) out[0] = *dA;
      if (dB) out[1] = *dB;
      return out;
    }
    const c10::List<bool> need({dA_eff.has_value(), dB_eff.has_value()});
    const auto stack = call_op("adaptlora::compose_backward", {dA_eff, dB_eff, saved[0], saved[1], need});
    for (int64_t side = 0; side < 2; ++side) {
      if (upstream[side]) out[side] = stack[side].toTensor();
    }
    return out;
  }
};

}  // namespace

std::vector<at::Tensor> lora_group_autograd(const at::Tensor& x, const std::vector<at::Tensor>& weights,
                                            const OptionalTensors& biases, const Group& group) {
  std::vector<at::Tensor> As, Bs, rank_scales;
  for (const Adapter& adapter : group.modules) {
    As.push_back(adapter.A);
    Bs.push_back(adapter.B);
    if (adapter.rank_scale.has_value()) rank_scales.push_back(*adapter.rank_scale);
  }
  return LoraGroupFunction::apply(x, at::TensorList(As), at::TensorList(Bs), at::TensorList(rank_scales), weights,
                                  biases, group);
}

std::tuple<at::Tensor, at::Tensor> rank_norms_autograd(const std::vector<at::Tensor>& As,
                                                       const std::vector<at::Tensor>& Bs) {
  const variable_list norms = RankNormsFunction::apply(at::TensorList(As), at::TensorList(Bs));
  return {norms[0], norms[1]};
}

std::tuple<at::Tensor, at::Tensor> composed_autograd(const at::Tensor& A, const at::Tensor& B,
                                                     const at::Tensor& outer_A, const at::Tensor& outer_B,
                                                     const at::Tensor& A_eff, const at::Tensor& B_eff) {
  const variable_list factors = ComposedFunction::apply(A, B, outer_A, outer_B, A_eff, B_eff);
  return {factors[0], factors[1]};
}

}  // namespace adaptlora

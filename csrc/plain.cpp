#include "plain.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/jit/frontend/tracer.h>

namespace adaptlora {

bool plain_context() {
  using c10::DispatchKey;
  return !c10::impl::TorchDispatchModeTLS::any_modes_set() && !at::impl::torch_function_mode_enabled() &&
         !c10::impl::tls_is_dispatch_key_included(DispatchKey::FuncTorchDynamicLayerFrontMode) &&
         !c10::impl::tls_is_dispatch_key_included(DispatchKey::Functionalize) && !torch::jit::tracer::isTracing() &&
         torch::autograd::ForwardADLevel::try_get_by_idx(0) == nullptr &&
         !(at::GradMode::is_enabled() &&
           c10::impl::tls_local_dispatch_key_set().excluded_.has(DispatchKey::AutogradFunctionality)) &&
         !at::autocast::is_autocast_enabled(at::kCPU);
}

bool is_plain(const at::Tensor& t) {
  static const c10::DispatchKeySet plain_keys = [] {
    const c10::InferenceMode normal_mode(false);
    return at::detail::empty_cpu({0}, at::TensorOptions(at::kFloat)).key_set();
  }();
  return t.defined() && t.device().is_cpu() && t.layout() == at::kStrided && plain_keys.has_all(t.key_set());
}

}  // namespace adaptlora

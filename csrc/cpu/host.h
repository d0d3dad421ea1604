// Helpers between ATen tensors and the raw kernels.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cmath>
#include <optional>

#include "isa.h"

namespace adaptlora {

// The ATen calls inside a kernel are neither recorded by autograd nor recast by autocast.
struct PlainDispatch {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::DispatchKey::AutocastCPU};
};

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

inline bool is_supported(const at::Tensor& t) {
  return t.device().is_cpu() && t.layout() == at::kStrided &&
         (t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kHalf);
}

inline Dtype dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return Dtype::f32;
    case at::kBFloat16: return Dtype::bf16;
    case at::kHalf: return Dtype::f16;
    default: TORCH_CHECK(false, "dtype must be float32, bfloat16 or float16, got ", t.scalar_type());
  }
}

inline MatrixView matrix_view(const at::Tensor& t) {
  return {t.const_data_ptr(), dtype_of(t), t.stride(0), t.stride(1)};
}

// The smallest kept value of a 24-bit word: round(p * 2^24), ties to even.
inline int64_t dropout_threshold(double p) { return std::llrint(p * (1 << 24)); }

inline void check_threshold(const char* op, int64_t threshold) {
  TORCH_CHECK(threshold >= 0 && threshold <= (1 << 24), op, ": threshold must be in [0, 2^24], got ", threshold);
}

inline int64_t seed_value(const char* op, const at::Tensor& seed) {
  TORCH_CHECK(seed.device().is_cpu() && seed.scalar_type() == at::kLong && seed.numel() == 1, op,
              ": seed must be one int64 on the CPU, got ", seed.scalar_type(), " of shape ", seed.sizes(), " on ",
              seed.device());
  return *seed.const_data_ptr<int64_t>();
}

inline Dropout make_dropout(int64_t seed, int64_t threshold) {
  const auto bits = static_cast<uint64_t>(seed);
  return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32), static_cast<int32_t>(threshold)};
}

}  // namespace adaptlora

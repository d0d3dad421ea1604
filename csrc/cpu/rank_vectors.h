// All rank vectors of all modules as one list, so that one parallel loop serves hundreds of modules.
#pragma once

#include <algorithm>
#include <vector>

#include "host.h"

namespace adaptlora {

// The rows of every A, module after module, then the columns of every B.
struct RankVectors {
  std::vector<VectorView> views;
  int64_t elements = 0;

  // Vectors per thread below which starting another thread costs more than it saves.
  int64_t grain() const {
    return std::max<int64_t>(1, static_cast<int64_t>(views.size()) * 32768 / std::max<int64_t>(1, elements));
  }
};

// rank_dim is 0 for A (rank vectors are its rows) and 1 for B (its columns).
inline void append_rank_vectors(const at::Tensor& factor, int64_t rank_dim, RankVectors& vectors) {
  auto* first = static_cast<char*>(const_cast<void*>(factor.const_data_ptr()));
  const int64_t step = factor.stride(rank_dim) * factor.element_size();
  for (int64_t r = 0; r < factor.size(rank_dim); ++r) {
    vectors.views.push_back(
        {first + r * step, factor.size(1 - rank_dim), factor.stride(1 - rank_dim), dtype_of(factor)});
  }
  vectors.elements += factor.numel();
}

inline RankVectors rank_vectors(const char* op, const std::vector<at::Tensor>& As, const std::vector<at::Tensor>& Bs) {
  TORCH_CHECK(As.size() == Bs.size(), op, ": As and Bs must have the same length, got ", As.size(), " and ", Bs.size());
  RankVectors vectors;
  for (size_t i = 0; i < As.size(); ++i) {
    for (const auto& [name, t] : {std::pair("As", As[i]), {"Bs", Bs[i]}}) {
      TORCH_CHECK(is_supported(t) && t.dim() == 2, op, ": ", name, "[", i,
                  "] must be a 2-d float32, bfloat16 or float16 CPU tensor, got ", t.scalar_type(), " of shape ",
                  t.sizes(), " on ", t.device());
    }
    TORCH_CHECK(As[i].size(0) == Bs[i].size(1), op, ": As[", i, "] (R, K) and Bs[", i,
                "] (N, R) must have the same R, got ", As[i].sizes(), " and ", Bs[i].sizes());
  }
  for (const at::Tensor& A : As) append_rank_vectors(A, 0, vectors);
  for (const at::Tensor& B : Bs) append_rank_vectors(B, 1, vectors);
  return vectors;
}

}  // namespace adaptlora

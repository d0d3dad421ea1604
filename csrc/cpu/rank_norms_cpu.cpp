#include <ATen/Parallel.h>

#include <cmath>

#include "ops.h"
#include "rank_vectors.h"

namespace adaptlora {

std::tuple<at::Tensor, at::Tensor> rank_norms_cpu(const std::vector<at::Tensor>& As,
                                                  const std::vector<at::Tensor>& Bs) {
  const PlainDispatch plain;
  const auto vectors = rank_vectors("rank_norms", As, Bs);
  const at::Tensor norms = at::empty({static_cast<int64_t>(vectors.views.size())}, at::kFloat);
  float* out = norms.mutable_data_ptr<float>();
  const Kernels& kernel = kernels();
  at::parallel_for(0, norms.numel(), vectors.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] = std::sqrt(kernel.sum_of_squares(vectors.views[i]));
  });
  const int64_t total_rank = norms.numel() / 2;
  return {norms.narrow(0, 0, total_rank).clone(), norms.narrow(0, total_rank, total_rank).clone()};
}

}  // namespace adaptlora

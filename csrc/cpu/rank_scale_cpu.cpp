#include <ATen/Parallel.h>

#include "ops.h"
#include "rank_vectors.h"

namespace adaptlora {
namespace {

void check_factors(const char* op, const char* name, const at::Tensor& f, int64_t total_rank) {
  TORCH_CHECK(f.device().is_cpu() && f.scalar_type() == at::kFloat && f.dim() == 1 && f.size(0) == total_rank, op, ": ",
              name, " must be float32 of shape (sum of ranks,) = (", total_rank, ",) on the CPU, got ", f.scalar_type(),
              " ", f.sizes(), " on ", f.device());
}

void scale_all(const char* op, const RankVectors& src, const RankVectors& dst, const at::Tensor& fA,
               const at::Tensor& fB) {
  const int64_t total_rank = static_cast<int64_t>(src.views.size()) / 2;
  check_factors(op, "fA", fA, total_rank);
  check_factors(op, "fB", fB, total_rank);
  const at::Tensor factors_A = fA.contiguous(), factors_B = fB.contiguous();
  const float* a = factors_A.const_data_ptr<float>();
  const float* b = factors_B.const_data_ptr<float>();
  const Kernels& kernel = kernels();
  at::parallel_for(0, 2 * total_rank, src.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kernel.scale_vector(src.views[i], dst.views[i], i < total_rank ? a[i] : b[i - total_rank]);
    }
  });
}

}  // namespace

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> rank_scale_cpu(const std::vector<at::Tensor>& As,
                                                                            const std::vector<at::Tensor>& Bs,
                                                                            const at::Tensor& fA,
                                                                            const at::Tensor& fB) {
  const PlainDispatch plain;
  const auto src = rank_vectors("rank_scale", As, Bs);
  std::vector<at::Tensor> out_As, out_Bs;
  for (const at::Tensor& A : As) out_As.push_back(at::empty(A.sizes(), A.options()));
  for (const at::Tensor& B : Bs) out_Bs.push_back(at::empty({B.size(1), B.size(0)}, B.options()).t());
  scale_all("rank_scale", src, rank_vectors("rank_scale", out_As, out_Bs), fA, fB);
  return {out_As, out_Bs};
}

void rank_scale_inplace_cpu(const std::vector<at::Tensor>& As, const std::vector<at::Tensor>& Bs, const at::Tensor& fA,
                            const at::Tensor& fB) {
  const PlainDispatch plain;
  const auto vectors = rank_vectors("rank_scale_", As, Bs);
  scale_all("rank_scale_", vectors, vectors, fA, fB);
}

}  // namespace adaptlora

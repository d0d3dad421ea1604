#include "../linalg/jacobi_svd.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include "host.h"
#include "ops.h"

namespace adaptlora {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> jacobi_svd_cpu(const at::Tensor& a) {
  TORCH_CHECK(a.device().is_cpu() && a.dim() == 3 && a.size(1) == a.size(2),
              "jacobi_svd: a must have shape (b, R, R) on the CPU, got ", a.sizes(), " on ", a.device());
  TORCH_CHECK(a.scalar_type() == at::kFloat || a.scalar_type() == at::kDouble,
              "jacobi_svd: a must be float32 or float64, got ", a.scalar_type());
  const PlainDispatch plain;
  const int64_t b = a.size(0), R = a.size(1);
  TORCH_CHECK(R <= kMaxRank, "jacobi_svd: a must have at most ", kMaxRank, " rows, got ", R);
  const at::Tensor ut = at::empty({b, R, R}, a.options().memory_format(at::MemoryFormat::Contiguous));
  const at::Tensor vh = at::empty_like(ut), s = at::empty({b, R}, ut.options());
  const at::Tensor info = at::zeros({b}, ut.options().dtype(at::kInt));
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "jacobi_svd", [&] {
    at::parallel_for(0, R == 0 ? 0 : b, 1, [&](int64_t begin, int64_t end) {
      const at::Tensor scratch = at::empty({2 * R * R + R}, ut.options());
      scalar_t* work = scratch.mutable_data_ptr<scalar_t>();
      linalg::Serial serial;
      for (int64_t i = begin; i < end; ++i) {
        info.mutable_data_ptr<int>()[i] = linalg::jacobi_svd<scalar_t>(
            serial, {static_cast<int>(R), a.const_data_ptr<scalar_t>() + i * a.stride(0), a.stride(1), a.stride(2),
                     ut.mutable_data_ptr<scalar_t>() + i * R * R, s.mutable_data_ptr<scalar_t>() + i * R,
                     vh.mutable_data_ptr<scalar_t>() + i * R * R, work + R, work + R + R * R, work});
      }
    });
  });
  return {ut.mT(), s, vh, info};
}

}  // namespace adaptlora

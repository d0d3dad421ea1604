#include "../linalg/cholesky_qr.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include "host.h"
#include "ops.h"

namespace adaptlora {

std::tuple<at::Tensor, at::Tensor, at::Tensor> cholesky_inverse_cpu(const at::Tensor& gram) {
  TORCH_CHECK(gram.device().is_cpu() && gram.dim() == 3 && gram.size(1) == gram.size(2),
              "cholesky_inverse: gram must have shape (b, l, l) on the CPU, got ", gram.sizes(), " on ", gram.device());
  TORCH_CHECK(gram.scalar_type() == at::kFloat || gram.scalar_type() == at::kDouble,
              "cholesky_inverse: gram must be float32 or float64, got ", gram.scalar_type());
  const PlainDispatch plain;
  const at::Tensor g = gram.contiguous();
  const int64_t b = g.size(0), l = g.size(1);
  TORCH_CHECK(l <= kMaxRank, "cholesky_inverse: gram must have at most ", kMaxRank, " rows, got ", l);
  const at::Tensor r = at::empty_like(g), rit = at::empty_like(g), condition = at::ones({b}, g.options());
  AT_DISPATCH_FLOATING_TYPES(g.scalar_type(), "cholesky_inverse", [&] {
    at::parallel_for(0, l == 0 ? 0 : b, 1, [&](int64_t begin, int64_t end) {
      const at::Tensor scratch = at::empty({l * l + 2 * l}, g.options());
      scalar_t* work = scratch.mutable_data_ptr<scalar_t>();
      linalg::Serial serial;
      for (int64_t i = begin; i < end; ++i) {
        condition.mutable_data_ptr<scalar_t>()[i] = linalg::cholesky_inverse<scalar_t>(
            serial, {static_cast<int>(l), g.const_data_ptr<scalar_t>() + i * l * l,
                     r.mutable_data_ptr<scalar_t>() + i * l * l, rit.mutable_data_ptr<scalar_t>() + i * l * l,
                     work + 2 * l, work});
      }
    });
  });
  return {r, rit.mT(), condition};
}

}  // namespace adaptlora

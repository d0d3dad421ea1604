#include <ATen/Parallel.h>

#include <algorithm>

#include "host.h"
#include "ops.h"

namespace adaptlora {

at::Tensor dropout_keep_cpu(const at::Tensor& seed, int64_t M, int64_t K, int64_t threshold) {
  TORCH_CHECK(M >= 0 && K >= 0, "dropout_keep: M and K must not be negative, got ", M, " and ", K);
  check_threshold("dropout_keep", threshold);
  const Dropout dropout = make_dropout(seed_value("dropout_keep", seed), threshold);
  const at::Tensor keep = at::empty({M, K}, at::kBool);
  bool* out = keep.mutable_data_ptr<bool>();
  const Kernels& kernel = kernels();
  at::parallel_for(0, (M + kTileRows - 1) / kTileRows, 1, [&](int64_t begin, int64_t end) {
    alignas(64) uint32_t mask[kTileRows * kTileStride];
    for (int64_t t = begin; t < end; ++t) {
      const int64_t m0 = t * kTileRows, rows = std::min(kTileRows, M - m0);
      for (int64_t k0 = 0; k0 < K; k0 += kTileCols) {
        const int64_t cols = std::min(kTileCols, K - k0);
        kernel.dropout_mask(dropout, m0, k0, rows, cols, mask);
        for (int64_t m = 0; m < rows; ++m) {
          for (int64_t k = 0; k < cols; ++k) out[(m0 + m) * K + k0 + k] = mask[m * kTileStride + k] != 0;
        }
      }
    }
  });
  return keep;
}

}  // namespace adaptlora

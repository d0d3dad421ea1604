// The execution policy of one thread block: a warp is a group.
#pragma once

#include <cuda_runtime.h>

#include "../linalg/policy.h"

namespace adaptlora::cuda {

constexpr int kWarp = 32;

struct Block {
  __device__ static int lane() { return threadIdx.x % kWarp; }
  __device__ static int lanes() { return kWarp; }
  __device__ static int group() { return threadIdx.x / kWarp; }
  __device__ static int groups() { return blockDim.x / kWarp; }
  template <typename T>
  __device__ static T sum(T value) {
    for (int offset = kWarp / 2; offset; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
    return value;
  }
  template <typename T>
  __device__ static T max(T value) {
    for (int offset = kWarp / 2; offset; offset /= 2) value = ::fmax(value, __shfl_xor_sync(~0u, value, offset));
    return value;
  }
  __device__ static void barrier() { __syncthreads(); }
  __device__ static bool any(bool value) { return __syncthreads_or(value); }
};

}  // namespace adaptlora::cuda

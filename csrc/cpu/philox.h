// Dropout bits: Philox4x32-10 [Salmon et al., SC 2011], 2 * kLanes of them at a time.
//
//   key = (seed & 0xffffffff, seed >> 32); element (m, k) takes output k % 4 of counter (k / 4, m, 0, 0);
//   it is kept iff (bits >> 8) >= threshold, threshold = round(p * 2^24).
#pragma once

#include "simd.h"

namespace adaptlora::ADAPTLORA_ISA_NAMESPACE {
namespace {

// kLanes / 2 counters. Only the low 32 bits of each 64-bit lane count; the high ones are left as they fall.
struct PhiloxBlock {
  vu64 c0, c1, c2, c3;
};

constexpr int kRounds = 10;

// The key of every round, in every lane.
struct PhiloxKeys {
  vu64 k0[kRounds], k1[kRounds];

  PhiloxKeys(uint32_t key0, uint32_t key1) {
    for (uint32_t round = 0; round < kRounds; ++round) {
      k0[round] = vu64{} + uint64_t(uint32_t(key0 + round * 0x9E3779B9u));
      k1[round] = vu64{} + uint64_t(uint32_t(key1 + round * 0xBB67AE85u));
    }
  }
};

ADAPTLORA_INLINE PhiloxBlock philox4x32_10(PhiloxBlock c, const PhiloxKeys& keys) {
  ADAPTLORA_UNROLL
  for (int round = 0; round < kRounds; ++round) {
    const vu64 p0 = multiply_low32(c.c0, 0xD2511F53u);
    const vu64 p1 = multiply_low32(c.c2, 0xCD9E8D57u);
    c = {(p1 >> 32) ^ c.c1 ^ keys.k0[round], p1, (p0 >> 32) ^ c.c3 ^ keys.k1[round], p0};
  }
  return c;
}

// c0 c1 c2 c3 of each counter side by side: first those of the counters in even lanes, then those in odd lanes.
ADAPTLORA_INLINE void interleave(const PhiloxBlock& c, vu& even, vu& odd) {
  const vu64 c01 = (c.c0 & 0xffffffffu) | (c.c1 << 32);
  const vu64 c23 = (c.c2 & 0xffffffffu) | (c.c3 << 32);
  even = (vu)__builtin_shufflevector(c01, c23, ADAPTLORA_LOW_PAIRS);
  odd = (vu)__builtin_shufflevector(c01, c23, ADAPTLORA_HIGH_PAIRS);
}

void dropout_mask(const Dropout& dropout, int64_t row, int64_t col, int64_t rows, int64_t cols, uint32_t* mask) {
  constexpr int kCounters = kLanes / 2;
  // Even lanes hold the first half of the counters, odd lanes the second: interleave() then leaves them in order.
  vu64 lane_counter;
  for (int i = 0; i < kCounters; ++i) lane_counter[i] = i / 2 + (i % 2) * (kCounters / 2);

  const PhiloxKeys keys(dropout.key0, dropout.key1);
  const int32_t threshold = dropout.threshold;
  for (int64_t c = 0; c < cols; c += 4 * kCounters) {
    const vu64 column = lane_counter + uint64_t((col + c) / 4);
    // Rows innermost: what the first three rounds compute from the column alone is then hoisted out of the loop.
    for (int64_t m = 0; m < rows; ++m) {
      const PhiloxBlock counter = {column, vu64{} + uint64_t(uint32_t(row + m)), vu64{}, vu64{}};
      vu first, second;
      interleave(philox4x32_10(counter, keys), first, second);
      uint32_t* out = mask + m * kTileStride + c;
      store_raw(out, (vi)(first >> 8) >= threshold);
      store_raw(out + kLanes, (vi)(second >> 8) >= threshold);
    }
  }
}

}  // namespace
}  // namespace adaptlora::ADAPTLORA_ISA_NAMESPACE

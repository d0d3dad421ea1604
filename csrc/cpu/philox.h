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
constexpr int kPhiloxRows = 3;

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

// Blocks side by side: a block alone is a chain of operations that each wait for the last, and a processor looks no more
// than half a block ahead for others to do meanwhile.
template <int kBlocks>
ADAPTLORA_INLINE void philox4x32_10(PhiloxBlock (&c)[kBlocks], const PhiloxKeys& keys) {
  ADAPTLORA_UNROLL
  for (int round = 0; round < kRounds; ++round) {
    ADAPTLORA_UNROLL
    for (int i = 0; i < kBlocks; ++i) {
      const vu64 p0 = multiply_low32(c[i].c0, 0xD2511F53u);
      const vu64 p1 = multiply_low32(c[i].c2, 0xCD9E8D57u);
      c[i] = {(p1 >> 32) ^ (c[i].c1 ^ keys.k0[round]), p1, (p0 >> 32) ^ (c[i].c3 ^ keys.k1[round]), p0};
    }
  }
}

// c0 c1 c2 c3 of each counter side by side: first those of the counters in even lanes, then those in odd lanes. As floats,
// for which there is one instruction that picks from two vectors; nothing looks at their values.
ADAPTLORA_INLINE void interleave(const PhiloxBlock& c, vu& even, vu& odd) {
  const vf c01 = __builtin_shufflevector((vf)c.c0, (vf)c.c1, ADAPTLORA_LOW_WORDS);
  const vf c23 = __builtin_shufflevector((vf)c.c2, (vf)c.c3, ADAPTLORA_LOW_WORDS);
  even = (vu)__builtin_shufflevector(c01, c23, ADAPTLORA_LOW_WORDS);
  odd = (vu)__builtin_shufflevector(c01, c23, ADAPTLORA_HIGH_WORDS);
}

// Calls body(m, c, keep) for every row m and every kLanes columns from c of a mask, where keep is ~0 or 0 in each lane.
template <class Body>
ADAPTLORA_INLINE void for_mask(const Dropout& dropout, int64_t row, int64_t col, int64_t rows, int64_t cols,
                               const Body& body) {
  constexpr int kCounters = kLanes / 2;
  // Even lanes hold the first half of the counters, odd lanes the second: interleave() then leaves them in order.
  vu64 lane_counter;
  for (int i = 0; i < kCounters; ++i) lane_counter[i] = i / 2 + (i % 2) * (kCounters / 2);
  const PhiloxKeys keys(dropout.key0, dropout.key1);
  const vi below = vi{} + (dropout.threshold - 1);

  const auto visit_rows = [&]<int kBlocks>(vu64 column, int64_t m, int64_t c) ADAPTLORA_INLINE_LAMBDA {
    PhiloxBlock blocks[kBlocks];
    ADAPTLORA_UNROLL
    for (int i = 0; i < kBlocks; ++i) {
      blocks[i] = {column, vu64{} + uint64_t(uint32_t(row + m + i)), vu64{}, vu64{}};
    }
    philox4x32_10(blocks, keys);
    ADAPTLORA_UNROLL
    for (int i = 0; i < kBlocks; ++i) {
      vu first, second;
      interleave(blocks[i], first, second);
      body(m + i, c, (vi)(first >> 8) > below);
      if (c + kLanes < cols) body(m + i, c + kLanes, (vi)(second >> 8) > below);
    }
  };
  for (int64_t c = 0; c < cols; c += 2 * kLanes) {
    const vu64 column = lane_counter + uint64_t((col + c) / 4);
    // Rows innermost: what the first three rounds compute from the column alone is then hoisted out of the loop.
    int64_t m = 0;
    for (; m + kPhiloxRows <= rows; m += kPhiloxRows) visit_rows.template operator()<kPhiloxRows>(column, m, c);
    for (; m < rows; ++m) visit_rows.template operator()<1>(column, m, c);
  }
}

void dropout_mask(const Dropout& dropout, int64_t row, int64_t col, int64_t rows, int64_t cols, uint32_t* mask) {
  for_mask(dropout, row, col, rows, cols, [&](int64_t m, int64_t c, vi keep) ADAPTLORA_INLINE_LAMBDA {
    store_raw(mask + m * kTileStride + c, keep);
  });
}

}  // namespace
}  // namespace adaptlora::ADAPTLORA_ISA_NAMESPACE

// What one pass of CholeskyQR needs of a Gram matrix: its triangular factor and that factor's inverse.
//
// Elimination of [G | I] from above leaves [D U | U⁻ᵀ] with G = Uᵀ D U, U unit upper triangular: R = D^½ U, R⁻ᵀ = D^-½ U⁻ᵀ.
// D U and U⁻ᵀ fit in the place of G, and step k changes the rows below k alone, so that one barrier a step is enough.
#pragma once

#include <cmath>
#include <limits>

#include "policy.h"

namespace adaptlora::linalg {

// The places of one matrix. work holds 2 l numbers.
template <typename T>
struct CholeskyInverse {
  int l;
  const T* gram;  // (l, l), of which the upper triangle is read
  T* r;           // (l, l) upper: G = RᵀR
  T* rit;         // (l, l) lower: R⁻ᵀ
  T* a;           // (l, l), eliminated in place
  T* work;
};

// R and R⁻ᵀ; returns an estimate of the condition of X, G = XᵀX, with columns scaled to length 1:
// (Σ_ij g_ii (R⁻¹)_ij² / l)^½, 1 for orthonormal columns and at most κ. Infinity, with R = R⁻ᵀ = 0, where a pivot is lost
// in rounding.
template <typename T, typename Policy>
ADAPTLORA_HOST_DEVICE T cholesky_inverse(Policy& policy, const CholeskyInverse<T>& m) {
  const int l = m.l, lane = policy.lane(), lanes = policy.lanes();
  T *diagonal = m.work, *terms = m.work + l;
  for (int i = policy.group(); i < l; i += policy.groups()) {
    for (int j = lane; j < l; j += lanes) m.a[i * l + j] = j < i ? T(0) : m.gram[i * l + j];
    if (lane == 0) diagonal[i] = m.gram[i * l + i];
  }
  policy.barrier();
  bool sound = true;
  for (int k = 0; k < l && sound; ++k) {
    const T* pivot_row = m.a + k * l;
    const T pivot = pivot_row[k];
    // Written so that a NaN is not sound.
    sound = pivot > l * std::numeric_limits<T>::epsilon() * diagonal[k] && std::isfinite(pivot);
    for (int i = k + 1 + policy.group(); i < l && sound; i += policy.groups()) {
      const T factor = pivot_row[i] / pivot;
      T* row = m.a + i * l;
      for (int j = lane; j < l; j += lanes) {
        if (j < k || j >= i) row[j] -= factor * pivot_row[j];
        if (j == k) row[j] = -factor;
      }
    }
    policy.barrier();
  }
  for (int i = policy.group(); i < l; i += policy.groups()) {
    const T root = std::sqrt(m.a[i * l + i]);
    T term = 0;
    for (int j = lane; j < l; j += lanes) {
      const T upper = j >= i && sound ? m.a[i * l + j] / root : T(0);
      const T lower = j < i && sound ? m.a[i * l + j] / root : T(0);
      m.r[i * l + j] = upper;
      m.rit[i * l + j] = j == i && sound ? 1 / root : lower;
      term += diagonal[j] * m.rit[i * l + j] * m.rit[i * l + j];
    }
    term = policy.sum(term);
    if (lane == 0) terms[i] = term;
  }
  policy.barrier();
  T total = 0;
  for (int i = 0; i < l; ++i) total += terms[i];
  return sound ? std::sqrt(total / l) : std::numeric_limits<T>::infinity();
}

}  // namespace adaptlora::linalg

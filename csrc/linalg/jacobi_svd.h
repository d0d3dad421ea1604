// One-sided Jacobi SVD of a small square matrix          [Demmel & Veselić, SIAM J. Matrix Anal. Appl. 13, 1992]
//
// Rotations from the right make the columns of G = A V orthogonal: then S = their norms and U = G / S. Each pair of columns
// of a step belongs to one group, and the R/2 pairs of a step are disjoint. With A = B D, D diagonal, every singular value,
// small or large, has a relative error that depends on the condition of B alone, which no bidiagonalising method achieves.
#pragma once

#include <cmath>
#include <limits>

#include "policy.h"

namespace adaptlora::linalg {

constexpr int kJacobiMaxSweeps = 40;
constexpr int kJacobiNotConverged = -1;

// The places of one matrix. G and V hold R² numbers, work R; all but `a` is written.
template <typename T>
struct JacobiSvd {
  int R;
  const T* a;  // (R, R)
  long long row_stride, col_stride;
  T* ut;       // (R, R): row k is the k-th left singular vector
  T* s;        // (R), descending
  T* vh;       // (R, R)
  T *G, *V;    // column j begins at j R
  T* work;
};

// Pair `k` of `step` when every two of `players` (even) meet once in players − 1 steps, each playing in every step.
struct Pair {
  int p, q;
};
ADAPTLORA_HOST_DEVICE inline Pair round_robin(int players, int step, int k) {
  const int ring = players - 1;
  const int p = k == 0 ? ring : (step + k) % ring, q = (step + ring - k) % ring;
  return p < q ? Pair{p, q} : Pair{q, p};
}

// Squares of numbers up to this power of two, and sums of 2^16 of them, do not overflow.
template <typename T>
constexpr int kJacobiExponent = std::numeric_limits<T>::max_exponent / 2 - 14;

// ‖column‖² below this is zero: its rounding errors would come near the smallest normal number.
template <typename T>
constexpr T kJacobiZero =
    std::numeric_limits<T>::min() / (std::numeric_limits<T>::epsilon() * std::numeric_limits<T>::epsilon());

// G ← A · 2^e, V ← I; returns e, with which the largest element is near 2^kJacobiExponent.
template <typename T, typename Policy>
ADAPTLORA_HOST_DEVICE int jacobi_load(Policy& policy, const JacobiSvd<T>& m) {
  const int R = m.R, lane = policy.lane(), lanes = policy.lanes();
  for (int j = policy.group(); j < R; j += policy.groups()) {
    T largest = 0;
    const T* column = m.a + j * m.col_stride;
    for (int i = lane; i < R; i += lanes) largest = std::fmax(largest, std::fabs(column[i * m.row_stride]));
    largest = policy.max(largest);
    if (lane == 0) m.work[j] = largest;
  }
  policy.barrier();
  T largest = 0;
  for (int j = 0; j < R; ++j) largest = std::fmax(largest, m.work[j]);
  int exponent = 0;
  std::frexp(largest, &exponent);
  const int shift = largest > 0 && std::isfinite(largest) ? kJacobiExponent<T> - exponent : 0;
  for (int j = policy.group(); j < R; j += policy.groups()) {
    for (int i = lane; i < R; i += lanes) {
      m.G[j * R + i] = std::ldexp(m.a[i * m.row_stride + j * m.col_stride], shift);
      m.V[j * R + i] = i == j ? T(1) : T(0);
    }
  }
  policy.barrier();
  return shift;
}

// Makes columns p < q of G orthogonal; returns whether they were not.
template <typename T, typename Policy>
ADAPTLORA_HOST_DEVICE bool jacobi_rotate(Policy& policy, const JacobiSvd<T>& m, Pair pair, T tolerance) {
  const int R = m.R, lane = policy.lane(), lanes = policy.lanes();
  T *gp = m.G + pair.p * R, *gq = m.G + pair.q * R, *vp = m.V + pair.p * R, *vq = m.V + pair.q * R;
  T alpha = 0, beta = 0, gamma = 0;
  for (int i = lane; i < R; i += lanes) {
    alpha += gp[i] * gp[i];
    beta += gq[i] * gq[i];
    gamma += gp[i] * gq[i];
  }
  alpha = policy.sum(alpha);
  beta = policy.sum(beta);
  gamma = policy.sum(gamma);
  if (!std::isfinite(alpha + beta)) return true;  // never done
  if (alpha < kJacobiZero<T> || beta < kJacobiZero<T>) return false;
  if (std::fabs(gamma) <= tolerance * std::sqrt(alpha) * std::sqrt(beta)) return false;
  // tan of the smaller angle; 1 + ζ² is ζ² beyond 1 / ε, where it may overflow.
  const T zeta = (beta - alpha) / (2 * gamma), size = std::fabs(zeta);
  const T root = size < 1 / std::numeric_limits<T>::epsilon() ? std::sqrt(1 + zeta * zeta) : size;
  const T t = std::copysign(1 / (size + root), zeta), c = 1 / std::sqrt(1 + t * t), s = c * t, tau = s / (1 + c);
  // c x − s y = x − s (y + τ x): what is rounded is of the size of s, and the lengths do not drift over many small angles.
  for (int i = lane; i < R; i += lanes) {
    const T g = gp[i], h = gq[i], v = vp[i], w = vq[i];
    gp[i] = g - s * (h + tau * g);
    gq[i] = h + s * (g - tau * h);
    vp[i] = v - s * (w + tau * v);
    vq[i] = w + s * (v - tau * w);
  }
  return true;
}

// Rows first, …, R − 1 of ut (R, R) ← unit vectors orthogonal to each other and to the rows before them.
template <typename T, typename Policy>
ADAPTLORA_HOST_DEVICE void complete_rows(Policy& policy, T* ut, int first, int R, T* work) {
  const int lane = policy.lane(), lanes = policy.lanes();
  const int thread = policy.group() * lanes + lane, threads = policy.groups() * lanes;
  for (int row = first; row < R; ++row) {
    // The axis that the rows before it hold least of: 1 − Σ of its squares is at least 1 / R.
    for (int i = thread; i < R; i += threads) {
      T held = 0;
      for (int k = 0; k < row; ++k) held += ut[k * R + i] * ut[k * R + i];
      work[i] = held;
    }
    policy.barrier();
    int axis = 0;
    for (int i = 1; i < R; ++i) axis = work[i] < work[axis] ? i : axis;
    T* out = ut + row * R;
    for (int i = thread; i < R; i += threads) out[i] = i == axis ? T(1) : T(0);
    policy.barrier();
    for (int pass = 0; pass < 2; ++pass) {
      for (int k = policy.group(); k < row; k += policy.groups()) {
        T dot = 0;
        for (int i = lane; i < R; i += lanes) dot += ut[k * R + i] * out[i];
        dot = policy.sum(dot);
        if (lane == 0) work[k] = dot;
      }
      policy.barrier();
      for (int i = thread; i < R; i += threads) {
        T projection = 0;
        for (int k = 0; k < row; ++k) projection += work[k] * ut[k * R + i];
        out[i] -= projection;
      }
      policy.barrier();
    }
    T square = 0;
    for (int i = lane; i < R; i += lanes) square += out[i] * out[i];
    const T norm = std::sqrt(policy.sum(square));
    policy.barrier();
    for (int i = thread; i < R; i += threads) out[i] /= norm;
    policy.barrier();
  }
}

// U, S, V from the orthogonal columns of G, whose scale is 2^shift.
template <typename T, typename Policy>
ADAPTLORA_HOST_DEVICE void jacobi_store(Policy& policy, const JacobiSvd<T>& m, int shift) {
  const int R = m.R, lane = policy.lane(), lanes = policy.lanes();
  for (int j = policy.group(); j < R; j += policy.groups()) {
    T square = 0;
    for (int i = lane; i < R; i += lanes) square += m.G[j * R + i] * m.G[j * R + i];
    square = policy.sum(square);
    if (lane == 0) m.work[j] = square < kJacobiZero<T> ? T(0) : std::sqrt(square);
  }
  policy.barrier();
  int nonzero = 0;
  for (int j = 0; j < R; ++j) nonzero += m.work[j] != 0;
  for (int j = policy.group(); j < R; j += policy.groups()) {
    const T norm = m.work[j];
    int place = 0;
    for (int k = 0; k < R; ++k) place += m.work[k] > norm || (m.work[k] == norm && k < j);
    if (lane == 0) m.s[place] = std::ldexp(norm, -shift);
    for (int i = lane; i < R; i += lanes) {
      m.vh[place * R + i] = m.V[j * R + i];
      if (norm != 0) m.ut[place * R + i] = m.G[j * R + i] / norm;
    }
  }
  policy.barrier();
  complete_rows(policy, m.ut, nonzero, R, m.work);
}

// A = U diag(S) Vh; returns the sweeps it took, or kJacobiNotConverged (so for NaN or infinite elements).
template <typename T, typename Policy>
ADAPTLORA_HOST_DEVICE int jacobi_svd(Policy& policy, const JacobiSvd<T>& m) {
  const int R = m.R, players = R + R % 2;
  const T tolerance = std::sqrt(static_cast<T>(R)) * std::numeric_limits<T>::epsilon();
  const int shift = jacobi_load(policy, m);
  int info = kJacobiNotConverged;
  for (int sweep = 1; sweep <= kJacobiMaxSweeps && info < 0; ++sweep) {
    bool rotated = false;
    for (int step = 0; step < players - 1; ++step) {
      for (int k = policy.group(); k < players / 2; k += policy.groups()) {
        const Pair pair = round_robin(players, step, k);
        if (pair.q < R) rotated |= jacobi_rotate(policy, m, pair, tolerance);
      }
      policy.barrier();
    }
    if (!policy.any(rotated)) info = sweep;
  }
  jacobi_store(policy, m, shift);
  return info;
}

}  // namespace adaptlora::linalg

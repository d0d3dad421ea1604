// The factorizations of csrc/linalg as a block of many threads runs them: groups × lanes std::threads for one matrix.
//
//   linalg_threads jacobi|cholesky size groups lanes < matrix > results       (raw numbers: float32 and float64)
#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "../csrc/linalg/cholesky_qr.h"
#include "../csrc/linalg/jacobi_svd.h"

namespace {

using adaptlora::linalg::CholeskyInverse;
using adaptlora::linalg::JacobiSvd;

struct Shared {
  Shared(int groups, int lanes) : groups(groups), lanes(lanes), block(groups * lanes), values(groups * lanes) {
    for (int i = 0; i < groups; ++i) group_barriers.emplace_back(new std::barrier<>(lanes));
  }
  int groups, lanes;
  std::barrier<> block;
  std::vector<std::unique_ptr<std::barrier<>>> group_barriers;
  std::vector<double> values;  // one for each thread
};

struct Threads {
  Shared& shared;
  int thread;

  int lane() const { return thread % shared.lanes; }
  int lanes() const { return shared.lanes; }
  int group() const { return thread / shared.lanes; }
  int groups() const { return shared.groups; }
  void barrier() { shared.block.arrive_and_wait(); }
  bool any(bool value) {
    shared.values[thread] = value;
    barrier();
    bool result = false;
    for (const double other : shared.values) result |= other != 0;
    barrier();
    return result;
  }
  template <typename T>
  T sum(T value) {
    return reduced(value, [](T a, T b) { return a + b; });
  }
  template <typename T>
  T max(T value) {
    return reduced(value, [](T a, T b) { return a > b ? a : b; });
  }

 private:
  template <typename T, typename Combine>
  T reduced(T value, Combine combine) {
    auto& group_barrier = *shared.group_barriers[group()];
    shared.values[thread] = value;
    group_barrier.arrive_and_wait();
    const double* first = &shared.values[group() * lanes()];
    T result = static_cast<T>(first[0]);
    for (int i = 1; i < lanes(); ++i) result = combine(result, static_cast<T>(first[i]));
    group_barrier.arrive_and_wait();
    return result;
  }
};

template <typename Body>
void run(int groups, int lanes, Body body) {
  Shared shared(groups, lanes);
  std::vector<std::thread> threads;
  for (int i = 0; i < groups * lanes; ++i) threads.emplace_back([&, i] { body(Threads{shared, i}, i == 0); });
  for (auto& thread : threads) thread.join();
}

template <typename T>
std::vector<T> input(size_t count) {
  std::vector<T> values(count);
  if (std::fread(values.data(), sizeof(T), count, stdin) != count) std::exit(2);
  return values;
}

template <typename T>
void output(const std::vector<T>& values) {
  std::fwrite(values.data(), sizeof(T), values.size(), stdout);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  const int R = std::atoi(argv[2]), groups = std::atoi(argv[3]), lanes = std::atoi(argv[4]);
  const size_t size = static_cast<size_t>(R) * R;
  if (std::strcmp(argv[1], "jacobi") == 0) {
    const auto a = input<float>(size);
    std::vector<float> ut(size), s(R), vh(size), G(size), V(size), work(R), info(1);
    run(groups, lanes, [&](Threads policy, bool first) {
      const int result = jacobi_svd<float>(policy, JacobiSvd<float>{R, a.data(), R, 1, ut.data(), s.data(), vh.data(),
                                                                    G.data(), V.data(), work.data()});
      if (first) info[0] = static_cast<float>(result);
    });
    for (const auto* values : {&ut, &s, &vh, &info}) output(*values);
  } else {
    const auto gram = input<double>(size);
    std::vector<double> r(size), rit(size), a(size), work(2 * R), condition(1);
    run(groups, lanes, [&](Threads policy, bool first) {
      const double result = cholesky_inverse<double>(
          policy, CholeskyInverse<double>{R, gram.data(), r.data(), rit.data(), a.data(), work.data()});
      if (first) condition[0] = result;
    });
    for (const auto* values : {&r, &rit, &condition}) output(*values);
  }
}

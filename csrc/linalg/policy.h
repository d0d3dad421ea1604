// Who computes one matrix: the execution policy that the factorizations in this folder are templates of.
//
// A block owns a matrix; its threads form groups() groups of lanes() lanes. A policy is one thread's view of it:
//   int lane(), lanes(), group(), groups();
//   T sum(T), T max(T)   over the lanes of the group, all of which call it and get the same value;
//   void barrier();      every thread of the block arrives, and sees what the others wrote before;
//   bool any(bool);      a barrier, too: whether any thread of the block says true.
// Loops that contain one of these have bounds that are the same for all who must call it.
#pragma once

#ifdef __CUDACC__
#define ADAPTLORA_HOST_DEVICE __host__ __device__
#else
#define ADAPTLORA_HOST_DEVICE
#endif

namespace adaptlora::linalg {

// A matrix alone on one thread.
struct Serial {
  static int lane() { return 0; }
  static int lanes() { return 1; }
  static int group() { return 0; }
  static int groups() { return 1; }
  template <typename T>
  static T sum(T value) {
    return value;
  }
  template <typename T>
  static T max(T value) {
    return value;
  }
  static void barrier() {}
  static bool any(bool value) { return value; }
};

}  // namespace adaptlora::linalg

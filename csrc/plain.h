// What the C++ path may touch without the dispatcher: ordinary tensors in ordinary circumstances.
#pragma once

#include <ATen/ATen.h>

namespace adaptlora {

// Nothing watches or changes calls of ops: no mode of torch_dispatch (fake tensors, FLOP counters) or torch_function, no
// transform of functorch's, no forward-mode derivative, no trace, no autocast, and not from within an op below autograd.
bool plain_context();

// A dense CPU tensor whose memory holds its values: no subclass with a dispatch of its own, neither wrapped nor lazily
// negated nor all zeros without memory.
bool is_plain(const at::Tensor& t);

}  // namespace adaptlora

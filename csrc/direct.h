// The ops for Python callers, without the dispatcher and the layers of Python above it: at 384 x 384 these cost a LoRA
// layer more time than its arithmetic.
//
// Every function returns None, having done nothing, unless the call is plain: exact tensors in eager mode on the CPU that
// are what the op's documentation asks for, with no mode, transform, trace or autocast around the call. The caller then
// takes the way through the dispatcher, which knows all the rest and what to say of wrong arguments.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace adaptlora {

pybind11::object lora_linear_direct(pybind11::handle x, pybind11::handle weight, pybind11::handle bias,
                                    pybind11::handle A, pybind11::handle B, pybind11::handle rank_scale,
                                    pybind11::handle scaling, pybind11::handle dropout_p, pybind11::handle seed);

// Lists or tuples of one length >= 1 but for x and dropout_p.
pybind11::object lora_group_direct(pybind11::handle x, pybind11::handle weights, pybind11::handle biases,
                                   pybind11::handle As, pybind11::handle Bs, pybind11::handle rank_scales,
                                   pybind11::handle scalings, pybind11::handle dropout_p, pybind11::handle seeds);

// (norms_A, norms_B), as rank_norms_cpu.
pybind11::object rank_norms_direct(pybind11::handle As, pybind11::handle Bs);

// (A_eff, B_eff), as compose_cpu.
pybind11::object compose_direct(pybind11::handle A, pybind11::handle B, pybind11::handle outer_A,
                                pybind11::handle outer_B);

// (A_eff, B_eff) as given, with the gradients of compose's; `operands` is the tuple (A, B, outer_A, outer_B).
pybind11::object composed_direct(pybind11::handle operands, pybind11::handle A_eff, pybind11::handle B_eff);

}  // namespace adaptlora

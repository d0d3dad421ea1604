// The Python module adaptlora._C. Shapes and equations: cpu/ops.h.
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "cpu/isa.h"
#include "cpu/ops.h"
#include "direct.h"

namespace py = pybind11;

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using no_gil = py::call_guard<py::gil_scoped_release>;
  const char* isa = adaptlora::kernels().name;  // chosen here, so that a wrong ADAPTLORA_ISA fails at import

  m.attr("torch_version") = TORCH_VERSION;
  m.def("isa", [isa] { return isa; }, "The instruction set the kernels use: avx512, avx2 or default.");

  m.def("lora_linear", &adaptlora::lora_linear_cpu, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("A"),
        py::arg("B"), py::arg("rank_scale"), py::arg("scaling"), py::arg("dropout_p"), py::arg("threshold"),
        py::arg("seed"), no_gil());
  m.def("lora_linear_backward", &adaptlora::lora_linear_backward_cpu, py::arg("dy"), py::arg("x"), py::arg("weight"),
        py::arg("S"), py::arg("A"), py::arg("B"), py::arg("rank_scale"), py::arg("scaling"), py::arg("dropout_p"),
        py::arg("threshold"), py::arg("seed"), py::arg("need_dx"), py::arg("need_dA"), py::arg("need_dB"),
        py::arg("need_dE"), no_gil());
  m.def("lora_group", &adaptlora::lora_group_cpu, py::arg("x"), py::arg("weights"), py::arg("biases"), py::arg("As"),
        py::arg("Bs"), py::arg("rank_scales"), py::arg("scalings"), py::arg("dropout_p"), py::arg("threshold"),
        py::arg("seeds"), no_gil());
  m.def("lora_group_backward", &adaptlora::lora_group_backward_cpu, py::arg("dys"), py::arg("x"), py::arg("weights"),
        py::arg("S"), py::arg("As"), py::arg("Bs"), py::arg("rank_scales"), py::arg("scalings"), py::arg("dropout_p"),
        py::arg("threshold"), py::arg("seeds"), py::arg("need_dx"), py::arg("need_dA"), py::arg("need_dB"),
        py::arg("need_dE"), no_gil());
  m.def("lora_delta_", &adaptlora::lora_delta_cpu, py::arg("y"), py::arg("x"), py::arg("A"), py::arg("B"),
        py::arg("rank_scale"), py::arg("scaling"), py::arg("dropout_p"), py::arg("threshold"), py::arg("seed"),
        no_gil());
  m.def("lora_delta_backward", &adaptlora::lora_delta_backward_cpu, py::arg("dy"), py::arg("x"), py::arg("S"),
        py::arg("A"), py::arg("B"), py::arg("rank_scale"), py::arg("scaling"), py::arg("dropout_p"),
        py::arg("threshold"), py::arg("seed"), py::arg("need_dx"), py::arg("need_dA"), py::arg("need_dB"),
        py::arg("need_dE"), no_gil());
  m.def("compose", &adaptlora::compose_cpu, py::arg("A"), py::arg("B"), py::arg("outer_A"), py::arg("outer_B"),
        no_gil());
  m.def("compose_backward", &adaptlora::compose_backward_cpu, py::arg("dA_eff"), py::arg("dB_eff"), py::arg("outer_A"),
        py::arg("outer_B"), no_gil());
  // These take and hold the GIL themselves.
  m.def("lora_linear_direct", &adaptlora::lora_linear_direct, py::arg("x"), py::arg("weight"), py::arg("bias"),
        py::arg("A"), py::arg("B"), py::arg("rank_scale"), py::arg("scaling"), py::arg("dropout_p"), py::arg("seed"));
  m.def("lora_group_direct", &adaptlora::lora_group_direct, py::arg("x"), py::arg("weights"), py::arg("biases"),
        py::arg("As"), py::arg("Bs"), py::arg("rank_scales"), py::arg("scalings"), py::arg("dropout_p"),
        py::arg("seeds"));
  m.def("compose_direct", &adaptlora::compose_direct, py::arg("A"), py::arg("B"), py::arg("outer_A"),
        py::arg("outer_B"));
  m.def("composed_direct", &adaptlora::composed_direct, py::arg("operands"), py::arg("A_eff"), py::arg("B_eff"));
  m.def("rank_norms_direct", &adaptlora::rank_norms_direct, py::arg("As"), py::arg("Bs"));

  m.def("dropout_keep", &adaptlora::dropout_keep_cpu, py::arg("seed"), py::arg("M"), py::arg("K"),
        py::arg("threshold"), no_gil());

  m.def("rank_gather", &adaptlora::rank_gather_cpu, py::arg("sources"), py::arg("rows"), py::arg("counts"), no_gil());
  m.def("rank_norms", &adaptlora::rank_norms_cpu, py::arg("As"), py::arg("Bs"), no_gil());
  m.def("rank_scale", &adaptlora::rank_scale_cpu, py::arg("As"), py::arg("Bs"), py::arg("fA"), py::arg("fB"), no_gil());
  m.def("rank_scale_", &adaptlora::rank_scale_inplace_cpu, py::arg("As"), py::arg("Bs"), py::arg("fA"), py::arg("fB"),
        no_gil());

  m.def("jacobi_svd", &adaptlora::jacobi_svd_cpu, py::arg("a"), no_gil());
  m.def("cholesky_inverse", &adaptlora::cholesky_inverse_cpu, py::arg("gram"), no_gil());
}

#include "direct.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <limits>
#include <mutex>

#include "autograd.h"
#include "cpu/host.h"
#include "plain.h"

namespace adaptlora {
namespace {

namespace py = pybind11;

// An exact torch.Tensor or Parameter (no subclass) that is plain, of a dtype that has kernels.
const at::Tensor* plain_tensor(py::handle object) {
  if (!THPVariable_CheckExact(object.ptr())) return nullptr;
  const at::Tensor& t = THPVariable_Unpack(object.ptr());
  return is_plain(t) && is_supported(t) ? &t : nullptr;
}

bool frozen(const at::Tensor& t) { return !(at::GradMode::is_enabled() && t.requires_grad()); }

bool of_dtype_or_float32(const at::Tensor& t, const at::Tensor& x) {
  return t.scalar_type() == x.scalar_type() || t.scalar_type() == at::kFloat;
}

std::optional<double> number(py::handle object) {
  PyObject* p = object.ptr();
  if (PyFloat_CheckExact(p)) return PyFloat_AS_DOUBLE(p);
  if (!PyLong_CheckExact(p)) return std::nullopt;
  const double value = PyLong_AsDouble(p);
  if (value == -1 && PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    return std::nullopt;
  }
  return value;
}

// The value of a seed that is an int of 64 bits or a 0-dim int64 tensor.
std::optional<int64_t> seed_number(py::handle object) {
  if (PyLong_CheckExact(object.ptr())) {
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(object.ptr(), &overflow);
    return overflow == 0 ? std::optional<int64_t>(value) : std::nullopt;
  }
  if (!THPVariable_CheckExact(object.ptr())) return std::nullopt;
  const at::Tensor& t = THPVariable_Unpack(object.ptr());
  const bool is_seed = is_plain(t) && t.scalar_type() == at::kLong && t.dim() == 0;
  return is_seed ? std::optional(*t.const_data_ptr<int64_t>()) : std::nullopt;
}

// What ops/_dropout.py's new_seed draws, torch.randint(0, 2^63 - 1, ()), from the same generator.
int64_t new_seed() {
  auto* generator = at::check_generator<at::CPUGeneratorImpl>(at::detail::getDefaultCPUGenerator());
  const std::lock_guard<std::mutex> lock(generator->mutex_);
  const uint64_t bits = generator->random64();
  return static_cast<int64_t>(bits % static_cast<uint64_t>(std::numeric_limits<int64_t>::max()));
}

struct Operands {
  py::handle weight, bias, A, B, rank_scale, scaling, seed;
};

// Everything lora_group_autograd takes.
struct GroupCall {
  std::vector<at::Tensor> weights;
  OptionalTensors biases;
  Group group;
};

// Adds a module, without a seed where one has to be drawn; false if it is not plain.
bool add_plain_module(const at::Tensor& x, const Operands& given, GroupCall& call) {
  const at::Tensor *weight = plain_tensor(given.weight), *A = plain_tensor(given.A), *B = plain_tensor(given.B);
  if (weight == nullptr || A == nullptr || B == nullptr) return false;
  const int64_t K = x.size(-1);
  const bool weight_fits = weight->dim() == 2 && weight->size(0) >= 1 && weight->size(1) == K &&
                           weight->scalar_type() == x.scalar_type() && frozen(*weight);
  if (!weight_fits) return false;
  const int64_t N = weight->size(0);
  const bool factors_fit = A->dim() == 2 && A->size(0) >= 1 && A->size(0) <= kMaxRank && A->size(1) == K &&
                           B->dim() == 2 && B->size(0) == N && B->size(1) == A->size(0) &&
                           of_dtype_or_float32(*A, x) && of_dtype_or_float32(*B, x);
  if (!factors_fit) return false;
  std::optional<at::Tensor> bias, rank_scale;
  if (!given.bias.is_none()) {
    const at::Tensor* t = plain_tensor(given.bias);
    const bool fits = t != nullptr && t->dim() == 1 && t->size(0) == N && t->scalar_type() == x.scalar_type() &&
                      frozen(*t);
    if (!fits) return false;
    bias = *t;
  }
  if (!given.rank_scale.is_none()) {
    const at::Tensor* t = plain_tensor(given.rank_scale);
    if (t == nullptr || t->dim() != 1 || t->size(0) != A->size(0) || !of_dtype_or_float32(*t, x)) return false;
    rank_scale = *t;
  }
  const auto scaling = number(given.scaling);
  if (!scaling || !std::isfinite(*scaling)) return false;
  std::optional<int64_t> seed;
  if (call.group.dropout_p > 0 && !given.seed.is_none()) {
    seed = seed_number(given.seed);
    if (!seed) return false;
  }
  call.weights.push_back(*weight);
  call.biases.push_back(std::move(bias));
  call.group.modules.push_back({*A, *B, std::move(rank_scale), *scaling, seed});
  return true;
}

std::optional<std::vector<at::Tensor>> run_group(bool grouped, py::handle x_object,
                                                 const std::vector<Operands>& operands, py::handle dropout_object) {
  if (!plain_context()) return std::nullopt;
  const at::Tensor* x = plain_tensor(x_object);
  const auto p = number(dropout_object);
  if (x == nullptr || x->dim() < 1 || x->numel() == 0 || !p || !(*p >= 0 && *p < 1)) return std::nullopt;
  const char* op = grouped ? "lora_group" : "lora_linear";
  GroupCall call{{}, {}, {op, grouped, {}, *p, dropout_threshold(*p)}};
  call.group.modules.reserve(operands.size());
  for (const Operands& given : operands) {
    if (!add_plain_module(*x, given, call)) return std::nullopt;
  }
  const py::gil_scoped_release no_gil;
  for (Adapter& adapter : call.group.modules) {
    if (*p > 0 && !adapter.seed) adapter.seed = new_seed();
  }
  return lora_group_autograd(*x, call.weights, call.biases, call.group);
}

// The items of a list or tuple; nothing if it is neither.
std::optional<std::vector<py::handle>> items(py::handle object) {
  PyObject* p = object.ptr();
  if (!PyList_CheckExact(p) && !PyTuple_CheckExact(p)) return std::nullopt;
  PyObject** first = PySequence_Fast_ITEMS(p);
  return std::vector<py::handle>(first, first + PySequence_Fast_GET_SIZE(p));
}

std::optional<std::vector<at::Tensor>> plain_matrices(py::handle object) {
  const auto handles = items(object);
  if (!handles) return std::nullopt;
  std::vector<at::Tensor> tensors;
  tensors.reserve(handles->size());
  for (const py::handle handle : *handles) {
    const at::Tensor* t = plain_tensor(handle);
    if (t == nullptr || t->dim() != 2) return std::nullopt;
    tensors.push_back(*t);
  }
  return tensors;
}

// A, B, outer_A and outer_B of a nested pair, frozen outside.
struct Nested {
  at::Tensor A, B, outer_A, outer_B;
};

const at::Tensor* plain_float32_matrix(py::handle object) {
  const at::Tensor* t = plain_tensor(object);
  return t != nullptr && t->dim() == 2 && t->scalar_type() == at::kFloat ? t : nullptr;
}

std::optional<Nested> plain_nested(const std::vector<py::handle>& objects) {
  if (!plain_context() || objects.size() != 4) return std::nullopt;
  const at::Tensor* t[4];
  for (size_t i = 0; i < 4; ++i) {
    t[i] = plain_float32_matrix(objects[i]);
    if (t[i] == nullptr) return std::nullopt;
  }
  const int64_t R = t[0]->size(0), r_out = t[0]->size(1);
  const bool fits = t[1]->size(0) == r_out && t[1]->size(1) == R && t[2]->size(0) == r_out && t[3]->size(0) == r_out &&
                    frozen(*t[2]) && frozen(*t[3]);
  return fits ? std::optional<Nested>({*t[0], *t[1], *t[2], *t[3]}) : std::nullopt;
}

}  // namespace

py::object lora_linear_direct(py::handle x, py::handle weight, py::handle bias, py::handle A, py::handle B,
                              py::handle rank_scale, py::handle scaling, py::handle dropout_p, py::handle seed) {
  const auto ys = run_group(false, x, {{weight, bias, A, B, rank_scale, scaling, seed}}, dropout_p);
  return ys ? py::cast(ys->front()) : py::none();
}

py::object lora_group_direct(py::handle x, py::handle weights, py::handle biases, py::handle As, py::handle Bs,
                             py::handle rank_scales, py::handle scalings, py::handle dropout_p, py::handle seeds) {
  const std::optional<std::vector<py::handle>> lists[] = {items(weights),     items(biases),   items(As),   items(Bs),
                                                          items(rank_scales), items(scalings), items(seeds)};
  for (const auto& list : lists) {
    if (!list || list->empty() || list->size() != lists[0]->size()) return py::none();
  }
  std::vector<Operands> operands;
  for (size_t i = 0; i < lists[0]->size(); ++i) {
    const auto of = [&](size_t list) { return (*lists[list])[i]; };
    operands.push_back({of(0), of(1), of(2), of(3), of(4), of(5), of(6)});
  }
  const auto ys = run_group(true, x, operands, dropout_p);
  return ys ? py::cast(*ys) : py::none();
}

py::object rank_norms_direct(py::handle As, py::handle Bs) {
  const auto tensors_A = plain_matrices(As), tensors_B = plain_matrices(Bs);
  if (!plain_context() || !tensors_A || !tensors_B || tensors_A->size() != tensors_B->size()) return py::none();
  int64_t total_rank = 0;
  for (size_t i = 0; i < tensors_A->size(); ++i) {
    if ((*tensors_A)[i].size(0) != (*tensors_B)[i].size(1)) return py::none();
    total_rank += (*tensors_A)[i].size(0);
  }
  if (total_rank == 0) return py::none();
  const auto norms = [&] {
    const py::gil_scoped_release no_gil;
    return rank_norms_autograd(*tensors_A, *tensors_B);
  }();
  return py::cast(norms);
}

py::object compose_direct(py::handle A, py::handle B, py::handle outer_A, py::handle outer_B) {
  const auto nested = plain_nested({A, B, outer_A, outer_B});
  if (!nested) return py::none();
  const auto factors = [&] {
    const py::gil_scoped_release no_gil;
    RECORD_FUNCTION("adaptlora::compose", std::vector<c10::IValue>());
    const auto [A_eff, B_eff] = compose_cpu(nested->A, nested->B, nested->outer_A, nested->outer_B);
    return composed_autograd(nested->A, nested->B, nested->outer_A, nested->outer_B, A_eff, B_eff);
  }();
  return py::cast(factors);
}

py::object composed_direct(py::handle operands, py::handle A_eff, py::handle B_eff) {
  const auto objects = items(operands);
  const auto nested = objects ? plain_nested(*objects) : std::nullopt;
  const at::Tensor *rows = plain_float32_matrix(A_eff), *columns = plain_float32_matrix(B_eff);
  if (!nested || rows == nullptr || columns == nullptr) return py::none();
  return py::cast(composed_autograd(nested->A, nested->B, nested->outer_A, nested->outer_B, *rows, *columns));
}

}  // namespace adaptlora

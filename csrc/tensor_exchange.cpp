#include "tensor_exchange.h"

#include <array>

namespace fused_attn {

namespace {

// DLPack's DLPackExchangeAPI, version 1; of its functions only those in use have a type here.
struct ExchangeTable {
  uint32_t major;
  uint32_t minor;
  const ExchangeTable* older;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  int (*view_of_py_object)(void* object, TensorView* out);  // borrows; -1 and a Python error
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out);
};
constexpr uint32_t kMajor = 1;
const char* const kDTypeNames[] = {"float32", "float64", "bfloat16", "float16"};  // by DType

// Never released: at exit the interpreter may be gone before the destructors of this module.
struct Torch {
  const ExchangeTable* table = nullptr;
  PyTypeObject* tensor_type = nullptr;
  PyTypeObject* parameter_type = nullptr;
  PyObject* is_neg = nullptr;
  PyObject* new_empty = nullptr;
  PyObject* float32 = nullptr;
  PyObject* get_num_threads = nullptr;
  PyObject* dtype_keyword = nullptr;
} torch_api;

std::string in_parentheses(const int64_t* sizes, size_t count) {
  std::string text = "(";
  for (size_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + (count == 1 ? ",)" : ")");
}

bool is_contiguous(const TensorView& view) {
  int64_t expected = 1;
  for (int dim = view.ndim; dim-- > 0; expected *= view.shape[dim]) {
    if (view.shape[dim] == 0) return true;
    if (view.shape[dim] != 1 && view.strides[dim] != expected) return false;
  }
  return true;
}

// like.new_empty(*sizes): sizes given one by one are parsed faster than a tuple of them.
Argument call_new_empty(const Argument& like, Sizes sizes, PyObject* dtype) {
  std::array<PyObject*, 6> arguments = {nullptr, like.object()};
  size_t count = 2;
  for (int64_t size : sizes) arguments[count++] = PyLong_FromLongLong(size);
  if (dtype) arguments[count] = dtype;
  PyObject* made = PyObject_Vectorcall(torch_api.new_empty, &arguments[1],
                                       (count - 1) | PY_VECTORCALL_ARGUMENTS_OFFSET,
                                       dtype ? torch_api.dtype_keyword : nullptr);
  for (size_t i = 2; i < count; ++i) Py_XDECREF(arguments[i]);
  if (!made) throw py::error_already_set();
  return Argument("output", py::reinterpret_steal<py::object>(made), like.device());
}

}  // namespace

void bind_torch(const py::module_& torch) {
  py::object type = torch.attr("Tensor");
  const char* attribute = "__dlpack_c_exchange_api__";
  const std::string version = py::str(torch.attr("__version__"));
  if (!py::hasattr(type, attribute)) {
    throw py::import_error("torch " + version + " has no Tensor." + attribute);
  }
  py::object capsule = type.attr(attribute);
  const auto* table =
      static_cast<const ExchangeTable*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!table) throw py::error_already_set();
  const uint32_t newest = table->major;
  while (table && table->major > kMajor) table = table->older;
  if (!table || table->major != kMajor || !table->view_of_py_object) {
    throw py::import_error("torch " + version + " exchanges tensors by DLPack " +
                           std::to_string(newest) + ", expected " + std::to_string(kMajor));
  }
  torch_api.is_neg = py::object(type.attr("is_neg")).release().ptr();
  torch_api.parameter_type = reinterpret_cast<PyTypeObject*>(
      py::object(torch.attr("nn").attr("Parameter")).release().ptr());
  torch_api.new_empty = py::object(type.attr("new_empty")).release().ptr();
  torch_api.get_num_threads = py::object(torch.attr("get_num_threads")).release().ptr();
  torch_api.float32 = py::object(torch.attr("float32")).release().ptr();
  torch_api.dtype_keyword = py::make_tuple("dtype").release().ptr();
  torch_api.tensor_type = reinterpret_cast<PyTypeObject*>(type.release().ptr());
  torch_api.table = table;
}

bool is_exact_tensor(PyObject* object) {
  const PyTypeObject* type = Py_TYPE(object);
  return torch_api.table && (type == torch_api.tensor_type || type == torch_api.parameter_type);
}

bool look_at(PyObject* tensor, TensorView& view) {
  if (torch_api.table->view_of_py_object(tensor, &view) == 0) return true;
  PyErr_Clear();
  return false;
}

bool is_negated(PyObject* tensor) {
  PyObject* answer = PyObject_Vectorcall(torch_api.is_neg, &tensor, 1, nullptr);
  if (!answer) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(answer).is(py::handle(Py_True));
}

int torch_threads() {
  PyObject* count = PyObject_CallNoArgs(torch_api.get_num_threads);
  if (!count) throw py::error_already_set();
  return py::reinterpret_steal<py::int_>(count);
}

void* current_stream(Device device) {
  void* stream = nullptr;
  if (!torch_api.table->current_work_stream ||
      torch_api.table->current_work_stream(device.type, device.id, &stream) != 0) {
    if (PyErr_Occurred()) throw py::error_already_set();
    throw std::runtime_error("torch does not report the current stream of its device");
  }
  return stream;
}

Argument::Argument(const char* name, PyObject* object, Device device)
    : name_(name), wanted_(device), object_(object) {
  look();
}

Argument::Argument(const char* name, py::object&& object, Device device)
    : name_(name), wanted_(device), object_(object.ptr()), owned_(std::move(object)) {
  look();
}

void Argument::look() {
  if (!torch_api.table) throw std::runtime_error("bind_torch must be called first");
  // DLPack's function does not check: it would read any other object as if it were a tensor.
  if (!PyObject_TypeCheck(object_, torch_api.tensor_type)) {
    throw py::type_error(std::string(name_) + " must be a Tensor, got " +
                         Py_TYPE(object_)->tp_name);
  }
  if (torch_api.table->view_of_py_object(object_, &view_) != 0) throw py::error_already_set();
  if (!view_.data) {
    bool is_empty = false;
    for (int dim = 0; dim < view_.ndim; ++dim) is_empty = is_empty || size(dim) == 0;
    if (!is_empty) throw py::type_error(std::string(name_) + " has no memory to be read from");
  }
  const bool same_id = wanted_.type == kCpu || wanted_.id < 0 || view_.device_id == wanted_.id;
  if (view_.device_type != wanted_.type || !same_id) {
    const std::string id = wanted_.id < 0 ? "" : ":" + std::to_string(wanted_.id);
    throw py::type_error(std::string(name_) + " must be on " +
                         (wanted_.type == kCpu ? "the cpu" : "cuda" + id) +
                         ", got a tensor elsewhere");
  }
}

std::string Argument::shape() const { return in_parentheses(view_.shape, view_.ndim); }

Argument& Argument::check_shape(Sizes sizes) {
  bool fits = size_t(view_.ndim) == sizes.size();
  for (int dim = 0; fits && dim < view_.ndim; ++dim) fits = sizes.begin()[dim] == size(dim);
  if (fits) return *this;
  throw py::value_error(std::string(name_) + " must have shape " +
                        in_parentheses(sizes.begin(), sizes.size()) + ", got " + shape());
}

DType Argument::dtype() const {
  if (code() == TypeCode::real && view_.bits == 32) return DType::f32;
  if (code() == TypeCode::real && view_.bits == 64) return DType::f64;
  if (code() == TypeCode::bfloat && view_.bits == 16) return DType::bf16;
  if (code() == TypeCode::real && view_.bits == 16) return DType::f16;
  throw py::type_error(std::string(name_) +
                       " must have the dtype float32, float64, bfloat16 or float16");
}

Argument& Argument::check_dtype(DType wanted) {
  if (dtype() == wanted) return *this;
  throw py::type_error(std::string(name_) + " must have the dtype " + kDTypeNames[int(wanted)] +
                       ", got " + kDTypeNames[int(dtype())]);
}

Argument& Argument::check_bool() {
  if (code() == TypeCode::boolean && view_.bits == 8) return *this;
  throw py::type_error(std::string(name_) + " must be a bool Tensor");
}

Argument& Argument::make_contiguous() {
  if (is_contiguous(view_)) return *this;
  owned_ = py::handle(object_).attr("contiguous")();
  object_ = owned_.ptr();
  look();
  return *this;
}

Argument& Argument::make_unit_stride() {
  const int last = view_.ndim - 1;
  return last < 0 || size(last) <= 1 || stride(last) == 1 ? *this : make_contiguous();
}

Argument new_empty(const Argument& like, Sizes sizes) {
  return call_new_empty(like, sizes, nullptr);
}

Argument new_empty(const Argument& like, Sizes sizes, DType dtype) {
  return call_new_empty(like, sizes, dtype == like.dtype() ? nullptr : torch_api.float32);
}

Argument new_floats(const Argument& like, Sizes sizes) {
  return call_new_empty(like, sizes, torch_api.float32);
}

Argument new_zeros(const Argument& like) {
  const py::handle tensor = like.object();
  return Argument("output", py::object(tensor.attr("new_zeros")(tensor.attr("shape"))),
                  like.device());
}

}  // namespace fused_attn

// torch's tensors, read and created without its headers, so that one wheel works with every torch.
//
// torch.Tensor holds a table of C functions of the DLPack project, `__dlpack_c_exchange_api__`. It
// gives the pointer, sizes and strides of a tensor in 30 ns; through Python they take 0.5 us.
// Outputs are created by Tensor.new_empty: DLPack's allocator is hardly faster, and torch cannot
// resize tensors that come from it.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#include "attention_params.h"

namespace fused_attn {

namespace py = pybind11;

// DLPack's DLTensor, version 1.
struct TensorView {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t code;  // kind of number, a TypeCode
  uint8_t bits;
  uint16_t lanes;
  const int64_t* shape;
  const int64_t* strides;  // in elements
  uint64_t byte_offset;
  void* start() const { return static_cast<char*>(data) + byte_offset; }
};
static_assert(sizeof(TensorView) == 48, "the layout is DLPack's");

enum class TypeCode : uint8_t { integer = 0, natural = 1, real = 2, bfloat = 4, boolean = 6 };

using Sizes = std::initializer_list<int64_t>;

constexpr int32_t kCpu = 1, kCuda = 2, kRocm = 10;  // types of a device in DLPack

struct Device {
  int32_t type = kCpu;
  int32_t id = 0;  // -1: any of the type
};

// Reads from the module `torch` what the functions below need. Throws ImportError if that torch has
// no table of functions, or one of another major version.
void bind_torch(const py::module_& torch);

// Whether the type is torch.Tensor or torch.nn.Parameter, and not a subclass.
bool is_exact_tensor(PyObject* object);

// Fills the view of a tensor; returns false, without an error, if DLPack cannot describe it.
bool look_at(PyObject* tensor, TensorView& view);

bool is_negated(PyObject* tensor);  // Tensor.is_neg(): memory holds the numbers' negatives

int torch_threads();  // torch.get_num_threads()

// torch.cuda.current_stream(device), as a cudaStream_t.
void* current_stream(Device device);

// A tensor that a caller passed, or a contiguous copy of it. The name is for messages.
class Argument {
 public:
  Argument() = default;
  // Throws TypeError unless `object` is a tensor on that device. It must outlive this.
  Argument(const char* name, PyObject* object, Device device = {});
  Argument(const char* name, py::object&& object, Device device = {});  // keeps it alive

  Argument& check_shape(Sizes sizes);  // ValueError
  Argument& check_dtype(DType dtype);  // TypeError
  Argument& check_bool();              // TypeError
  DType dtype() const;                 // TypeError unless one of those four

  Argument& make_contiguous();
  Argument& make_unit_stride();  // in the last dimension; the other strides may be anything

  int ndim() const { return view_.ndim; }
  int64_t size(int dim) const { return view_.shape[dim]; }
  int64_t stride(int dim) const { return view_.strides[dim]; }
  TypeCode code() const { return TypeCode(view_.code); }
  int bits() const { return view_.bits; }
  void* data() const { return view_.start(); }
  Rows rows() const {  // of a (B, rows, width) tensor, or a (rows, width) one
    return {data(), ndim() == 3 ? stride(0) : 0, stride(ndim() - 2), nullptr};
  }
  Device device() const { return {view_.device_type, view_.device_id}; }
  std::string shape() const;
  const char* name() const { return name_; }
  PyObject* object() const { return object_; }
  py::object release() { return std::move(owned_); }

 private:
  void look();

  const char* name_ = "";
  Device wanted_;
  PyObject* object_ = nullptr;
  py::object owned_;  // holds object_ where the caller does not
  TensorView view_ = {};
};

// A contiguous tensor on the device of `like`, uninitialised.
Argument new_empty(const Argument& like, Sizes sizes);
Argument new_empty(const Argument& like, Sizes sizes, DType dtype);  // float32 or that of like
Argument new_floats(const Argument& like, Sizes sizes);              // float32, like any tensor
Argument new_zeros(const Argument& like);

}  // namespace fused_attn

// A kernel library as a Python object: the C ABI of library.h without ctypes' cost per launch.
#include <dlfcn.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include <pybind11/pybind11.h>

#include "launch/library.h"

namespace py = pybind11;

namespace {

class Library {
 public:
  explicit Library(const std::string& path) : handle_(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
    if (handle_ == nullptr) throw std::runtime_error(dlerror());
    symbol("vlmops_cuda_abi", abi_);
    if (abi_() != vlmops::kAbi) throw std::runtime_error("a kernel library of another version of vlmops");
    symbol("vlmops_cuda_num_kernels", num_kernels_);
    symbol("vlmops_cuda_kernel_name", kernel_name_);
    symbol("vlmops_cuda_find", find_);
    symbol("vlmops_cuda_error_text", error_text_);
    symbol("vlmops_cuda_versions", versions_);
    symbol("vlmops_cuda_devices", devices_);
    symbol("vlmops_cuda_prepare", prepare_);
    symbol("vlmops_cuda_launch", launch_);
  }

  py::list kernels() const {
    py::list names;
    for (int i = 0; i < num_kernels_(); ++i) names.append(kernel_name_(i));
    return names;
  }
  uintptr_t find(const char* name) const { return reinterpret_cast<uintptr_t>(find_(name)); }
  std::string error_text(int error) const { return error_text_(error); }
  py::tuple versions() const {
    int driver = 0, runtime = 0;
    const int error = versions_(&driver, &runtime);
    return py::make_tuple(error, driver, runtime);
  }
  py::tuple devices() const {
    int count = 0;
    const int error = devices_(&count);
    return py::make_tuple(error, count);
  }
  int prepare(uintptr_t kernel, int device, int shared_bytes) const {
    py::gil_scoped_release released;  // loading a kernel takes a while
    return prepare_(reinterpret_cast<const void*>(kernel), device, shared_bytes);
  }
  int launch(uintptr_t kernel, int device, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned shared_bytes,
             uintptr_t stream, const py::bytes& slots, int maps) const {
    char* bytes = nullptr;
    Py_ssize_t size = 0;
    if (PyBytes_AsStringAndSize(slots.ptr(), &bytes, &size) != 0) throw py::error_already_set();
    return launch_(reinterpret_cast<const void*>(kernel), device, x, y, z, threads, shared_bytes,
                   reinterpret_cast<void*>(stream), bytes, static_cast<int>((size - 128 * maps) / 8), maps);
  }

 private:
  template <class F>
  void symbol(const char* name, F*& to) {
    to = reinterpret_cast<F*>(dlsym(handle_, name));
    if (to == nullptr) throw std::runtime_error(std::string("no ") + name + " in the kernel library");
  }

  void* handle_;  // never closed: kernels may still be running
  decltype(vlmops_cuda_abi)* abi_ = nullptr;
  decltype(vlmops_cuda_num_kernels)* num_kernels_ = nullptr;
  decltype(vlmops_cuda_kernel_name)* kernel_name_ = nullptr;
  decltype(vlmops_cuda_find)* find_ = nullptr;
  decltype(vlmops_cuda_error_text)* error_text_ = nullptr;
  decltype(vlmops_cuda_versions)* versions_ = nullptr;
  decltype(vlmops_cuda_devices)* devices_ = nullptr;
  decltype(vlmops_cuda_prepare)* prepare_ = nullptr;
  decltype(vlmops_cuda_launch)* launch_ = nullptr;
};

}  // namespace

PYBIND11_MODULE(vlmops_cuda_loader, m) {
  py::class_<Library>(m, "Library")
      .def(py::init<const std::string&>())
      .def("kernels", &Library::kernels)
      .def("find", &Library::find)
      .def("error_text", &Library::error_text)
      .def("versions", &Library::versions)
      .def("devices", &Library::devices)
      .def("prepare", &Library::prepare)
      .def("launch", &Library::launch, py::arg("kernel"), py::arg("device"), py::arg("x"), py::arg("y"), py::arg("z"),
           py::arg("threads"), py::arg("shared"), py::arg("stream"), py::arg("slots"), py::arg("maps") = 0);
}

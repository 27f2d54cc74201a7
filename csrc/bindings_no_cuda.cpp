// The same names as in bindings_cuda.cpp, in a build without CUDA kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace py = pybind11;

namespace {

[[noreturn]] void refuse() {
  throw std::runtime_error(std::string("this build of tetris has no CUDA kernels (") +
                           TETRIS_CUDA_WHY + ")");
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_built", [] { return false; });
  m.def("cuda_why", [] { return std::string(TETRIS_CUDA_WHY); });
  m.def("cuda_targets", [] { return std::vector<std::string>(); });
  m.def("cuda_force_kernel", [](const std::string&) { refuse(); }, py::arg("text"));
  m.def("cuda_forced_kernel", [] { return std::string(); });
  m.def("cuda_watch", [](bool) { refuse(); }, py::arg("enabled"));
  m.def("cuda_watched", [] { refuse(); });
  m.def(
      "cuda_set_measured",
      [](const std::string&, const std::map<std::string, std::string>&) { refuse(); },
      py::arg("device"), py::arg("measured"));
  m.def("cuda_prepared_layouts", [] { return 0; });
  m.def("cuda_forget_layouts", [] {});
}

// What Python sees of the CUDA side beside the ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>

#include "cuda/config.h"
#include "ops/cuda_layout.h"
#include "ops/cuda_run.h"

namespace py = pybind11;

namespace {

std::vector<std::string> targets() {
  std::vector<std::string> result;
  std::string rest = TETRIS_CUDA_TARGETS;
  for (size_t at; !rest.empty(); rest = at == std::string::npos ? "" : rest.substr(at + 1)) {
    at = rest.find(',');
    result.push_back(rest.substr(0, at));
  }
  return result;
}

void force(const std::string& text) {
  const std::string error = tetris::cuda::force_kernel(text);
  if (!error.empty()) throw py::value_error(error);
}

void set_measured(const std::string& device, const std::map<std::string, std::string>& table) {
  tetris::cuda::Measured measured;
  for (const auto& [key, text] : table) {
    const auto config = tetris::cuda::parse_config(text);
    if (!config) throw py::value_error("no such kernel: '" + text + "' for '" + key + "'");
    measured.emplace_back(key, *config);
  }
  tetris::cuda::set_measured(device, measured);
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_built", [] { return true; });
  m.def("cuda_why", [] { return std::string(TETRIS_CUDA_WHY); });
  m.def("cuda_targets", &targets);
  m.def("cuda_force_kernel", &force, py::arg("text"));
  m.def("cuda_forced_kernel", &tetris::cuda::forced_kernel);
  m.def("cuda_watch", &tetris::ops::watch_products, py::arg("enabled"));
  m.def("cuda_watched", [] {
    std::vector<std::tuple<std::string, std::string, std::vector<std::string>>> result;
    for (const auto& seen : tetris::ops::watched_products())
      result.emplace_back(seen.device, seen.key, seen.candidates);
    return result;
  });
  m.def("cuda_set_measured", &set_measured, py::arg("device"), py::arg("measured"));
  m.def("cuda_prepared_layouts", &tetris::ops::prepared_layouts);
  m.def("cuda_forget_layouts", &tetris::ops::forget_prepared_layouts,
        py::call_guard<py::gil_scoped_release>());
}

// The Python module tetris._C: what is not a tensor op. Loading it registers the ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/cpu_features.h"
#include "cpu/conv_plan.h"
#include "cpu/dispatch.h"
#include "cpu/peak.h"
#include "ops/parallel.h"

namespace py = pybind11;

void bind_reorder(py::module_& m);  // bindings_reorder.cpp
void bind_cuda(py::module_& m);     // bindings_cuda.cpp, bindings_no_cuda.cpp

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Native part of tetris: the torch.ops.tetris ops, the CPU dispatch, the permutation search.";
  m.attr("version") = TETRIS_VERSION;
  m.def("isa_in_use", &tetris::cpu::isa_in_use);
  m.def("isas_built", &tetris::cpu::isas_built);
  m.def("isas_supported", &tetris::cpu::isas_supported);
  m.def("force_isa", &tetris::cpu::force_isa, py::arg("name"));
  m.def("last_kernel", [] { return std::string(tetris::cpu::last_kernel()); });
  m.def("conv_passes", &tetris::cpu::conv_passes);
  py::enum_<tetris::cpu::Taps>(m, "Taps")
      .value("by_cost", tetris::cpu::Taps::kByCost)
      .value("together", tetris::cpu::Taps::kTogether)
      .value("apart", tetris::cpu::Taps::kApart);
  m.def("force_taps", &tetris::cpu::force_taps, py::arg("taps"));
  m.def("fma_peak", &tetris::cpu::fma_peak, py::arg("seconds") = 0.2,
        py::call_guard<py::gil_scoped_release>());
  m.def("threads_at_work", &tetris::ops::threads_at_work, py::call_guard<py::gil_scoped_release>());
  m.def("l2_cache_bytes", &tetris::l2_cache_bytes);
  m.def("assume_cache_bytes", &tetris::assume_cache_bytes, py::arg("l1"), py::arg("l2"));
  bind_reorder(m);
  bind_cuda(m);
}

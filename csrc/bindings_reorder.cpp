// The permutation search for Python: numpy arrays in and out, no GIL while it runs. Arguments are
// checked in tetris/reorder.py, with the names the user knows; here only what would crash.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <exception>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "reorder/objective.h"
#include "reorder/search.h"

namespace py = pybind11;

namespace {

namespace ro = tetris::reorder;
using Saliency = py::array_t<float, py::array::c_style>;
using Indices = py::array_t<int32_t, py::array::c_style>;

ro::Problem make_problem(const Saliency& saliency, int64_t block_rows, int64_t block_cols,
                         int64_t kept, bool balanced, bool allow_empty_rows) {
  if (saliency.ndim() != 3) throw std::invalid_argument("saliency must be [rows, cols, positions]");
  ro::Problem p;
  p.saliency = saliency.data();
  p.rows = saliency.shape(0);
  p.cols = saliency.shape(1);
  p.positions = saliency.shape(2);
  p.block_rows = block_rows;
  p.block_cols = block_cols;
  p.kept = kept;
  p.balanced = balanced;
  p.allow_empty_rows = allow_empty_rows;
  const bool empty = p.rows < 1 || p.cols < 1 || p.positions < 1;
  if (empty || block_rows < 1 || block_rows > 128 || block_cols < 1 || block_cols > 128 ||
      kept < 0 || kept > p.blocks()) {
    throw std::invalid_argument("reorder: bad extents, block or number of kept blocks");
  }
  return p;
}

py::array_t<int32_t> to_numpy(const ro::Permutation& perm) {
  return py::array_t<int32_t>(static_cast<py::ssize_t>(perm.size()), perm.data());
}

py::array to_mask(const ro::Problem& p, const ro::Selection& selection) {
  py::array_t<bool> mask({p.row_groups(), p.blocks_per_row()});
  std::copy(selection.keep.begin(), selection.keep.end(), mask.mutable_data());
  return mask;
}

ro::Permutation to_permutation(const Indices& array, int64_t n) {
  std::vector<bool> seen(static_cast<size_t>(n));
  if (array.ndim() != 1 || array.size() != n) throw std::invalid_argument("reorder: bad length");
  for (int64_t q = 0; q < n; ++q) {
    const int32_t i = array.data()[q];
    if (i < 0 || i >= n || seen[i]) throw std::invalid_argument("reorder: not a permutation");
    seen[i] = true;
  }
  return ro::Permutation(array.data(), array.data() + n);
}

py::dict search_order(const Saliency& saliency, int64_t block_rows, int64_t block_cols,
                      int64_t kept, bool balanced, bool allow_empty_rows,
                      const std::optional<Indices>& rows, const std::optional<Indices>& cols,
                      int method, int start, uint64_t seed, double seconds, int64_t repeats,
                      int64_t sweeps, int threads, const py::object& progress) {
  ro::Problem problem =
      make_problem(saliency, block_rows, block_cols, kept, balanced, allow_empty_rows);
  ro::Order held;
  if (rows) {
    held.rows = to_permutation(*rows, problem.rows);
    problem.held_rows = &held.rows;
  }
  if (cols) {
    held.cols = to_permutation(*cols, problem.cols);
    problem.held_cols = &held.cols;
  }
  ro::SearchOptions options;
  options.method = static_cast<ro::Method>(method);
  options.start = static_cast<ro::Start>(start);
  options.seed = seed;
  options.seconds = seconds;
  options.repeats = repeats;
  options.sweeps = sweeps;
  options.threads = threads;

  std::exception_ptr raised;  // by Ctrl-C or by the callback; rethrown as it was
  const auto report = [&](double done) {
    py::gil_scoped_acquire gil;
    try {
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      if (!progress.is_none()) progress(done);
      return true;
    } catch (...) {
      raised = std::current_exception();
      return false;
    }
  };
  ro::SearchResult found;
  try {
    py::gil_scoped_release no_gil;
    ro::Control control(report);
    found = ro::search(problem, options, control);
  } catch (const ro::Cancelled&) {
    std::rethrow_exception(raised);
  }

  py::dict result;
  result["row_perm"] = found.rows_moved ? py::object(to_numpy(found.order.rows)) : py::none();
  result["col_perm"] = found.cols_moved ? py::object(to_numpy(found.order.cols)) : py::none();
  result["mask"] = to_mask(problem, found.selection);
  result["mass"] = found.selection.mass;
  result["total"] = found.total;
  result["identity_mass"] = found.identity_mass;
  result["l1_sort_mass"] = found.l1_sort_mass;
  result["unstructured_share"] = found.unstructured_share;
  result["sweeps"] = found.sweeps;
  result["seconds"] = found.seconds;
  result["floor_bound"] = found.selection.floor_bound;
  result["trace"] = found.trace;
  return result;
}

py::array select_mask(const Saliency& saliency, int64_t block_rows, int64_t block_cols,
                      int64_t kept, bool balanced, bool allow_empty_rows, const Indices& rows,
                      const Indices& cols) {
  const ro::Problem problem =
      make_problem(saliency, block_rows, block_cols, kept, balanced, allow_empty_rows);
  const ro::Order order{to_permutation(rows, problem.rows), to_permutation(cols, problem.cols)};
  ro::Selection selection;
  {
    py::gil_scoped_release no_gil;
    ro::Pool pool(1);
    selection = ro::select_blocks(problem, ro::block_sums(problem, order, pool));
  }
  return to_mask(problem, selection);
}

}  // namespace

void bind_reorder(py::module_& m) {
  m.def("reorder_search", &search_order, py::arg("saliency").noconvert(), py::arg("block_rows"),
        py::arg("block_cols"), py::arg("kept"), py::arg("balanced"), py::arg("allow_empty_rows"),
        py::arg("rows"), py::arg("cols"), py::arg("method"), py::arg("start"), py::arg("seed"),
        py::arg("seconds"), py::arg("repeats"), py::arg("sweeps"), py::arg("threads"),
        py::arg("progress"));
  m.def("reorder_select", &select_mask, py::arg("saliency").noconvert(), py::arg("block_rows"),
        py::arg("block_cols"), py::arg("kept"), py::arg("balanced"), py::arg("allow_empty_rows"),
        py::arg("rows"), py::arg("cols"));
}

// _C.Sampling, _C.sample, _C.most_probable: tokens from rows of logits.
#include "engine/sampler/sampler.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <vector>

#include "base/parallel.h"
#include "python/tensor.h"

namespace effinfer::sampler_binding {

using engine::Sampling;

// A one-dimensional array of int32, as it is.
py::array_t<int32_t> want_int32(const char* op, const char* arg, py::handle object,
                                py::ssize_t length) {
  if (!py::isinstance<py::array_t<int32_t, py::array::c_style>>(object))
    reject(op, arg, "be a contiguous array of int32", Py_TYPE(object.ptr())->tp_name);
  const auto array = py::reinterpret_borrow<py::array_t<int32_t>>(object);
  if (array.ndim() != 1 || (length >= 0 && array.shape(0) != length))
    reject(op, arg, length < 0 ? "have one dimension" : "have length " + std::to_string(length),
           py::str(object.attr("shape")).cast<std::string>());
  return array;
}

Rows want_logits(const char* op, py::handle object) {
  const Rows logits = want_rows(op, "logits", object, kF32);
  if (logits.dim == 0) reject(op, "logits", "have at least one column", "none");
  if (logits.dim > INT32_MAX) reject(op, "logits", "have fewer columns", shape_text(logits.tensor));
  return logits;
}

// A token for each row of logits, from a list of Sampling, positions, and a list of histories (None
// where there are no penalties), into `tokens`.
void sample(py::handle logits_, py::handle samplings_, py::handle positions_, py::handle histories_,
            py::handle tokens_) {
  constexpr auto op = "sample";
  const Rows logits = want_logits(op, logits_);
  const auto samplings = py::reinterpret_borrow<py::list>(samplings_);
  const auto histories = py::reinterpret_borrow<py::list>(histories_);
  const auto want_list = [&](const char* arg, py::handle list) {
    if (!py::isinstance<py::list>(list) || static_cast<int64_t>(py::len(list)) != logits.rows)
      reject(op, arg, "be a list of " + std::to_string(logits.rows), py::str(list));
  };
  want_list("samplings", samplings_);
  want_list("histories", histories_);
  const auto positions = want_int32(op, "positions", positions_, logits.rows);
  auto tokens = want_int32(op, "tokens", tokens_, logits.rows);
  static thread_local std::vector<engine::SampleRow> rows;
  rows.resize(logits.rows);
  for (int64_t i = 0; i < logits.rows; ++i) {
    const auto& sampling = samplings[i].cast<const Sampling&>();
    rows[i] = {.logits = logits.tensor.as<const float>() + i * logits.stride,
               .sampling = &sampling,
               .position = positions.data()[i],
               .history = nullptr,
               .length = 0};
    if (!sampling.penalized()) continue;
    const auto history = want_int32(op, "histories", histories[i], -1);
    rows[i].history = history.data();
    rows[i].length = history.shape(0);
  }
  void* const scratch = workspace(engine::sample_scratch(logits.dim) * num_threads());
  int32_t* const chosen = tokens.mutable_data();
  const py::gil_scoped_release nogil;
  engine::sample(rows.data(), logits.rows, logits.dim, scratch, chosen);
}

void most_probable(py::handle logits_, py::handle tokens_) {
  constexpr auto op = "most_probable";
  const Rows logits = want_logits(op, logits_);
  auto tokens = want_int32(op, "tokens", tokens_, logits.rows);
  int32_t* const chosen = tokens.mutable_data();
  const py::gil_scoped_release nogil;
  engine::most_probable(logits.tensor.as<const float>(), logits.rows, logits.dim, logits.stride,
                        chosen);
}

void bind(Module& m) {
  py::class_<Sampling>(m, "Sampling")
      .def(py::init([](double temperature, int64_t top_k, double top_p, double min_p,
                       double repetition, double presence, double frequency, uint64_t seed,
                       int64_t prompt, int64_t min_tokens, std::vector<int32_t> stop_ids) {
             return Sampling{temperature, top_k, top_p,  min_p,      repetition,         presence,
                             frequency,   seed,  prompt, min_tokens, std::move(stop_ids)};
           }),
           py::kw_only(), py::arg("temperature"), py::arg("top_k"), py::arg("top_p"),
           py::arg("min_p"), py::arg("repetition"), py::arg("presence"), py::arg("frequency"),
           py::arg("seed"), py::arg("prompt"), py::arg("min_tokens"), py::arg("stop_ids"));
  m.def<&sample>("sample");
  m.def<&most_probable>("most_probable");
  static_cast<py::module_&>(m).def("uniform", &engine::uniform);
}

}  // namespace effinfer::sampler_binding

// _C.Scheduler: the engine's scheduler, with its launch as numpy views that stay where they are.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>

#include "engine/errors.h"
#include "engine/scheduler.h"
#include "python/module.h"

namespace effinfer::engine_binding {

using namespace effinfer::engine;

template <class E>
E choice(const char* arg, const std::string& name, std::initializer_list<const char*> names) {
  int i = 0;
  std::string known;
  for (const char* candidate : names) {
    if (name == candidate) return static_cast<E>(i);
    known += (i++ > 0 ? ", " : "") + std::string(candidate);
  }
  engine::reject("Scheduler", arg, "be one of " + known, "'" + name + "'");
}

// The array as it is: no conversion that would hide a wrong type.
template <class T>
const T* want_array(const char* op, const char* arg, const py::object& object, const char* type,
                    py::ssize_t length) {
  if (!py::isinstance<py::array_t<T, py::array::c_style>>(object))
    engine::reject(op, arg, std::string("be a contiguous array of ") + type,
                   py::str(py::type::of(object)).cast<std::string>());
  const auto array = py::reinterpret_borrow<py::array>(object);
  if (array.ndim() != 1 || (length >= 0 && array.shape(0) != length))
    engine::reject(
        op, arg,
        length < 0 ? std::string("have one dimension") : "have length " + std::to_string(length),
        py::str(object.attr("shape")).cast<std::string>());
  return static_cast<const T*>(array.data());
}

class PyScheduler {
 public:
  PyScheduler(int loops, int r_min, const std::string& mode, const std::string& kv_policy,
              int max_slots, int max_rows, int prefill_chunk, int block_size, int num_blocks,
              bool has_kv, int num_states, int max_positions, int max_ngram, bool prefix_cache,
              std::vector<double> costs, std::vector<double> head_costs)
      : core_(std::make_shared<Scheduler>(Config{
            .loops = loops,
            .r_min = r_min,
            .mode = choice<Mode>("mode", mode, {"full", "exit", "lossless"}),
            .kv_policy =
                choice<KvPolicy>("kv_policy", kv_policy, {"depth", "first", "shared", "propagate"}),
            .max_slots = max_slots,
            .max_rows = max_rows,
            .prefill_chunk = prefill_chunk,
            .block_size = block_size,
            .num_blocks = num_blocks,
            .has_kv = has_kv,
            .num_states = num_states,
            .max_positions = max_positions,
            .max_ngram = max_ngram,
            .prefix_cache = prefix_cache,
            .costs = std::move(costs),
            .head_costs = std::move(head_costs),
        })) {}

  Scheduler& core() { return *core_; }

  // A view of a buffer that lives as long as the view.
  template <class T>
  py::array view(T* data, std::vector<py::ssize_t> shape) {
    auto* owner = new std::shared_ptr<Scheduler>(core_);
    const py::capsule base(owner,
                           [](void* p) { delete static_cast<std::shared_ptr<Scheduler>*>(p); });
    return py::array_t<T>(std::move(shape), data, base);
  }
  template <class T>
  py::array view(std::vector<T>& data) {
    return view(data.data(), {py::ssize_t(data.size())});
  }
  template <class T, size_t kWidth>
  py::array view(std::vector<std::array<T, kWidth>>& data) {
    return view(data.front().data(), {py::ssize_t(data.size()), kWidth});
  }

  void submit(int64_t id, const py::object& prompt, int64_t max_new_tokens,
              std::vector<int32_t> stop_ids, int priority, double deadline, int min_loops,
              std::optional<int> max_loops) {
    const int32_t* tokens = want_array<int32_t>("submit", "prompt", prompt, "int32", -1);
    core_->submit(id, tokens, py::reinterpret_borrow<py::array>(prompt).shape(0), max_new_tokens,
                  std::move(stop_ids), priority, deadline, min_loops,
                  max_loops.value_or(core_->config().loops));
  }

  int commit(const py::object& tokens, const py::object& exits, double now) {
    const int wanted = core_->launch().wanted.count;
    const int32_t* chosen = want_array<int32_t>("commit", "tokens", tokens, "int32", wanted);
    const uint8_t* leave =
        exits.is_none() ? nullptr : want_array<uint8_t>("commit", "exits", exits, "uint8", wanted);
    return core_->commit(chosen, leave, now);
  }

  py::array history(int wanted) {
    int length = 0;
    auto* owner = new Tokens(core_->history(wanted, &length));
    const py::capsule base(owner, [](void* p) { delete static_cast<Tokens*>(p); });
    return py::array_t<int32_t>(length, owner->get(), base);
  }

  py::dict stats() const {
    const Scheduler& s = *core_;
    const Stats& counts = s.stats();
    py::dict out;
    out["waiting"] = s.queue().size();
    out["running"] = s.running();
    out["queue_tokens"] = s.queue().tokens();
    out["free_blocks"] = s.blocks().available() - s.blocks().idle();
    out["cached_blocks"] = s.blocks().cached();
    out["idle_blocks"] = s.blocks().idle();
    out["free_states"] = s.states().unused();
    out["idle_states"] = s.states().available() - s.states().unused();
    out["requests"] = counts.requests;
    out["launches"] = counts.launches;
    out["rows"] = counts.rows;
    out["prefill_rows"] = counts.prefill_rows;
    out["decode_rows"] = counts.decode_rows;
    out["fill_rows"] = counts.fill_rows;
    out["verify_rows"] = counts.verify_rows;
    out["draft_rows"] = counts.draft_rows;
    out["drafts_accepted"] = counts.drafts_accepted;
    out["drafts_flushed"] = counts.drafts_flushed;
    out["exits_checked"] = counts.exits_checked;
    out["exits_agreed"] = counts.exits_agreed;
    out["draft_acceptance"] = s.controller().acceptance();
    out["depths"] = counts.depths;
    out["rows_at_loop"] = counts.rows_at_loop;
    out["prefix_hit_tokens"] = counts.prefix_hit_tokens;
    return out;
  }

  // For each line, the loops that its request's spans are at, a bit each.
  std::vector<uint64_t> line_loops() const {
    std::vector<uint64_t> loops(core_->config().max_slots);
    for (size_t line = 0; line < loops.size(); ++line)
      loops[line] = core_->loops_on_line(static_cast<int>(line));
    return loops;
  }

 private:
  std::shared_ptr<Scheduler> core_;
};

void bind(Module& m) {
  using Self = PyScheduler;
  py::class_<Self> scheduler(m, "Scheduler", py::dynamic_attr());
  scheduler.def(py::init<int, int, const std::string&, const std::string&, int, int, int, int, int,
                         bool, int, int, int, bool, std::vector<double>, std::vector<double>>(),
                py::kw_only(), py::arg("loops") = 1, py::arg("r_min") = 1, py::arg("mode") = "full",
                py::arg("kv_policy") = "depth", py::arg("max_slots"), py::arg("max_rows"),
                py::arg("prefill_chunk"), py::arg("block_size"), py::arg("num_blocks"),
                py::arg("has_kv") = true, py::arg("num_states") = 0, py::arg("max_positions"),
                py::arg("max_ngram") = 0, py::arg("prefix_cache") = true,
                py::arg("costs") = std::vector<double>(),
                py::arg("head_costs") = std::vector<double>());
  scheduler.def("submit", &Self::submit, py::arg("request_id"), py::arg("prompt"),
                py::arg("max_new_tokens"), py::arg("stop_ids") = std::vector<int32_t>(),
                py::arg("priority") = 0,
                py::arg("deadline") = std::numeric_limits<double>::infinity(),
                py::arg("min_loops") = 1, py::arg("max_loops") = py::none());
  scheduler.def("cancel", [](Self& s, int64_t id) { return s.core().end(id, kCancelled); });
  scheduler.def("finish", [](Self& s, int64_t id) { return s.core().end(id, kStop); });
  scheduler.def("fail", [](Self& s, int64_t id) { return s.core().end(id, kError); });
  scheduler.def("plan", [](Self& s, double now) { return s.core().plan(now); });
  scheduler.def("commit", &Self::commit);
  scheduler.def("history", &Self::history);
  scheduler.def("stats", &Self::stats);
  scheduler.def("line_loops", &Self::line_loops);
  scheduler.def("check", [](Self& s) { s.core().check(); });

  const auto count = [&](const char* name, auto get) {
    scheduler.def_property_readonly(name, [get](Self& s) { return get(s.core()); });
  };
  count("n_rows", [](Scheduler& s) { return s.launch().tokens.count; });
  count("n_fresh", [](Scheduler& s) { return s.launch().fresh; });
  count("n_segments", [](Scheduler& s) { return s.launch().segments.count; });
  count("n_wanted", [](Scheduler& s) { return s.launch().wanted.count; });
  count("n_early", [](Scheduler& s) { return s.launch().early; });
  count("n_propagations", [](Scheduler& s) { return s.launch().propagations.count; });
  count("n_events", [](Scheduler& s) { return s.launch().events.count; });
  count("waiting", [](Scheduler& s) { return s.queue().size(); });
  count("running", [](Scheduler& s) { return s.running(); });
  count("queue_tokens", [](Scheduler& s) { return s.queue().tokens(); });
  count("in_flight", [](Scheduler& s) { return s.in_flight(); });
  count("arena_rows", [](Scheduler& s) { return s.config().arena_rows(); });
  count("states_per_request", [](Scheduler& s) { return s.config().states_per_request(); });

  // Made once per scheduler, and kept with it.
  const auto array = [&](const char* name, auto make) {
    scheduler.def_property_readonly(name, [name, make](const py::object& self) -> py::object {
      py::object cache = self.attr("__dict__");
      const py::str key(name);
      if (!cache.contains(key)) cache[key] = make(self.cast<Self&>());
      return cache[key];
    });
  };
  array("tokens", [](Self& s) { return s.view(s.core().launch().tokens.data); });
  array("positions", [](Self& s) { return s.view(s.core().launch().positions.data); });
  array("loops", [](Self& s) { return s.view(s.core().launch().loops.data); });
  array("arena", [](Self& s) { return s.view(s.core().launch().arena.data); });
  array("lines", [](Self& s) { return s.view(s.core().launch().lines.data); });
  array("kv_slots", [](Self& s) { return s.view(s.core().launch().kv_slots.data); });
  array("segments", [](Self& s) { return s.view(s.core().launch().segments.data); });
  array("wanted", [](Self& s) { return s.view(s.core().launch().wanted.data); });
  array("wanted_loops", [](Self& s) { return s.view(s.core().launch().wanted_loops.data); });
  array("wanted_positions",
        [](Self& s) { return s.view(s.core().launch().wanted_positions.data); });
  array("wanted_arena", [](Self& s) { return s.view(s.core().launch().wanted_arena.data); });
  array("wanted_ids", [](Self& s) { return s.view(s.core().launch().wanted_ids.data); });
  array("wanted_draft", [](Self& s) { return s.view(s.core().launch().wanted_draft.data); });
  array("wanted_final", [](Self& s) { return s.view(s.core().launch().wanted_final.data); });
  array("propagations", [](Self& s) { return s.view(s.core().launch().propagations.data); });
  array("events", [](Self& s) { return s.view(s.core().launch().events.data); });
  array("request_ids", [](Self& s) { return s.view(s.core().line_ids()); });
  array("block_table", [](Self& s) {
    const Config& c = s.core().config();
    return s.view(s.core().block_table().data(), {c.max_slots, c.max_blocks()});
  });
}

}  // namespace effinfer::engine_binding

// "op: argument must ..., got ...", the form of every refused argument.
#pragma once
#include <stdexcept>
#include <string>

namespace effinfer::engine {

[[noreturn]] inline void reject(const char* op, const char* arg, const std::string& expectation,
                                const std::string& got) {
  throw std::invalid_argument(std::string(op) + ": " + arg + " must " + expectation + ", got " +
                              got);
}

// For check(): a broken invariant is a bug of ours.
inline void invariant(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(std::string("Scheduler: invariant broken: ") + what);
}

}  // namespace effinfer::engine

// A native module whose functions are called the way CPython calls fastest: arguments by position,
// in an array. pybind11 converts them, but its own def(), made for overloads and keywords, would
// add 0.2 us to every call and a third to what the bindings take to compile.
#pragma once
#include <pybind11/pybind11.h>

#include <new>
#include <string>
#include <type_traits>
#include <utility>

namespace effinfer {

namespace py = pybind11;

// The argument as a T, or a TypeError that says which one is no T.
template <class T>
T argument(const char* function, size_t index, PyObject* object) {
  if constexpr (std::is_same_v<T, py::handle>) {
    return object;
  } else {
    py::detail::make_caster<T> caster;
    if (!caster.load(object, true))
      throw py::type_error(std::string(function) + ": argument " + std::to_string(index + 1) +
                           " must not be of type " + Py_TYPE(object)->tp_name);
    return py::detail::cast_op<T>(caster);
  }
}

// Turns the C++ exception in flight into Python's.
inline void raise_in_python() {
  try {
    throw;
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
}

// kFunction as Python sees it.
template <auto kFunction>
struct Method;

template <class Result, class... Args, Result (*kFunction)(Args...)>
struct Method<kFunction> {
  static inline PyMethodDef definition[2] = {};  // CPython keeps a pointer to it

  static PyObject* call(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return call(args, count, std::index_sequence_for<Args...>());
  }

  template <size_t... kIndex>
  static PyObject* call(PyObject* const* args, Py_ssize_t count, std::index_sequence<kIndex...>) {
    const char* name = definition[0].ml_name;
    if (count != sizeof...(Args))
      return PyErr_Format(PyExc_TypeError, "%s: takes %zu arguments, got %zd", name,
                          sizeof...(Args), count);
    try {
      const auto run = [&] {
        return kFunction(argument<std::remove_cvref_t<Args>>(name, kIndex, args[kIndex])...);
      };
      if constexpr (std::is_void_v<Result>) {
        run();
        Py_RETURN_NONE;
      } else {
        using Caster = py::detail::make_caster<Result>;
        return Caster::cast(run(), py::return_value_policy::move, {}).ptr();
      }
    } catch (...) {
      raise_in_python();
      return nullptr;
    }
  }
};

class Module : public py::module_ {
 public:
  explicit Module(const py::module_& module) : py::module_(module) {}

  template <auto kFunction>
  void def(const char* name) {
    using Bound = Method<kFunction>;
    PyObject* (*call)(PyObject*, PyObject* const*, Py_ssize_t) = &Bound::call;
    Bound::definition[0] = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call)),
                            METH_FASTCALL, nullptr};
    if (PyModule_AddFunctions(ptr(), Bound::definition) != 0) throw py::error_already_set();
  }
};

}  // namespace effinfer

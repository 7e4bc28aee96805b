// The arrays that the Python module takes: C-contiguous, aligned to their elements, of exactly one dtype. pybind11 passes no other
// (TypeError), so kernels may read them through plain pointers.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace cafe {
namespace py = pybind11;

inline bool is_aligned(const py::handle& a) { return py::detail::check_flags(a.ptr(), py::detail::npy_api::NPY_ARRAY_ALIGNED_); }

template <class T>
class Array : public py::array_t<T, py::array::c_style> {
   public:
    using py::array_t<T, py::array::c_style>::array_t;
    static bool check_(py::handle h) { return py::array_t<T, py::array::c_style>::check_(h) && is_aligned(h); }
};
template <class T>
using Maybe = std::optional<Array<T>>;

template <class T>
const T* data(const Maybe<T>& x) {
    return x ? x->data() : nullptr;
}

inline std::string shape_of(const py::array& a) { return py::str(a.attr("shape")); }

inline void expect(const char* name, const py::array& a, const std::vector<int64_t>& shape) {
    if (a.ndim() == py::ssize_t(shape.size()) && std::equal(shape.begin(), shape.end(), a.shape())) return;
    throw std::invalid_argument(std::string(name) + " must have shape " + std::string(py::str(py::tuple(py::cast(shape)))) +
                                ", got " + shape_of(a));
}

inline void expect_apart(const py::array& out, const char* name, const py::array& read) {
    auto begin = [](const py::array& a) { return static_cast<const char*>(a.data()); };
    if (begin(out) < begin(read) + read.nbytes() && begin(read) < begin(out) + out.nbytes())
        throw std::invalid_argument(std::string("out shares memory with ") + name +
                                    ", which is read while out is written: pass another array");
}

// In 1 ... a bound that no machine reaches: what is kept for each thread stays small.
inline void expect_threads(int64_t threads) {
    if (threads < 1 || threads > 1 << 16) throw std::invalid_argument("threads must be in 1 ... 65536, got " + std::to_string(threads));
}

}  // namespace cafe

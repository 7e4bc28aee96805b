// The Python module cafe_kernels._C: one register function per op, each defined beside the op it binds.
#include <pybind11/pybind11.h>

namespace cafe {
void register_attention(pybind11::module_&);
void register_losses(pybind11::module_&);
void register_optim(pybind11::module_&);
void register_sampler(pybind11::module_&);
void register_topk(pybind11::module_&);
}

PYBIND11_MODULE(_C, m) {
    m.doc() = "C++ kernels of cafe_kernels. Use the functions of cafe_kernels, which check and explain their inputs.";
    cafe::register_attention(m);
    cafe::register_losses(m);
    cafe::register_optim(m);
    cafe::register_sampler(m);
    cafe::register_topk(m);
}

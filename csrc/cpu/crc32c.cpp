// crc32c, host side: any object with a contiguous buffer.
#include "cpu/crc32c.h"

#include <pybind11/pybind11.h>

#include "cpu/select.h"

namespace mk::cpu {
namespace {

uint32_t crc32c_of(const pybind11::object& data, uint32_t crc) {
  Py_buffer view;
  if (PyObject_GetBuffer(data.ptr(), &view, PyBUF_SIMPLE)) throw pybind11::error_already_set();
  const auto* bytes = static_cast<const unsigned char*>(view.buf);
  const auto extend = select(crc32c_levels).extend;
  if (view.len < 4096) {  // shorter than what giving the lock away costs
    crc = extend(crc, bytes, view.len);
  } else {
    pybind11::gil_scoped_release release;
    crc = extend(crc, bytes, view.len);
  }
  PyBuffer_Release(&view);
  return crc;
}

}  // namespace

void bind_crc32c(pybind11::module_& m) {
  m.def("crc32c", &crc32c_of, pybind11::arg("data"), pybind11::arg("value") = 0u);
}

}  // namespace mk::cpu

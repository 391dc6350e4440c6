// A torch.Tensor over a block of block_pool.h.
#pragma once
#include <pybind11/pybind11.h>

#include "common/tensor_view.h"

namespace mk {

// Contiguous and uninitialised. Null, with no error set, where the pool has no such block: torch allocates then.
PyObject* large_tensor(const int64_t* sizes, int ndim, dlpack::DataType type, int64_t bytes);

// set_kept_memory and release_kept_memory, for memkernels/backends/cpp and the measuring of memory.
void bind_large_tensor(pybind11::module_& m);

}  // namespace mk

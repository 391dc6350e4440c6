#include "common/large_tensor.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "common/block_pool.h"

namespace mk {
namespace {

struct Owner {
  dlpack::Managed managed{};
  std::vector<int64_t> sizes, strides;
};

// Called when the last tensor over the block is gone, on any thread and without Python's lock.
void give_back(dlpack::Managed* managed) {
  block_pool::give_back(managed->tensor.data);
  delete static_cast<Owner*>(managed->context);
}

}  // namespace

PyObject* large_tensor(const int64_t* sizes, int ndim, dlpack::DataType type, int64_t bytes) {
  auto owner = std::make_unique<Owner>();
  owner->sizes.assign(sizes, sizes + ndim), owner->strides.resize(size_t(ndim));
  int64_t stride = 1;
  for (int i = ndim - 1; i >= 0; i--) owner->strides[size_t(i)] = stride, stride *= std::max<int64_t>(sizes[i], 1);
  void* const block = block_pool::take(bytes);
  if (!block) return nullptr;
  dlpack::Managed& managed = owner->managed;
  managed.major = 1, managed.context = owner.get(), managed.deleter = &give_back;
  managed.tensor = {block, {dlpack::kCPU, 0}, ndim, type, owner->sizes.data(), owner->strides.data(), 0};
  void* tensor = nullptr;
  if (dlpack::exchange()->to_py(&managed, &tensor) != 0) throw pybind11::error_already_set();
  owner.release();
  return static_cast<PyObject*>(tensor);
}

void bind_large_tensor(pybind11::module_& m) {
  m.def("set_kept_memory", &block_pool::set_limit, pybind11::arg("bytes"));
  m.def("release_kept_memory", &block_pool::release);
}

}  // namespace mk

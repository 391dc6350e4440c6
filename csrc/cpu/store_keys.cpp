// Byte keys out of a Python list, and their hashes. The objects lie anywhere in memory: their headers are prefetched
// while earlier ones are read.
#include <cstring>

#include "common/checks.h"
#include "common/key_hash.h"
#include "common/parallel.h"

namespace py = pybind11;

namespace mk::cpu {
namespace {

constexpr int64_t kAhead = 24;

// Where the bytes of each key lie and where they go; the bytes in all, or -1 where a key is not what it should be. The
// pointers hold as long as the list holds its objects.
int64_t spans(const py::list& keys, bool text, int64_t most, const TensorView& pointers_view,
              const TensorView& offsets_view) {
  const int64_t n = int64_t(PyList_GET_SIZE(keys.ptr()));
  check_output("store_keys", "pointers", pointers_view, {n}, DType::int64);
  check_output("store_keys", "offsets", offsets_view, {n + 1}, DType::int64);
  int64_t *pointers = pointers_view.data<int64_t>(), *offsets = offsets_view.data<int64_t>(), total = 0;
  for (int64_t i = 0; i < n; i++) {
    if (i + kAhead < n) {
      const char* ahead = reinterpret_cast<const char*>(PyList_GET_ITEM(keys.ptr(), i + kAhead));
      __builtin_prefetch(ahead);
      __builtin_prefetch(ahead + 64);
    }
    PyObject* key = PyList_GET_ITEM(keys.ptr(), i);
    const char* bytes = nullptr;
    Py_ssize_t length = 0;
    if (!text) {
      if (!PyBytes_Check(key)) return -1;
      bytes = PyBytes_AS_STRING(key), length = PyBytes_GET_SIZE(key);
    } else {
      if (!PyUnicode_Check(key)) return -1;
      bytes = PyUnicode_AsUTF8AndSize(key, &length);
      if (!bytes) return PyErr_Clear(), -1;
    }
    if (length > most) return -1;
    pointers[i] = int64_t(reinterpret_cast<intptr_t>(bytes));
    offsets[i] = total, total += length;
  }
  offsets[n] = total;
  return total;
}

// The bytes, one key after another, and their hashes. The GIL stays: the list must not change meanwhile.
void copy(const TensorView& data_view, const TensorView& first_view, const TensorView& second_view,
          const TensorView& pointers_view, const TensorView& offsets_view) {
  const int64_t n = pointers_view.numel();
  const int64_t *pointers = pointers_view.data<const int64_t>(), *offsets = offsets_view.data<const int64_t>();
  check_output("store_keys", "first", first_view, {n}, DType::int64);
  check_output("store_keys", "second", second_view, {n}, DType::int64);
  uint64_t *first = first_view.data<uint64_t>(), *second = second_view.data<uint64_t>();
  char* data = data_view.data<char>();
  parallel_for(n, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      if (i + kAhead < end) __builtin_prefetch(reinterpret_cast<const char*>(intptr_t(pointers[i + kAhead])));
      const int64_t length = offsets[i + 1] - offsets[i];
      std::memcpy(data + offsets[i], reinterpret_cast<const char*>(intptr_t(pointers[i])), size_t(length));
      const store::KeyHash hash = store::SipHash()(reinterpret_cast<const uint8_t*>(data + offsets[i]), length);
      first[i] = hash.first, second[i] = hash.second;
    }
  });
}

template <class Hash>
void each_key(int64_t n, const TensorView& data_view, const TensorView& offsets_view, const Hash& hash) {
  MK_CHECK(offsets_view.numel() == n + 1 && offsets_view.dtype() == DType::int64, "store_keys", "offsets",
           "int64, one more than hashes", describe(offsets_view));
  const uint8_t* data = data_view.data<const uint8_t>();
  const int64_t* offsets = offsets_view.data<const int64_t>();
  py::gil_scoped_release nogil;
  parallel_for(n, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) hash(i, data + offsets[i], offsets[i + 1] - offsets[i]);
  });
}

void hashes(const TensorView& first_view, const TensorView& second_view, const TensorView& data,
            const TensorView& offsets) {
  const int64_t n = first_view.numel();
  check_output("store_keys", "second", second_view, {n}, DType::int64);
  uint64_t *first = first_view.data<uint64_t>(), *second = second_view.data<uint64_t>();
  each_key(n, data, offsets, [=](int64_t i, const uint8_t* key, int64_t length) {
    const store::KeyHash hash = store::SipHash()(key, length);
    first[i] = hash.first, second[i] = hash.second;
  });
}

void owner_hashes(const TensorView& out_view, const TensorView& data, const TensorView& offsets) {
  uint64_t* out = out_view.data<uint64_t>();
  each_key(out_view.numel(), data, offsets,
           [=](int64_t i, const uint8_t* key, int64_t length) { out[i] = store::owner_hash(key, length); });
}

void huge_pages(const TensorView& bytes) { prefer_huge_pages(bytes.data(), bytes.numel()); }

}  // namespace

void bind_store_keys(pybind11::module_& m) {
  m.def("store_key_spans", &spans);
  m.def("store_key_copy", &copy);
  m.def("store_key_hashes", &hashes);
  m.def("store_owner_hashes", &owner_hashes);
  m.def("prefer_huge_pages", &huge_pages);
}

}  // namespace mk::cpu

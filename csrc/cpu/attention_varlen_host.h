// What forward and backward of attention_varlen share on the host side: the checked call, its sequences, and how their
// tasks are dealt out together, the longest first.
#pragma once
#include <cstring>
#include <string>
#include <vector>

#include "common/checks.h"
#include "cpu/attention_host.h"
#include "cpu/select.h"

namespace mk::cpu {
namespace {

constexpr const char* kOp = "attention_varlen";

struct Sequence {
  int64_t query, queries, key, keys;  // first token and number of tokens
  int64_t splits, sums;               // sums: where its partial results begin, in rows
};

// Tasks of the sequences in their order: count(sequence) tasks each.
class Deal {
 public:
  template <class Count>
  Deal(const std::vector<Sequence>& all, const Count& count) : all_(all) {
    ends_.reserve(all.size());
    for (const Sequence& s : all) ends_.push_back((total += count(s)));
  }
  // The sequence of a task, which becomes the number of the task within it.
  const Sequence& find(int64_t& task) const {
    const size_t i = size_t(std::upper_bound(ends_.begin(), ends_.end(), task) - ends_.begin());
    if (i) task -= ends_[i - 1];
    return all_[i];
  }
  int64_t total = 0;

 private:
  const std::vector<Sequence>& all_;
  std::vector<int64_t> ends_;
};

char* at(const void* data, int64_t elements, int64_t size) {
  return static_cast<char*>(const_cast<void*>(data)) + elements * size;
}

class Call {
 public:
  AttentionArgs base{};  // of all tokens; one entry, all heads
  DType dtype;
  int type;
  int64_t size, sum, group, tokens, key_tokens;
  bool bottom_right;
  std::vector<Sequence> sequences;  // with queries, the longest first
  double flops = 0, scores = 0;     // of all sequences and heads
  const AttentionKernels& kernels = select(attention_levels);

  Call(const TensorView& query, const TensorView& key, const TensorView& value, const TensorView& starts_q,
       const TensorView& starts_k, double scale, double softcap, int64_t left, int64_t right, bool bottom_right)
      : bottom_right(bottom_right) {
    check_rank(kOp, "query", query, 3), check_rank(kOp, "key", key, 3), check_rank(kOp, "value", value, 3);
    type = check_float(kOp, "query", query), dtype = query.dtype();
    size = item_size(dtype), sum = sum_size(dtype);
    AttentionArgs& a = base;
    tokens = query.size(0), key_tokens = key.size(0);
    a.batch = 1, a.heads = query.size(1), a.key_heads = key.size(1);
    a.width = query.size(2), a.value_width = value.size(2);
    a.scale = scale, a.left = left, a.right = right;
    a.softcap = softcap;
    a.query = input("query", query, tokens, a.heads, a.width);
    a.key = input("key", key, key_tokens, a.key_heads, a.width);
    a.value = input("value", value, key_tokens, a.key_heads, a.value_width);
    if (a.key_heads ? a.heads % a.key_heads : a.heads)
      fail(kOp, "key", "a head count that divides the query's", describe(key));
    group = a.key_heads ? a.heads / a.key_heads : 1;
    cut(starts_q, starts_k);
  }

  AttentionTensor input(const char* name, const TensorView& t, int64_t rows, int64_t heads, int64_t width) const {
    if (!t.defined()) return {};
    check_tensor(kOp, name, t, {rows, heads, width}, dtype);
    check_inner(kOp, name, t);
    return {t.data(), 0, t.stride(1), t.stride(0)};
  }

  // Heads [head, head + heads) of a sequence, which share one key head.
  AttentionArgs of(const Sequence& s, int64_t head, int64_t heads) const {
    AttentionArgs a = base;
    a.heads = heads, a.key_heads = 1, a.queries = s.queries, a.keys = a.seen_keys = s.keys;
    a.shift = bottom_right ? s.keys - s.queries : 0;
    const auto move = [](AttentionTensor& t, int64_t row, int64_t h, int64_t bytes) {
      if (t.data) t.data = at(t.data, row * t.row + h * t.h, bytes);
    };
    move(a.query, s.query, head, size), move(a.dout, s.query, head, size), move(a.out, s.query, head, size);
    move(a.dlse, s.query, head, sum);
    move(a.key, s.key, head / group, size), move(a.value, s.key, head / group, size);
    set_splits(a);
    return a;
  }
  // Where numbers of (sequence, head) lie in an array of all tokens and heads.
  int64_t place(const Sequence& s, int64_t head) const { return s.query * base.heads + head * s.queries; }

  template <class Scratch>
  int64_t most(const Scratch& scratch, int64_t heads) const {
    int64_t bytes = 0;
    for (const Sequence& s : sequences) bytes = std::max(bytes, scratch(of(s, 0, heads)));
    return (bytes + 63) / 64 * 64;
  }

 private:
  static std::vector<int64_t> starts(const char* name, const TensorView& t, int64_t count, int64_t tokens) {
    check_tensor(kOp, name, t, {count}, DType::int64);
    std::vector<int64_t> found(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; i++) found[size_t(i)] = t.data<const int64_t>()[i * t.stride(0)];
    for (int64_t i = 0; i < count; i++)
      if (found[size_t(i)] < (i ? found[size_t(i) - 1] : 0) || (!i && found[0]) || found[size_t(i)] > tokens)
        fail(kOp, name, "values that do not decrease, from 0 to at most " + std::to_string(tokens), found[size_t(i)]);
    return found;
  }

  void cut(const TensorView& starts_q, const TensorView& starts_k) {
    check_rank(kOp, "cu_seqlens_q", starts_q, 1);
    if (starts_q.size(0) == 0) fail(kOp, "cu_seqlens_q", "at least 1 element", describe(starts_q));
    const auto q = starts("cu_seqlens_q", starts_q, starts_q.size(0), tokens);
    const auto k = starts("cu_seqlens_k", starts_k, starts_q.size(0), key_tokens);
    int64_t rows = 0;
    for (size_t i = 0; i + 1 < q.size(); i++)
      if (q[i + 1] > q[i]) sequences.push_back({q[i], q[i + 1] - q[i], k[i], k[i + 1] - k[i], 1, 0});
    std::stable_sort(sequences.begin(), sequences.end(), [](const Sequence& a, const Sequence& b) {
      return double(a.queries) * double(a.keys) > double(b.queries) * double(b.keys);
    });
    for (Sequence& s : sequences) {
      const AttentionArgs a = of(s, 0, 1);
      s.splits = a.splits, s.sums = rows;
      rows += base.heads * s.queries * s.splits;
      flops += work(a) * double(base.heads);
      scores += double(s.queries) * double(s.keys) * double(base.heads);
    }
    sum_rows = rows;
  }

 public:
  int64_t sum_rows = 0;  // of all sequences, one a split
};

// rows x bytes to rows `step` bytes apart.
void copy_rows(const void* from, int64_t rows, int64_t bytes, void* to, int64_t step) {
  for (int64_t i = 0; i < rows; i++) std::memcpy(at(to, i, step), at(from, i, bytes), size_t(bytes));
}

}  // namespace

void attention_varlen_backward(const TensorView& dquery, const TensorView& dkey, const TensorView& dvalue,
                               const InputView& dout, const TensorView& dlse, const InputView& query,
                               const InputView& key, const InputView& value, const TensorView& starts_q,
                               const TensorView& starts_k, const InputView& out, const TensorView& stats, double scale,
                               double softcap, int64_t left, int64_t right, bool bottom_right);

}  // namespace mk::cpu

// What the ops of the store's table share on the host side.
#pragma once
#include "common/checks.h"
#include "common/store_table.h"

namespace mk::cpu {

inline store::Table store_table_of(const char* op, const char* name, const TensorView& table) {
  check_rank(op, name, table, 2);
  check_output(op, name, table, {table.size(0), store::kWords}, DType::int64);
  MK_CHECK(table.size(0) > 0, op, name, "at least one bucket", describe(table));
  return {table.data<uint64_t>(), table.size(0)};
}

}  // namespace mk::cpu

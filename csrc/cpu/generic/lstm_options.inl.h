// The table of lstm with options.
#include "cpu/lstm_options.h"

#include "cpu/generic/row_products.inl.h"
#include "cpu/generic/lstm_options_backward.inl.h"

namespace mk::cpu::MK_LEVEL {
namespace {

template <class T>
constexpr int64_t lanes_of() {
  return Vec<acc_t<T>>::kLanes;
}

}  // namespace

const LstmOptionsKernels lstm_options = {
    {lanes_of<double>(), lanes_of<float>(), lanes_of<float>(), lanes_of<float>()},
    {tile_rows(2), tile_rows(2), tile_rows(2), tile_rows(2)},
    MK_FLOAT_TYPES(pack_product),
    MK_FLOAT_TYPES(row_product),
    MK_FLOAT_TYPES(weight_sum),
    MK_FLOAT_TYPES(column_sum),
    MK_FLOAT_TYPES(round_sums),
    MK_FLOAT_TYPES(prepare_options),
    MK_FLOAT_TYPES(draw_mask),
    MK_FLOAT_TYPES(gather_input),
    MK_FLOAT_TYPES(gather_hidden),
    MK_FLOAT_TYPES(start_options),
    MK_FLOAT_TYPES(finish_input),
    MK_FLOAT_TYPES(step_gates),
    MK_FLOAT_TYPES(step_outputs),
    MK_FLOAT_TYPES(step_states),
    MK_FLOAT_TYPES(start_options_backward),
    MK_FLOAT_TYPES(recall),
    MK_FLOAT_TYPES(normalise_products),
    MK_FLOAT_TYPES(arrive),
    MK_FLOAT_TYPES(states_backward),
    MK_FLOAT_TYPES(outputs_backward),
    MK_FLOAT_TYPES(step_gates_backward),
    MK_FLOAT_TYPES(finish_input_backward),
    MK_FLOAT_TYPES(store_input),
};

}  // namespace mk::cpu::MK_LEVEL

// The recurrent family: what the host side (cpu/recurrent*.cpp) and the kernels of a level share.
//
//   z = x W_ih^T + b + h' W_hh^T, then the pointwise step of a cell (generic/<cell>_cell.inl.h)
//
// Weights are packed once a call, in panels of four vectors: the gates of `lanes` hidden units side by side, or four
// vectors of units where a cell has one gate, so that one register tile holds whole cells. Time runs in chunks: the
// input part of z for a chunk is one matrix product into cache-sized scratch, then the steps add the recurrent part.
// All ranks of a team run every step; a rank starts with the same (panel, row tile) units each time and helps others
// with theirs (Deal). Element types: T of the tensors, P of packed operands, A of sums (P = A = float or double, but
// P = bfloat16 on AMX tiles). Operands of products over a chunk may have a form of their own,
// RecurrentFormat::product_bytes long.
//
// A run has lines (steps) of rows. Without lengths they are t and b. With lengths, a row runs several sequences one
// after the other and `slots` says which (t, b) each place of a line is: the time goes by tokens, not by B * T.
#pragma once
#include "cpu/kernels.h"

namespace mk::cpu {

enum class Cell : int { lstm = 0, gru = 1, rnn = 2 };
constexpr int kCells = 3;

// The four vectors of a panel of z and the columns of dz, in vectors of H: lstm i f g o; rnn one gate; gru xn r z hn,
// where the product of the input gives the first three and that of the state the last three.
struct CellShape {
  int64_t gates;     // rows of W / H
  int64_t units;     // vectors of units of a panel
  int64_t saved;     // gates kept for backward
  int64_t columns;   // of dz / H
  int64_t hidden;    // the first vector or column that the product of the state has
  int64_t rotation;  // input gate of vector v: (v + rotation) mod gates
  bool cell_state;   // keeps c besides h
  bool direct;       // h' goes into h besides the product
  MK_INLINE constexpr int64_t vectors() const { return gates * units; }  // of a product
};
constexpr CellShape kShapes[kCells] = {
    {4, 1, 4, 4, 0, 0, true, false}, {3, 1, 4, 4, 1, 2, false, true}, {1, 4, 0, 1, 0, 0, false, false}};
constexpr int64_t kPanelVectors = 4;

struct RecurrentFormat {
  int64_t lanes, pack_bytes, sum_bytes;
  int64_t k_multiple;         // packed operands are zero-filled to a multiple of this along the summed dimension
  int64_t chunk_rows;         // rows (t, b) of a backward chunk, about
  int64_t row_tiles[kCells];  // rows of a unit at most, forward
  int64_t tile;               // the same, backward
  int64_t gate_tile;          // columns of dz of a weight gradient unit at most
  int64_t row_multiple;       // rows that an operand must have in memory: operand tiles are loaded whole
  bool gather;                // the input is always copied into operand form
  int64_t fused_bytes;        // packed weights of a rank up to which a step takes the input part of z along
  // Products over a whole chunk may have their own operands: bytes of an element, rows of a unit and, of the product of
  // the input, vectors of columns of a unit at most. 0: those of the steps, a panel.
  int64_t product_bytes, product_tile, product_vectors;
  MK_INLINE bool matrix_units() const { return pack_bytes == 2 || product_bytes; }
  MK_INLINE int64_t operand_bytes() const { return product_bytes ? product_bytes : pack_bytes; }
  MK_INLINE int64_t product_rows(int64_t step_rows) const { return product_tile ? product_tile : step_rows; }
};

struct Span {
  int64_t begin, end;
};

struct Slot {
  int32_t t, b;  // b < 0: nothing
};

constexpr uint8_t kEnters = 1, kLeaves = 2;  // events of a line: some row's state is replaced before it, kept after it

struct RecurrentRows {
  int64_t T, B;           // of the tensors
  int64_t lines, rows;    // of the run
  bool reverse;           // lines run from the last to the first
  const Slot* slots;      // [lines][rows]; null: slot (l, r) is (l, r)
  const int32_t* alive;   // rows in use by line, the first ones; null: all
  const uint8_t* events;  // by line; null: only the start of the first line and the end of the last one
  const uint8_t* reset;
  int64_t reset_t, reset_b;

  MK_INLINE Slot slot(int64_t l, int64_t r) const { return slots ? slots[l * rows + r] : Slot{int32_t(l), int32_t(r)}; }
  MK_INLINE int64_t at(Slot s) const { return s.t * B + s.b; }
  MK_INLINE int64_t alive_at(int64_t l) const { return alive ? alive[l] : rows; }
  MK_INLINE int64_t first() const { return reverse ? lines - 1 : 0; }
  MK_INLINE int64_t last() const { return reverse ? 0 : lines - 1; }
  MK_INLINE int64_t next(int64_t l) const { return reverse ? l - 1 : l + 1; }
  MK_INLINE int64_t previous(int64_t l) const { return reverse ? l + 1 : l - 1; }
  MK_INLINE bool resets(Slot s) const { return reset && reset[s.t * reset_t + s.b * reset_b]; }
  // Lines of a schedule run forwards.
  MK_INLINE bool starts(int64_t l, int64_t r) const {
    return l == first() || (slots && slots[(l - 1) * rows + r].b != slots[l * rows + r].b);
  }
  MK_INLINE bool ends(int64_t l, int64_t r) const {
    return l == last() || (slots && slots[(l + 1) * rows + r].b != slots[l * rows + r].b);
  }
  MK_INLINE bool event(int64_t l, uint8_t kind) const {
    return events ? events[l] & kind : l == (kind == kEnters ? first() : last());
  }
};

// A state that is given from outside: at the start of a sequence, and at resets (null there: zeros).
struct GivenState {
  const void *initial, *reset;
  int64_t initial_b, reset_t, reset_b;
};

struct RecurrentForward {
  RecurrentRows rows;
  Cell cell;
  bool relu;  // rnn: not tanh
  int64_t I, H;
  const void *input, *weight_ih, *weight_hh, *bias_ih, *bias_hh;
  int64_t input_t, input_b, weight_ih_n, weight_hh_n;
  GivenState hidden0, carry0;                // carry: c of lstm, h in the precision of sums of gru
  void *output, *h_n, *c_n, *cells, *gates;  // contiguous; all but output and h_n may be null

  int64_t panels, k_input, k_hidden, ld_x, ld_hidden, chunk;  // chunk: rows that `projected` holds for a panel
  void *packed_ih, *packed_hh;                                // P [panels][k][vectors of a product * lanes]
  void *bias, *projected;                                     // A [panels][4 lanes], A [panels][chunk][4 lanes]
  void* x;          // P [chunk][ld_x], or null: the input itself is the operand
  void* hidden[2];  // P [rows][ld_hidden]: state entering a step, even and odd steps
  void* carry;      // A [rows][ld_hidden]: carry entering the next step
  bool fused;       // a step adds the input part of z itself: neither `projected` nor `x` is used

  // Where the output is known and only cells and gates are wanted (output and h_n are null), steps wait for nothing:
  const void* known_output;
  void *known, *z;  // P [chunk][ld_hidden]: states entering the steps of a chunk; A [panels][chunk][4 lanes]
};

struct RecurrentBackward {
  RecurrentRows rows;
  Cell cell;
  bool relu;
  int64_t I, H;
  const void *input, *weight_ih, *weight_hh, *output, *states, *gates;  // states: cells of lstm, else output
  int64_t input_t, input_b, weight_ih_n, weight_hh_n;
  GivenState hidden0, state0;
  const void *doutput, *dh_n, *dc_n, *dcells;  // null: absent
  int64_t doutput_t, doutput_b, dh_n_b, dc_n_b, dcells_t, dcells_b;
  // Contiguous; null: not needed.
  void *dinput, *dh0, *dc0, *dweight_ih, *dweight_hh, *dbias_ih, *dbias_hh, *dreset_h, *dreset_c;

  int64_t k_gates, ld_gates, ld_hidden, chunk;  // chunk: rows of a dz buffer
  void *packed_ih, *packed_hh;                  // P [panels][k_gates][2 lanes]
  void* dz[2];                                  // P [chunk][ld_gates], even and odd chunks
  void *dh, *dc;                                // A [rows][ld_hidden]: gradients that flow to the step before
  // A [gates H][I], [gates H][H], [columns H]: of the chunks so far; the outputs themselves if T is A.
  void *sum_ih, *sum_hh, *sum_bias;
  // Where the kernels have `arrange`, in operand form: dz of a chunk as left operand of the weight gradients, [panels]
  // [chunk][2 lanes], x and hidden states as right operand, and, where dz itself is none, dz as left operand of dx.
  void *transposed, *operand, *left;

  MK_INLINE const CellShape& shape() const { return kShapes[int(cell)]; }
  MK_INLINE int64_t columns() const { return shape().columns * H; }
  MK_INLINE int64_t gate_rows() const { return shape().gates * H; }
  MK_INLINE int64_t hidden_column() const { return shape().hidden * H; }
  // Columns of dz [0, gate_rows) belong to the input, [hidden_column, columns) to the state: the row of W of a column.
  MK_INLINE int64_t input_row(int64_t column) const {
    const int64_t row = column + shape().rotation * H;
    return row < gate_rows() ? row : row - gate_rows();
  }
  MK_INLINE bool first_chunk(Span lines) const { return rows.reverse ? lines.begin == 0 : lines.end == rows.lines; }
};

// Units of a phase between two barriers, dealt to the ranks in equal spans. A rank goes through its own from the front;
// when it is done it takes from the back of another that has several left, whose core is slow now: a neighbour on the
// same core halves it, and more on tiles. Who computes a unit changes no bit of it.
class Deal {
 public:
  static constexpr int64_t kWords = 8, kFew = 12;  // words of a rank: a cache line
  MK_INLINE Deal(int64_t units, int rank, int size, uint64_t* left, bool back = false)
      : units_(units), rank_(rank), size_(size), left_(left), back_(back) {
    // The word is used up until now: before this store nobody takes from it. Few units are not worth locked
    // instructions.
    if (count(rank) < kFew)
      mine_ = {0, count(rank)};
    else
      __atomic_store_n(word(rank), uint64_t(count(rank)) << 32, __ATOMIC_RELEASE);
  }
  // The next unit, or -1. A rank takes half of what it has left at once: a locked instruction waits for all stores. At
  // least `spare` units of others are left to them: their weights are not in this core's cache.
  MK_INLINE int64_t next(int64_t spare = 2) {
    if (mine_.begin < mine_.end) return unit(rank_, mine_.begin++);
    for (int i = 0; i < size_; i++) {
      const int from = rank_ + i < size_ ? rank_ + i : rank_ + i - size_;
      const bool own = i == 0;
      uint64_t seen = __atomic_load_n(word(from), __ATOMIC_ACQUIRE);
      for (;;) {
        const int64_t begin = int64_t(uint32_t(seen)), end = int64_t(seen >> 32), left = end - begin;
        if (left <= (own ? 0 : spare)) break;
        const int64_t taken = own ? (left + 1) / 2 : 1;
        const uint64_t rest = own ? seen + uint64_t(taken) : seen - (uint64_t(1) << 32);
        if (!__atomic_compare_exchange_n(word(from), &seen, rest, true, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) continue;
        if (!own) return unit(from, end - 1);
        mine_ = {begin + 1, begin + taken};
        return unit(rank_, begin);
      }
    }
    return -1;
  }
  MK_INLINE int64_t share() const { return count(rank_); }

 private:
  MK_INLINE uint64_t* word(int rank) const { return left_ + rank * kWords; }
  MK_INLINE int64_t first(int rank) const { return units_ * rank / size_; }
  MK_INLINE int64_t count(int rank) const { return first(rank + 1) - first(rank); }
  MK_INLINE int64_t unit(int rank, int64_t i) const { return back_ ? first(rank + 1) - 1 - i : first(rank) + i; }

  const int64_t units_;
  const int rank_, size_;
  uint64_t* const left_;
  const bool back_;  // every other line backwards, so that the weights that the second cache kept are read before
                     // others push them out
  Span mine_{0, 0};  // taken, not begun
};

// What depends on the cell.
struct CellKernels {
  void (*pack[kFloatTypes])(const RecurrentForward&, Span panels);
  void (*start[kFloatTypes])(const RecurrentForward&, Span rows);
  void (*project[kFloatTypes])(const RecurrentForward&, Span lines, Span units);
  void (*step[kFloatTypes])(const RecurrentForward&, int64_t line, int64_t row, int64_t parity, Deal units);
  void (*recall[kFloatTypes])(const RecurrentForward&, Span lines, Span panels);  // all steps of known states
  void (*gates_backward[kFloatTypes])(const RecurrentBackward&, int64_t line, void* dz, Span units);  // dz of a line
};

struct RecurrentKernels {
  RecurrentFormat format[kFloatTypes];
  CellKernels cell[kCells];
  void (*gather[kFloatTypes])(const RecurrentForward&, Span lines, Span rows);
  void (*gather_known[kFloatTypes])(const RecurrentForward&, Span lines, Span rows);

  void (*pack_backward[kFloatTypes])(const RecurrentBackward&, Span panels);  // those of weight_hh, then weight_ih
  void (*start_backward[kFloatTypes])(const RecurrentBackward&, Span rows);
  void (*state_backward[kFloatTypes])(const RecurrentBackward&, int64_t line, const void* dz, Span units);
  // Brings the operands of the weight gradients into order; null: not needed.
  void (*arrange[kFloatTypes])(const RecurrentBackward&, Span lines, const void* dz, void* scratch, Span units);
  void (*input_backward[kFloatTypes])(const RecurrentBackward&, Span lines, const void* dz, Span units);
  void (*bias_backward[kFloatTypes])(const RecurrentBackward&, Span lines, const void* dz, Span columns);
  void (*weight_backward[kFloatTypes])(const RecurrentBackward&, Span lines, const void* dz, void* scratch, Span units);
  void (*finish_backward[kFloatTypes])(const RecurrentBackward&, Span gates);
};
MK_KERNELS_AMX(RecurrentKernels, recurrent)

// Row tiles of nearly equal size, none above `most`.
MK_INLINE int64_t tiles_of(int64_t rows, int64_t most) { return (rows + most - 1) / most; }
MK_INLINE Span tile_of(int64_t rows, int64_t tiles, int64_t i) { return {rows * i / tiles, rows * (i + 1) / tiles}; }
MK_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
MK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
// The order in which a rank goes through its units: every other line backwards, so that the weights that the second
// cache kept are read before others push them out.
struct Sweep {
  Span units;
  bool back;
  MK_INLINE int64_t count() const { return units.end - units.begin; }
  MK_INLINE int64_t operator[](int64_t i) const { return back ? units.end - 1 - i : units.begin + i; }
};
MK_INLINE Span clip(Span rows, int64_t end) { return {smaller(rows.begin, end), smaller(rows.end, end)}; }

}  // namespace mk::cpu

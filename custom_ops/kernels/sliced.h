// The packed sparse matrix that the product's kernels read: slices of rows, cut into tiles of
// columns.
//
// A kernel is fast when the activations that it reads stay in the L1 cache, when the sums stay in
// registers, and when its loops are long and end where the processor expects them to. So the
// columns are cut into tiles; in each tile the rows are sorted by their number of non-zeros, and
// grouped `height` at a time into slices whose rows, being about equally long, run in step. After
// SELL-C-σ: M. Kreutzer et al., SIAM J. Sci. Comput. 36(5), 2014.
#pragma once

#include <cstdint>
#include <string>

namespace accel_tf {

// A chunk of rows is what one thread works on at a time, and what its sums must find room for.
constexpr int kMaxChunkRows = 512;

// A tile of columns, `kMaxWidth` batch rows wide, should fit the L1 cache; it must fit the L2
// cache.
constexpr int kMaxTile = 4096;

// Slices have 4 rows, or as many as this.
constexpr int kTallest = 16;

// A view of a matrix of `rows` outputs × `cols` inputs, made by ReadPlan.
//
//   chunk c    the rows [chunk_rows[c], chunk_rows[c + 1])
//   tile t     the columns [t · tile, (t + 1) · tile)
//   slice s    `height` rows of one chunk, in one tile. (c, t) has the slices from
//              slice_starts[c · tiles + t] up to that of the next (c, t).
//   step       one non-zero of each row of a slice: slice s has the steps from step_starts[s] up to
//              step_starts[s + 1].
//
// Lane r of slice s belongs to row slice_rows[s · height + r], counted from the start of its chunk;
// as many as the chunk has rows means that the lane has none. Step p multiplies lane r by the value
// at p · height + r, and the column at p · height + r too or, if `shared`, at p: then the rows of a
// slice have all their columns in common, and are a block row. Columns count from the start of
// their tile; `tile` itself stands for a column of zeros, with which short rows are padded.
struct Sliced {
  int64_t rows = 0, cols = 0;
  int64_t tile = 1, tiles = 0, chunks = 0, slices = 0;
  int height = 4;
  bool shared = false;
  const int32_t* chunk_rows = nullptr;    // chunks + 1
  const int32_t* slice_starts = nullptr;  // chunks · tiles + 1
  const int32_t* step_starts = nullptr;   // slices + 1
  const int32_t* slice_rows = nullptr;    // slices · height
  const uint16_t* columns = nullptr;      // steps() · (shared ? 1 : height)
  // steps() · height weights, as one of the two; none where only the pattern counts.
  const float* values = nullptr;
  const int8_t* int8_values = nullptr;

  int64_t steps() const { return step_starts[slices]; }
  int64_t columns_per_step() const { return shared ? 1 : height; }
  // The number of columns before those of `chunk`.
  int64_t columns_before(int64_t chunk) const {
    return step_starts[slice_starts[chunk * tiles]] * columns_per_step();
  }
  int64_t rows_of(int64_t chunk) const { return chunk_rows[chunk + 1] - chunk_rows[chunk]; }
};

// Returns "" when there can be a matrix of that form, and a sentence otherwise.
std::string CheckForm(int64_t rows, int64_t cols, int64_t height, bool shared);

// Fills everything of `matrix` but the values, given a form that passes CheckForm, from a plan
//   tile, chunks, slices | chunk_rows | slice_starts | step_starts | slice_rows
// of `plan_size` integers and `columns_size` columns. Returns "" or, where the plan is not one, a
// sentence with the first offending position, what stands there and what was expected. Reads no
// column.
std::string ReadPlan(const int32_t* plan, int64_t plan_size, const uint16_t* columns,
                     int64_t columns_size, Sliced* matrix);

// Returns "" when the columns of `chunk` lie in [0, tile]; otherwise a sentence, as above.
std::string CheckColumns(const Sliced& matrix, int64_t chunk);

}  // namespace accel_tf

// Reads and checks plans.
#include "kernels/sliced.h"

namespace accel_tf {
namespace {

std::string At(const char* array, int64_t position, int64_t value, const std::string& expected) {
  return std::string(array) + "[" + std::to_string(position) + "] = " + std::to_string(value) +
         ", expected " + expected;
}

std::string Range(int64_t low, int64_t high) {
  return "a value from " + std::to_string(low) + " to " + std::to_string(high);
}

// Cuts the plan into its arrays, and checks them in the order in which they depend on each other.
class PlanReader {
 public:
  PlanReader(const int32_t* plan, int64_t size) : plan_(plan), size_(size) {}

  std::string Read(Sliced* m, const uint16_t* columns, int64_t columns_size) {
    if (size_ < 3) {
      return "plan has " + std::to_string(size_) + " elements, expected at least 3";
    }
    if (plan_[0] < 1 || plan_[0] > kMaxTile) return At("plan", 0, plan_[0], Range(1, kMaxTile));
    if (plan_[1] < 0) return At("plan", 1, plan_[1], "a number of chunks, not negative");
    if (plan_[2] < 0) return At("plan", 2, plan_[2], "a number of slices, not negative");
    m->tile = plan_[0];
    m->chunks = plan_[1];
    m->slices = plan_[2];
    m->tiles = m->cols / m->tile + (m->cols % m->tile != 0);
    next_ = 3;
    // None of these overflow: chunks and slices have 31 bits, and tiles, as cols, at most 31.
    m->chunk_rows = Take(m->chunks + 1);
    m->slice_starts = Take(m->chunks * m->tiles + 1);
    m->step_starts = Take(m->slices + 1);
    m->slice_rows = Take(m->slices * m->height);
    if (next_ != size_) {
      return "plan has " + std::to_string(size_) + " elements, expected " + std::to_string(next_) +
             " for " + std::to_string(m->chunks) + " chunks, " + std::to_string(m->tiles) +
             " tiles and " + std::to_string(m->slices) + " slices of " + std::to_string(m->height) +
             " rows";
    }
    std::string fault =
        Steps(m->chunk_rows, m->chunks, 1, kMaxChunkRows, m->rows, "the number of outputs");
    if (fault.empty()) {
      fault = Steps(m->slice_starts, m->chunks * m->tiles, 0, INT32_MAX, m->slices,
                    "the number of slices");
    }
    if (fault.empty()) {
      const int64_t last = columns_size / m->columns_per_step();
      fault = Steps(m->step_starts, m->slices, 0, INT32_MAX, last,
                    "the number of steps that columns has");
    }
    if (!fault.empty()) return fault;
    if (columns_size % m->columns_per_step() != 0) {
      return "columns has " + std::to_string(columns_size) + " elements, expected a multiple of " +
             std::to_string(m->height);
    }
    m->columns = columns;
    return Rows(*m);
  }

 private:
  const int32_t* Take(int64_t count) {
    const int32_t* array = next_ <= size_ ? plan_ + next_ : nullptr;
    next_ += count;
    return array;
  }

  // The array runs from 0 to `last` in `count` steps of `least` to `most`.
  std::string Steps(const int32_t* array, int64_t count, int64_t least, int64_t most, int64_t last,
                    const char* meaning) const {
    const int64_t offset = array - plan_;
    if (array[0] != 0) return At("plan", offset, array[0], "0");
    for (int64_t i = 0; i < count; ++i) {
      const int64_t step = int64_t{array[i + 1]} - array[i];
      if (step < least || step > most) {
        return At("plan", offset + i + 1, array[i + 1],
                  std::to_string(least) + " to " + std::to_string(most) + " more than plan[" +
                      std::to_string(offset + i) + "] = " + std::to_string(array[i]));
      }
    }
    if (array[count] == last) return "";
    return At("plan", offset + count, array[count],
              std::string(meaning) + ", " + std::to_string(last));
  }

  std::string Rows(const Sliced& m) const {
    for (int64_t c = 0; c < m.chunks; ++c) {
      const int64_t begin = m.slice_starts[c * m.tiles] * int64_t{m.height};
      const int64_t end = m.slice_starts[(c + 1) * m.tiles] * int64_t{m.height};
      const uint32_t limit = static_cast<uint32_t>(m.rows_of(c));
      // Branch-free, so that it vectorizes: as unsigned, a negative row is a large one.
      uint32_t outside = 0;
      for (int64_t i = begin; i < end; ++i) {
        outside |= static_cast<uint32_t>(m.slice_rows[i]) > limit;
      }
      if (!outside) continue;
      int64_t i = begin;
      while (static_cast<uint32_t>(m.slice_rows[i]) <= limit) ++i;
      return At("plan", m.slice_rows - plan_ + i, m.slice_rows[i], Range(0, limit));
    }
    return "";
  }

  const int32_t* plan_;
  int64_t size_;
  int64_t next_ = 0;
};

}  // namespace

std::string CheckForm(int64_t rows, int64_t cols, int64_t height, bool shared) {
  if (rows < 0 || rows > INT32_MAX || cols < 0 || cols > INT32_MAX) {
    return "out_features = " + std::to_string(rows) + " and in_features = " + std::to_string(cols) +
           ", expected " + Range(0, INT32_MAX);
  }
  if (height == 4 || (height == kTallest && shared)) return "";
  return "height = " + std::to_string(height) + " and shared = " + (shared ? "true" : "false") +
         ", expected a height of 4, or of 16 where columns are shared";
}

std::string ReadPlan(const int32_t* plan, int64_t plan_size, const uint16_t* columns,
                     int64_t columns_size, Sliced* matrix) {
  return PlanReader(plan, plan_size).Read(matrix, columns, columns_size);
}

std::string CheckColumns(const Sliced& m, int64_t chunk) {
  const int64_t end = m.columns_before(chunk + 1);
  for (int64_t p = m.columns_before(chunk); p < end; ++p) {
    if (m.columns[p] > m.tile) return At("columns", p, m.columns[p], Range(0, m.tile));
  }
  return "";
}

}  // namespace accel_tf

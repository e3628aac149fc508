// Tests of the kernels without TensorFlow: every instruction set of the host, sizes around the
// edges of vectors and tiles, misaligned arrays, any split over threads; against sums in double
// precision. Arrays are allocated at their exact size, so that AddressSanitizer sees one float too
// many.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "kernels/sparse_matmul.h"

namespace accel_tf {
namespace {

int failures = 0;

#define EXPECT(condition, ...)                                    \
  do {                                                            \
    if (!(condition)) {                                           \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
      if (++failures > 20) std::exit(1);                          \
    }                                                             \
  } while (false)

// `size` elements that begin `offset` elements after an aligned address, and end where the heap
// block ends.
template <class T>
class Array {
 public:
  Array(int64_t size, int offset) : size_(size), offset_(offset), block_(new T[size + offset]()) {}
  T* data() { return block_.get() + offset_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data()[i]; }

 private:
  int64_t size_;
  int offset_;
  std::unique_ptr<T[]> block_;
};

struct Problem {
  int64_t batch, cols, rows;
  Array<int64_t> pointers;
  Array<int32_t> columns;
  Array<float> values, x, dy;
  Csr csr;

  // Row n is empty when n % 5 == 2; columns are unsorted and may repeat.
  Problem(int64_t batch, int64_t cols, int64_t rows, int64_t per_row, int offset, int seed)
      : batch(batch),
        cols(cols),
        rows(rows),
        pointers(rows + 1, 0),
        columns(Count(cols, rows, per_row), offset),
        values(columns.size(), offset),
        x(batch * cols, offset),
        dy(batch * rows, offset) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (int64_t n = 0; n < rows; ++n) pointers[n + 1] = Count(cols, n + 1, per_row);
    for (int64_t p = 0; p < columns.size(); ++p) {
      columns[p] = static_cast<int32_t>(random() % cols);
      values[p] = normal(random);
    }
    for (int64_t i = 0; i < x.size(); ++i) x[i] = normal(random);
    for (int64_t i = 0; i < dy.size(); ++i) dy[i] = normal(random);
    csr = {rows, cols, columns.size(), pointers.data(), columns.data(), values.data()};
  }

  static int64_t Count(int64_t cols, int64_t rows, int64_t per_row) {
    return cols == 0 ? 0 : per_row * (rows - (rows + 2) / 5);
  }
};

void Serial(int64_t total, int64_t, const Work& work) {
  if (total > 0) work(0, total);
}

// Each unit by itself, last first: the most different split from `Serial` that there is.
void OneByOneBackwards(int64_t total, int64_t, const Work& work) {
  for (int64_t i = total; i-- > 0;) work(i, i + 1);
}

ParallelFor Threads(int count) {
  return [count](int64_t total, int64_t, const Work& work) {
    std::vector<std::thread> threads;
    for (int t = 0; t < count; ++t) {
      const int64_t begin = total * t / count, end = total * (t + 1) / count;
      if (begin < end) threads.emplace_back(work, begin, end);
    }
    for (std::thread& thread : threads) thread.join();
  };
}

// |got - want| within 1e-5 of the sum of the magnitudes that were added.
bool Near(float got, double want, double magnitude) {
  return std::abs(got - want) <= 1e-5 * magnitude;
}

void CheckProducts(const Kernels& kernels, Problem& p, int offset, const ParallelFor& parallel_for,
                   std::vector<float>* results) {
  char shape[160];
  std::snprintf(shape, sizeof shape, "%s, batch %ld, %ld x %ld, nnz %ld, offset %d", kernels.name,
                long(p.batch), long(p.cols), long(p.rows), long(p.csr.nonzeros), offset);
  const float nan = std::numeric_limits<float>::quiet_NaN();

  Array<float> y(p.batch * p.rows, offset);
  Array<float> scratch(MultiplyScratch(p.csr, p.batch), offset);
  std::fill_n(y.data(), y.size(), nan);  // an output that is not written shows
  std::fill_n(scratch.data(), scratch.size(), nan);
  Multiply(kernels, p.csr, p.x.data(), p.batch, y.data(), scratch.data(), parallel_for);
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t n = 0; n < p.rows; ++n) {
      double want = 0, magnitude = 0;
      for (int64_t i = p.pointers[n]; i < p.pointers[n + 1]; ++i) {
        const double term = double(p.values[i]) * p.x[b * p.cols + p.columns[i]];
        want += term;
        magnitude += std::abs(term);
      }
      const float got = y[b * p.rows + n];
      EXPECT(Near(got, want, magnitude), "y[%ld, %ld] = %g, not %g (%s)", long(b), long(n), got,
             want, shape);
    }
  }

  Array<float> d(p.csr.nonzeros, offset);
  Array<float> sampled_scratch(PackedSize(p.batch, p.rows) + PackedSize(p.batch, p.cols), offset);
  std::fill_n(d.data(), d.size(), nan);
  std::fill_n(sampled_scratch.data(), sampled_scratch.size(), nan);
  MultiplySampled(kernels, p.csr, p.dy.data(), p.x.data(), p.batch, d.data(),
                  sampled_scratch.data(), parallel_for);
  for (int64_t n = 0; n < p.rows; ++n) {
    for (int64_t i = p.pointers[n]; i < p.pointers[n + 1]; ++i) {
      double want = 0, magnitude = 0;
      for (int64_t b = 0; b < p.batch; ++b) {
        const double term = double(p.dy[b * p.rows + n]) * p.x[b * p.cols + p.columns[i]];
        want += term;
        magnitude += std::abs(term);
      }
      EXPECT(Near(d[i], want, magnitude), "d[%ld] = %g, not %g (%s)", long(i), d[i], want, shape);
    }
  }

  results->assign(y.data(), y.data() + y.size());
  results->insert(results->end(), d.data(), d.data() + d.size());
}

void TestProducts() {
  const int64_t batches[] = {0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40, 65};
  const int64_t sizes[][3] = {{1, 1, 1},    {7, 3, 2},    {8, 16, 8},  {9, 17, 7}, {31, 15, 9},
                              {33, 33, 16}, {64, 40, 17}, {5, 100, 1}, {0, 6, 0},  {6, 0, 0},
                              {0, 0, 0},    {12, 31, 0},  {40, 5, 33}};
  int seed = 0;
  for (const Kernels* kernels : AvailableKernels()) {
    for (const auto& size : sizes) {
      for (const int64_t batch : batches) {
        const int offset = seed % 4;
        Problem p(batch, size[0], size[1], size[2], offset, ++seed);
        std::vector<float> first, other;
        CheckProducts(*kernels, p, offset, Serial, &first);
        const ParallelFor splits[] = {OneByOneBackwards, Threads(2), Threads(4)};
        for (const ParallelFor& split : splits) {
          CheckProducts(*kernels, p, offset, split, &other);
          EXPECT(first.size() == other.size() &&
                     std::equal(first.begin(), first.end(), other.begin(),
                                [](float a, float b) { return !std::memcmp(&a, &b, sizeof a); }),
                 "bits differ with the split (%s, batch %ld, %ld x %ld)", kernels->name,
                 long(batch), long(size[0]), long(size[1]));
        }
      }
    }
  }
}

// NaN and infinity reach the outputs that depend on them, and no other.
void TestSpecialValues() {
  for (const Kernels* kernels : AvailableKernels()) {
    for (const int64_t batch : {1, 2, 33}) {
      Problem p(batch, 20, 18, 6, 1, 99);
      const int64_t last = batch - 1;
      p.x[last * p.cols + 5] = std::numeric_limits<float>::infinity();
      p.x[last * p.cols + 6] = std::numeric_limits<float>::quiet_NaN();
      Array<float> y(batch * p.rows, 0), scratch(MultiplyScratch(p.csr, batch), 0);
      Multiply(*kernels, p.csr, p.x.data(), batch, y.data(), scratch.data(), Serial);
      for (int64_t i = 0; i < y.size(); ++i) {
        const int64_t n = i % p.rows;
        bool touched = false;
        for (int64_t j = p.pointers[n]; j < p.pointers[n + 1]; ++j)
          touched |= p.columns[j] == 5 || p.columns[j] == 6;
        EXPECT(std::isfinite(y[i]) == !(touched && i / p.rows == last),
               "y[%ld] = %g (%s, batch %ld)", long(i), y[i], kernels->name, long(batch));
      }
    }
  }
}

void TestTranspose() {
  Problem p(1, 13, 21, 4, 0, 7);
  Array<int64_t> pointers(p.cols + 1, 0);
  Array<int32_t> columns(p.csr.nonzeros, 0);
  Array<float> values(p.csr.nonzeros, 0);
  const Csr t = Transpose(p.csr, pointers.data(), columns.data(), values.data());
  EXPECT(Check(t, Serial).empty(), "%s", Check(t, Serial).c_str());
  std::vector<double> dense(p.rows * p.cols), transposed(p.rows * p.cols);
  for (int64_t n = 0; n < p.rows; ++n)
    for (int64_t i = p.pointers[n]; i < p.pointers[n + 1]; ++i)
      dense[n * p.cols + p.columns[i]] += p.values[i];
  for (int64_t k = 0; k < p.cols; ++k)
    for (int64_t i = pointers[k]; i < pointers[k + 1]; ++i) {
      transposed[columns[i] * p.cols + k] += values[i];
      EXPECT(i == pointers[k] || columns[i - 1] <= columns[i], "row %ld is not sorted", long(k));
    }
  EXPECT(dense == transposed, "the transpose holds other values");
}

void ExpectFault(const Csr& csr, const char* want) {
  for (const ParallelFor& split :
       {ParallelFor(Serial), ParallelFor(OneByOneBackwards), Threads(3)}) {
    const std::string got = Check(csr, split);
    EXPECT(got.find(want) != std::string::npos, "\"%s\" lacks \"%s\"", got.c_str(), want);
  }
}

void TestCheck() {
  const int64_t good[] = {0, 2, 2, 4};
  const int32_t columns[] = {0, 4, 1, 2};
  const float values[] = {1, 2, 3, 4};
  Csr csr{3, 5, 4, good, columns, values};
  EXPECT(Check(csr, Serial).empty(), "a good matrix is refused");

  const int64_t starts_late[] = {1, 2, 2, 4};
  csr.row_pointers = starts_late;
  ExpectFault(csr, "row_pointers[0] = 1, expected 0");
  const int64_t steps_back[] = {0, 3, 2, 4};
  csr.row_pointers = steps_back;
  ExpectFault(csr, "row_pointers[2] = 2 is less than row_pointers[1] = 3");
  const int64_t leaps[] = {0, int64_t{1} << 62, 2, 4};
  csr.row_pointers = leaps;
  ExpectFault(csr, "row_pointers[2] = 2 is less than");
  const int64_t ends_late[] = {0, 2, 2, 5};
  csr.row_pointers = ends_late;
  ExpectFault(csr, "row_pointers[3] = 5, expected the number of values, 4");
  const int64_t negative[] = {0, -1, 2, 4};
  csr.row_pointers = negative;
  ExpectFault(csr, "row_pointers[1] = -1 is less than row_pointers[0] = 0");

  csr.row_pointers = good;
  const int32_t too_large[] = {0, 4, 5, 9};
  csr.columns = too_large;
  ExpectFault(csr, "columns[2] = 5, expected a value in [0, 5)");
  const int32_t below[] = {0, 4, 1, INT32_MIN};
  csr.columns = below;
  ExpectFault(csr, "columns[3] = -2147483648");
  csr.columns = columns;
  csr.cols = 0;
  ExpectFault(csr, "columns[0] = 0, expected a value in [0, 0)");
  csr.cols = int64_t{1} << 40;
  csr.columns = below;
  ExpectFault(csr, "columns[3] = -2147483648");
}

void TestChoice() {
  std::string error;
  for (const Kernels* kernels : AvailableKernels()) {
    EXPECT(FindKernels(kernels->name, &error) == kernels, "%s", kernels->name);
  }
  EXPECT(FindKernels(nullptr, &error) == AvailableKernels().back(), "the default is not the best");
  EXPECT(FindKernels("auto", &error) == AvailableKernels().back(), "auto is not the best");
  EXPECT(FindKernels("mmx", &error) == nullptr && error.find("scalar") != std::string::npos, "%s",
         error.c_str());
  EXPECT(PackedSize(int64_t{1} << 40, int64_t{1} << 40) == -1, "an overflow is not seen");
}

}  // namespace
}  // namespace accel_tf

int main() {
  for (const accel_tf::Kernels* kernels : accel_tf::AvailableKernels())
    std::printf("testing %s\n", kernels->name);
  accel_tf::TestCheck();
  accel_tf::TestChoice();
  accel_tf::TestTranspose();
  accel_tf::TestProducts();
  accel_tf::TestSpecialValues();
  std::printf("%d failures\n", accel_tf::failures);
  return accel_tf::failures != 0;
}

// Tests of the product of two sparse matrices without TensorFlow: against sums in double precision,
// for any number of threads and any split, with columns unsorted and repeated, up to the largest.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <random>

#include "kernels/gustavson.h"
#include "tests/testing.h"

namespace accel_tf {
namespace {

// A random matrix in CSR. Row i is empty when i % 5 == 2, and ten times as long when i % 11 == 3;
// columns are unsorted, may repeat, and lie in [first, cols).
struct Matrix {
  Array<int64_t> pointers;
  std::vector<int32_t> columns;
  std::vector<float> values;
  int64_t cols;

  Matrix(int64_t rows, int64_t cols, int64_t per_row, int seed, int64_t first = 0)
      : pointers(rows + 1, 0), cols(cols) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t length = cols == 0 || i % 5 == 2 ? 0 : i % 11 == 3 ? 10 * per_row : per_row;
      for (int64_t p = 0; p < length; ++p) {
        columns.push_back(static_cast<int32_t>(first + random() % (cols - first)));
        values.push_back(normal(random));
      }
      pointers[i + 1] = static_cast<int64_t>(columns.size());
    }
    columns.shrink_to_fit();
    values.shrink_to_fit();
  }

  Csr csr() {
    return {pointers.size() - 1, cols,           static_cast<int64_t>(columns.size()),
            pointers.data(),     columns.data(), values.data()};
  }
};

struct Product {
  std::vector<int64_t> pointers;
  std::vector<int32_t> columns;
  std::vector<float> values;

  Product(const Csr& a, const Csr& b, int threads, const ParallelFor& parallel_for)
      : pointers(a.rows + 1, -1) {
    SparseProduct product(a, b);
    const std::string fault = product.Plan(threads);
    EXPECT(fault.empty(), "%s", fault.c_str());
    product.Count(pointers.data(), parallel_for);
    columns.assign(pointers.back(), -1);
    values.assign(pointers.back(), NAN);
    product.Fill(pointers.data(), columns.data(), values.data(), parallel_for);
  }

  bool SameBits(const Product& other) const {
    return pointers == other.pointers && columns == other.columns &&
           values.size() == other.values.size() &&
           (values.empty() ||
            std::memcmp(values.data(), other.values.data(), values.size() * sizeof(float)) == 0);
  }
};

void ExpectProduct(const Csr& a, const Csr& b, const Product& c, const char* what) {
  EXPECT(c.pointers[0] == 0, "row_pointers[0] = %ld (%s)", long(c.pointers[0]), what);
  for (int64_t i = 0; i < a.rows; ++i) {
    struct Sum {
      double value = 0, magnitude = 0;
    };
    std::map<int32_t, Sum> row;  // in the order of columns, as that of C must be
    for (int64_t p = a.row_pointers[i]; p < a.row_pointers[i + 1]; ++p) {
      const int32_t k = a.columns[p];
      for (int64_t q = b.row_pointers[k]; q < b.row_pointers[k + 1]; ++q) {
        const double term = double(a.values[p]) * b.values[q];
        row[b.columns[q]].value += term;
        row[b.columns[q]].magnitude += std::abs(term);
      }
    }
    const int64_t length = c.pointers[i + 1] - c.pointers[i];
    EXPECT(length == int64_t(row.size()), "row %ld has %ld columns, not %ld (%s)", long(i),
           long(length), long(row.size()), what);
    if (length != int64_t(row.size())) return;
    int64_t out = c.pointers[i];
    for (const auto& [column, sum] : row) {
      EXPECT(c.columns[out] == column, "row %ld: column %d, not %d (%s)", long(i), c.columns[out],
             column, what);
      EXPECT(std::abs(c.values[out] - sum.value) <= 1e-5 * sum.magnitude,
             "C[%ld, %d] = %g, not %g (%s)", long(i), column, c.values[out], sum.value, what);
      ++out;
    }
  }
}

void TestProducts() {
  const int64_t shapes[][4] = {// rows of A, of B, columns of B, non-zeros per row
                               {1, 1, 1, 1},     {3, 7, 64, 2},       {17, 9, 65, 3},
                               {40, 33, 128, 5}, {12, 20, 4097, 40},  {60, 50, 40, 20},
                               {0, 5, 5, 2},     {5, 0, 5, 2},        {5, 5, 0, 2},
                               {0, 0, 0, 1},     {200, 300, 9000, 9}, {30, 30, INT32_MAX, 4}};
  int seed = 0;
  for (const auto& shape : shapes) {
    Matrix a(shape[0], shape[1], shape[3], ++seed), b(shape[1], shape[2], shape[3], ++seed);
    char what[80];
    std::snprintf(what, sizeof what, "%ld x %ld x %ld, %ld per row", long(shape[0]), long(shape[1]),
                  long(shape[2]), long(shape[3]));
    const Product one(a.csr(), b.csr(), 1, Serial);
    ExpectProduct(a.csr(), b.csr(), one, what);
    for (const int threads : {2, 3, 64}) {
      const ParallelFor splits[] = {Serial, OneByOneBackwards, Threads(threads)};
      for (const ParallelFor& split : splits) {
        const Product other(a.csr(), b.csr(), threads, split);
        EXPECT(one.SameBits(other), "bits differ with %d threads (%s)", threads, what);
      }
    }
  }
}

// Enough work for several threads, with half of it in one row in eleven.
void TestThreads() {
  Matrix a(900, 800, 12, 5), b(800, 3000, 12, 6);
  const Product one(a.csr(), b.csr(), 1, Serial);
  ExpectProduct(a.csr(), b.csr(), one, "900 x 800 x 3000");
  for (const int threads : {2, 4, 7}) {
    EXPECT(one.SameBits(Product(a.csr(), b.csr(), threads, Threads(threads))),
           "bits differ with %d threads", threads);
  }
}

// The largest columns that there are, and room for those that occur only.
void TestFarColumns() {
  Matrix a(20, 30, 3, 7), b(30, INT32_MAX, 6, 8, INT32_MAX - 9);
  const Product c(a.csr(), b.csr(), 2, Threads(2));
  ExpectProduct(a.csr(), b.csr(), c, "columns near 2^31");
  EXPECT(*std::max_element(c.columns.begin(), c.columns.end()) == INT32_MAX - 1,
         "the last column is missing");
}

// Neighbouring columns are marked together: full rows, in order and out of it, across words.
void TestCompressedPattern() {
  for (const int64_t cols : {63, 64, 65, 200}) {
    for (const bool ascending : {true, false}) {
      Matrix a(9, 9, 2, 9), b(9, cols, cols, 10);
      for (int64_t k = 0; k < 9; ++k) {
        const auto begin = b.columns.begin() + b.pointers[k];
        const auto end = b.columns.begin() + b.pointers[k + 1];
        for (auto column = begin; column != end; ++column) {
          *column = static_cast<int32_t>((column - begin) % cols);
        }
        if (!ascending) std::reverse(begin, end);
      }
      const Product c(a.csr(), b.csr(), 1, Serial);
      ExpectProduct(a.csr(), b.csr(), c, "full rows");
    }
  }
}

void TestCancellationIsKept() {
  const int64_t a_pointers[] = {0, 2}, b_pointers[] = {0, 1, 3};
  const int32_t a_columns[] = {0, 1}, b_columns[] = {4, 2, 4};
  const float a_values[] = {1, -1}, b_values[] = {3, 5, 3};
  const Csr a{1, 2, 2, a_pointers, a_columns, a_values};
  const Csr b{2, 6, 3, b_pointers, b_columns, b_values};
  const Product c(a, b, 1, Serial);
  EXPECT((c.columns == std::vector<int32_t>{2, 4}), "the pattern lost a column");
  EXPECT((c.values == std::vector<float>{-5, 0}), "values %g, %g", c.values[0], c.values[1]);
}

// NaN and infinity reach the rows that depend on them, and leave nothing behind for the next ones.
void TestSpecialValues() {
  Matrix a(50, 40, 4, 11), b(40, 70, 5, 12);
  b.values[b.pointers[0]] = INFINITY;
  b.values[b.pointers[0] + 1] = NAN;
  const Product c(a.csr(), b.csr(), 1, Serial);
  for (int64_t i = 0; i < 50; ++i) {
    bool touched = false, finite = true;
    for (int64_t p = a.pointers[i]; p < a.pointers[i + 1]; ++p) touched |= a.columns[p] == 0;
    for (int64_t p = c.pointers[i]; p < c.pointers[i + 1]; ++p)
      finite &= std::isfinite(c.values[p]) != 0;
    EXPECT(finite == !touched, "row %ld", long(i));
  }
}

void TestTooManyProducts() {
  // Row pointers of a matrix that nobody could store: 2^62 non-zeros in its one row.
  const int64_t a_pointers[] = {0, 0, 3}, b_pointers[] = {0, int64_t{1} << 62};
  const int32_t a_columns[] = {0, 0, 0};
  const float a_values[] = {1, 1, 1};
  SparseProduct product({2, 1, 3, a_pointers, a_columns, a_values},
                        {1, 5, int64_t{1} << 62, b_pointers, nullptr, nullptr});
  const std::string fault = product.Plan(1);
  EXPECT(fault.find("more than 2^63 multiplications, counted up to row 1") != std::string::npos,
         "\"%s\"", fault.c_str());
}

}  // namespace
}  // namespace accel_tf

int main() {
  accel_tf::TestProducts();
  accel_tf::TestThreads();
  accel_tf::TestFarColumns();
  accel_tf::TestCompressedPattern();
  accel_tf::TestCancellationIsKept();
  accel_tf::TestSpecialValues();
  accel_tf::TestTooManyProducts();
  std::printf("%d failures\n", accel_tf::failures);
  return accel_tf::failures != 0;
}

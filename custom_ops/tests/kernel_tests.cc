// Tests of the sliced products without TensorFlow: every instruction set of the host, every form of
// slice, sizes around the edges of vectors, tiles and chunks, misaligned arrays, any split over
// threads; against sums in double precision. Arrays are allocated at their exact size, so that
// AddressSanitizer sees one element too many.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "kernels/sparse_matmul.h"
#include "tests/packing.h"
#include "tests/testing.h"

namespace accel_tf {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Form {
  int height;
  bool shared, int8;
};

constexpr Form kForms[] = {{4, false, false}, {4, true, false}, {16, true, false},
                           {4, false, true},  {4, true, true},  {16, true, true}};

struct Size {
  int64_t rows, cols, tile, chunk_rows, per_group;
};

// Group g is empty when g % 5 == 2, and three times as long when g % 11 == 3; columns are unsorted,
// and some occur more than once.
SparseMatrix RandomMatrix(const Form& form, const Size& size, std::mt19937& random) {
  SparseMatrix m{size.rows, size.cols, form.height, form.shared, {}};
  std::normal_distribution<float> normal;
  m.groups.resize((m.rows + m.group_rows() - 1) / m.group_rows());
  for (size_t g = 0; g < m.groups.size() && m.cols > 0; ++g) {
    const int64_t count = g % 5 == 2 ? 0 : g % 11 == 3 ? 3 * size.per_group : size.per_group;
    for (int64_t i = 0; i < count; ++i) {
      Nonzero nonzero{static_cast<int64_t>(random() % m.cols), {}};
      for (int64_t r = 0; r < m.group_rows(); ++r) {
        const int byte = static_cast<int>(random() % 256) - 128;
        nonzero.weights.push_back(form.int8 ? static_cast<float>(byte) : normal(random));
      }
      m.groups[g].push_back(nonzero);
    }
  }
  return m;
}

std::vector<int32_t> ChunkRows(const SparseMatrix& m, int64_t rows) {
  std::vector<int32_t> starts = {0};
  rows = (rows + m.group_rows() - 1) / m.group_rows() * m.group_rows();
  while (starts.back() < m.rows) {
    starts.push_back(static_cast<int32_t>(std::min(starts.back() + rows, m.rows)));
  }
  return starts;
}

// Random activations of one matrix, and all three products with them.
struct Problem {
  int64_t batch;
  SparseMatrix matrix;
  Packed packed;
  int offset;  // of every array, in elements
  Array<int32_t> plan;
  Array<uint16_t> columns;
  Array<float> values, scales, bias, x, dy;
  Array<int8_t> int8_values;
  Sliced w;
  Epilogue epilogue;
  char name[120];

  Problem(const Form& form, const Size& size, int64_t batch, int seed)
      : Problem(form, size, batch, seed, std::mt19937(seed)) {}

  Problem(const Form& form, const Size& size, int64_t batch, int seed, std::mt19937 random)
      : batch(batch),
        matrix(RandomMatrix(form, size, random)),
        packed(Pack(matrix, size.tile, ChunkRows(matrix, size.chunk_rows))),
        offset(seed % 4),
        plan(Copy(packed.plan, offset)),
        columns(Copy(packed.columns, offset)),
        values(Copy(packed.values, offset)),
        scales(size.rows, offset),
        bias(size.rows, offset),
        x(batch * size.cols, offset),
        dy(batch * size.rows, offset),
        int8_values(values.size(), offset) {
    std::snprintf(name, sizeof name, "%dx1%s%s, batch %ld, %ld x %ld, tile %ld, chunks of %ld",
                  form.height, form.shared ? " shared" : "", form.int8 ? " int8" : "", long(batch),
                  long(size.rows), long(size.cols), long(size.tile), long(size.chunk_rows));
    std::normal_distribution<float> normal;
    for (Array<float>* array : {&scales, &bias, &x, &dy}) {
      std::generate_n(array->data(), array->size(), [&] { return normal(random); });
    }
    if (form.int8) std::copy_n(values.data(), values.size(), int8_values.data());
    w.rows = size.rows;
    w.cols = size.cols;
    w.height = form.height;
    w.shared = form.shared;
    const std::string fault = Read();
    EXPECT(fault.empty(), "%s (%s)", fault.c_str(), name);
    if (form.int8) w.int8_values = int8_values.data();
    if (!form.int8) w.values = values.data();
    if (form.int8) epilogue.scales = scales.data();
    if (seed % 2 == 0) epilogue.bias = bias.data();
    epilogue.activation = static_cast<Activation>(seed % 3);
  }

  std::string Read() {
    return ReadPlan(plan.data(), plan.size(), columns.data(), columns.size(), &w);
  }

  // The three results one after the other; what is not written is NaN.
  std::vector<float> Run(const Kernels& kernels, const ParallelFor& parallel_for,
                         std::string* fault) {
    Array<float> y(batch * w.rows, offset), dx(batch * w.cols, offset), d(values.size(), offset);
    Array<float> scratch2(MultiplyTransposedScratch(w, batch), offset);
    Array<float> scratch3(SampleScratch(w, batch), offset);
    for (Array<float>* array : {&y, &dx, &d, &scratch2, &scratch3}) {
      std::fill_n(array->data(), array->size(), kNan);
    }
    Sliced pattern = w;
    pattern.values = nullptr;
    pattern.int8_values = nullptr;
    const std::string faults[] = {
        Multiply(kernels, w, x.data(), batch, epilogue, y.data(), parallel_for),
        MultiplyTransposed(kernels, w, dy.data(), batch, dx.data(), scratch2.data(), parallel_for),
        Sample(kernels, pattern, dy.data(), x.data(), batch, d.data(), scratch3.data(),
               parallel_for)};
    EXPECT(faults[0] == faults[1] && faults[1] == faults[2], "\"%s\", \"%s\", \"%s\" (%s)",
           faults[0].c_str(), faults[1].c_str(), faults[2].c_str(), name);
    *fault = faults[0];
    std::vector<float> results;
    for (Array<float>* array : {&y, &dx, &d}) {
      results.insert(results.end(), array->data(), array->data() + array->size());
    }
    return results;
  }

  std::vector<float> Run(const Kernels& kernels, const ParallelFor& parallel_for) {
    std::string fault;
    std::vector<float> results = Run(kernels, parallel_for, &fault);
    EXPECT(fault.empty(), "%s (%s)", fault.c_str(), name);
    return results;
  }
};

// A sum in double precision, and the sum of the magnitudes that were added.
struct Sum {
  double value = 0, magnitude = 0;

  void Add(double term) {
    value += term;
    magnitude += std::abs(term);
  }
};

void Finish(const Epilogue& epilogue, int64_t row, Sum* sum) {
  if (epilogue.scales != nullptr) {
    sum->value *= epilogue.scales[row];
    sum->magnitude *= std::abs(epilogue.scales[row]);
  }
  if (epilogue.bias != nullptr) sum->Add(epilogue.bias[row]);
  if (epilogue.activation != Activation::kLinear && sum->value < 0) sum->value = 0;
  if (epilogue.activation == Activation::kRelu6 && sum->value > 6) sum->value = 6;
}

// What Run returns, from the matrix as it was before it was packed.
std::vector<Sum> Expected(Problem& p) {
  const int64_t rows = p.w.rows, cols = p.w.cols, values = p.values.size();
  std::vector<Sum> sums(p.batch * (rows + cols) + values);
  Sum *y = sums.data(), *dx = y + p.batch * rows, *d = dx + p.batch * cols;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (size_t g = 0; g < p.matrix.groups.size(); ++g) {
      const int64_t first = static_cast<int64_t>(g) * p.matrix.group_rows();
      const int64_t end = std::min(first + p.matrix.group_rows(), rows);
      for (const auto& [column, weights] : p.matrix.groups[g]) {
        for (int64_t row = first; row < end; ++row) {
          const double weight = weights[row - first];
          y[b * rows + row].Add(weight * p.x[b * cols + column]);
          dx[b * cols + column].Add(weight * p.dy[b * rows + row]);
        }
      }
    }
    for (int64_t row = 0; row < rows; ++row) Finish(p.epilogue, row, &y[b * rows + row]);
    for (int64_t i = 0; i < values; ++i) {
      const auto [row, column] = p.packed.places[i];
      const double of_dy = row < 0 ? 0 : p.dy[b * rows + row];
      d[i].Add(of_dy * (column < 0 ? 0 : p.x[b * cols + column]));
    }
  }
  return sums;
}

bool Near(float got, const Sum& want) {
  if (!std::isfinite(want.value)) {
    return std::isnan(want.value) ? std::isnan(got) : got == want.value;
  }
  return std::abs(got - want.value) <= 1e-5 * want.magnitude;
}

void ExpectNear(Problem& p, const std::vector<float>& got, const std::vector<Sum>& want,
                const Kernels& kernels) {
  EXPECT(got.size() == want.size(), "%zu results, not %zu", got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i) {
    const int64_t y = p.batch * p.w.rows, dx = p.batch * p.w.cols, at = static_cast<int64_t>(i);
    const char* what = at < y ? "y" : at < y + dx ? "dx" : "d";
    EXPECT(Near(got[i], want[i]), "%s[%ld] = %g, not %g (%s, %s)", what,
           long(at < y        ? at
                : at < y + dx ? at - y
                              : at - y - dx),
           got[i], want[i].value, kernels.name, p.name);
  }
}

bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

void TestProducts() {
  const Size sizes[] = {{1, 1, 1, 1, 1},        {7, 3, 4096, 512, 2}, {8, 16, 5, 4, 8},
                        {9, 17, 16, 3, 7},      {31, 15, 7, 16, 9},   {33, 70, 33, 20, 16},
                        {64, 40, 192, 64, 17},  {5, 100, 13, 2, 1},   {100, 1, 1, 7, 1},
                        {600, 23, 8, 512, 2},   {530, 5, 3, 1, 1},    {13, 4100, 4096, 512, 9},
                        {11, 4096, 4096, 8, 5}, {0, 6, 4, 1, 0},      {6, 0, 4, 2, 0},
                        {0, 0, 1, 1, 0},        {12, 31, 9, 5, 0}};
  std::mt19937 random(1);
  for (const Size& size : sizes) {
    for (const Form& form : kForms) {
      for (const int64_t batch : {0, 1, 2, 15, 16, 17, 31, 32, 33, 65}) {
        if (size.cols > 1000 && batch != 1 && batch != 33) continue;  // to save time
        Problem p(form, size, batch, static_cast<int>(random() % 1000000));
        std::vector<ParallelFor> splits = {OneByOneBackwards};
        // One in eight is enough: what threads share does not depend on the sizes.
        if (random() % 8 == 0) splits = {OneByOneBackwards, Serial, Threads(2), Threads(4)};
        const std::vector<Sum> expected = Expected(p);
        for (const Kernels* kernels : AvailableKernels()) {
          const std::vector<float> first = p.Run(*kernels, Serial);
          ExpectNear(p, first, expected, *kernels);
          for (const ParallelFor& split : splits) {
            EXPECT(SameBits(first, p.Run(*kernels, split)), "bits differ with the split (%s, %s)",
                   kernels->name, p.name);
          }
        }
      }
    }
  }
}

// NaN and infinity reach the results that depend on them, through any activation, and no other:
// padding makes no NaN of a row that is none.
void TestSpecialValues() {
  for (int seed = 0; seed < 6; ++seed) {
    for (const Form& form : kForms) {
      for (const int64_t batch : {1, 2, 17, 33}) {
        Problem p(form, {45, 26, 8, 32, 2}, batch, seed);
        const int64_t last = batch - 1;
        p.x[last * p.w.cols + 5] = kInfinity;
        p.x[last * p.w.cols + 6] = kNan;
        p.x[last * p.w.cols + 25] = -kInfinity;
        p.dy[last * p.w.rows + 3] = kNan;
        p.dy[last * p.w.rows + 41] = kInfinity;
        const std::vector<Sum> expected = Expected(p);
        const auto nans = std::count_if(expected.begin(), expected.end(),
                                        [](const Sum& sum) { return std::isnan(sum.value); });
        EXPECT(nans > 0 && nans < static_cast<int64_t>(expected.size()), "%ld (%s)", long(nans),
               p.name);
        for (const Kernels* kernels : AvailableKernels()) {
          ExpectNear(p, p.Run(*kernels, Serial), expected, *kernels);
        }
      }
    }
  }
}

// Columns are checked by whoever multiplies; of several faults, the first chunk's is reported.
void TestColumns() {
  for (const Form& form : kForms) {
    for (const int64_t batch : {0, 1, 2, 33, 65}) {
      Problem p(form, {80, 26, 8, 32, 2}, batch, 1);
      const auto begin = [&](int64_t chunk) {
        return p.w.step_starts[p.w.slice_starts[chunk * p.w.tiles]] * p.w.columns_per_step();
      };
      EXPECT(p.w.chunks == 3 && begin(1) < begin(2), "%s", p.name);
      const int64_t last = begin(2) - 1;
      p.columns[last] = 9;
      p.columns[p.columns.size() - 1] = 65535;
      const std::string want =
          "columns[" + std::to_string(last) + "] = 9, expected a value from 0 to 8";
      ExpectFault(CheckColumns(p.w, 0), "");
      ExpectFault(CheckColumns(p.w, 1), want);
      ExpectFault(CheckColumns(p.w, 2), "columns[" + std::to_string(p.columns.size() - 1) +
                                            "] = 65535, expected a value from 0 to 8");
      const ParallelFor splits[] = {Serial, OneByOneBackwards, Threads(3)};
      for (const ParallelFor& split : splits) {
        std::string fault;
        p.Run(*AvailableKernels().back(), split, &fault);
        ExpectFault(fault, want);
      }
    }
  }
}

// Changes plans and columns at random: those that pass the check may be nonsense, but must be safe,
// and mean the same with any split.
void TestNonsense() {
  std::mt19937 random(1);
  int accepted = 0, refused = 0;
  for (int i = 0; i < 1500; ++i) {
    const Size sizes[] = {{45, 26, 8, 32, 2}, {20, 9, 3, 16, 5}, {7, 40, 13, 4, 3}};
    const int64_t batches[] = {1, 5, 33};
    Problem p(kForms[i % 6], sizes[i / 6 % 3], batches[i / 18 % 3], i);
    for (int changes = 1 + i % 3; changes > 0; --changes) {
      const int32_t anything = static_cast<int32_t>(random());
      if (random() % 2) {
        int32_t& at = p.plan[random() % p.plan.size()];
        at = random() % 4 ? at + anything % 3 : anything;
      } else {
        p.columns[random() % p.columns.size()] = static_cast<uint16_t>(anything % 16);
      }
    }
    std::string fault = p.Read(), again;
    if (fault.empty()) {
      const std::vector<const Kernels*> available = AvailableKernels();
      const Kernels& kernels = *available[random() % available.size()];
      const std::vector<float> first = p.Run(kernels, Serial, &fault);
      const std::vector<float> second =
          p.Run(kernels, i % 4 == 0 ? Threads(2) : OneByOneBackwards, &again);
      EXPECT(fault == again, "\"%s\", \"%s\" (%s)", fault.c_str(), again.c_str(), p.name);
      EXPECT(!fault.empty() || SameBits(first, second), "bits differ (%s)", p.name);
    }
    ++(fault.empty() ? accepted : refused);
  }
  EXPECT(accepted > 300 && refused > 300, "%d accepted, %d refused", accepted, refused);
}

}  // namespace
}  // namespace accel_tf

int main() {
  for (const accel_tf::Kernels* kernels : accel_tf::AvailableKernels()) {
    std::printf("testing %s\n", kernels->name);
  }
  accel_tf::TestColumns();
  accel_tf::TestProducts();
  accel_tf::TestSpecialValues();
  accel_tf::TestNonsense();
  std::printf("%d failures\n", accel_tf::failures);
  return accel_tf::failures != 0;
}

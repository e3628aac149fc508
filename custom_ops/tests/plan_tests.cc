// Tests of what stands before the products: each rule of a plan, broken once; the choice of
// kernels; the scratch memory.
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "kernels/sparse_matmul.h"
#include "tests/testing.h"

namespace accel_tf {
namespace {

struct Change {
  int position;
  int32_t value;
  const char* fault;
};

// Two chunks × three tiles, with three slices of 2, 1 and 2 steps.
const std::vector<int32_t> kPlan = {4, 2, 3,              // tile, chunks, slices
                                    0, 4, 6,              // chunk_rows, from plan[3]
                                    0, 1, 1, 2, 2, 3, 3,  // slice_starts, from plan[6]
                                    0, 2, 3, 5,           // step_starts, from plan[13]
                                    0, 1, 2, 3, 3, 1, 4,
                                    4, 0, 2, 2, 2};  // slice_rows, from plan[17]

std::string Read(const std::vector<int32_t>& plan, int64_t columns) {
  Array<int32_t> exact = Copy(plan, 0);
  Sliced w;
  w.rows = 6;
  w.cols = 10;
  return ReadPlan(exact.data(), exact.size(), nullptr, columns, &w);
}

void TestReadPlan() {
  ExpectFault(Read(kPlan, 20), "");
  const Change changes[] = {
      {0, 0, "plan[0] = 0, expected a value from 1 to 4096"},
      {0, 4097, "plan[0] = 4097, expected a value from 1 to 4096"},
      {0, INT32_MIN, "plan[0] = -2147483648, expected a value from 1 to 4096"},
      {0, 5, "plan has 29 elements, expected 27 for 2 chunks, 2 tiles and 3 slices of 4 rows"},
      {1, -1, "plan[1] = -1, expected a number of chunks, not negative"},
      {1, INT32_MAX,
       "plan has 29 elements, expected 8589934609 for 2147483647 chunks, 3 tiles and 3 slices of 4 "
       "rows"},
      {2, -1, "plan[2] = -1, expected a number of slices, not negative"},
      {2, INT32_MAX,
       "plan has 29 elements, expected 10737418249 for 2 chunks, 3 tiles and 2147483647 slices of "
       "4 rows"},
      {3, 1, "plan[3] = 1, expected 0"},
      {4, 0, "plan[4] = 0, expected 1 to 512 more than plan[3] = 0"},
      {4, 513, "plan[4] = 513, expected 1 to 512 more than plan[3] = 0"},
      {4, INT32_MIN, "plan[4] = -2147483648, expected 1 to 512 more than plan[3] = 0"},
      {4, 6, "plan[5] = 6, expected 1 to 512 more than plan[4] = 6"},
      {5, 7, "plan[5] = 7, expected the number of outputs, 6"},
      {6, -1, "plan[6] = -1, expected 0"},
      {9, 0, "plan[9] = 0, expected 0 to 2147483647 more than plan[8] = 1"},
      {9, INT32_MIN, "plan[9] = -2147483648, expected 0 to 2147483647 more than plan[8] = 1"},
      {10, 4, "plan[11] = 3, expected 0 to 2147483647 more than plan[10] = 4"},
      {12, 4, "plan[12] = 4, expected the number of slices, 3"},
      {13, 1, "plan[13] = 1, expected 0"},
      {15, 1, "plan[15] = 1, expected 0 to 2147483647 more than plan[14] = 2"},
      {14, INT32_MAX, "plan[15] = 3, expected 0 to 2147483647 more than plan[14] = 2147483647"},
      {16, 4, "plan[16] = 4, expected the number of steps that columns has, 5"},
      {17, -1, "plan[17] = -1, expected a value from 0 to 4"},
      {24, 5, "plan[24] = 5, expected a value from 0 to 4"},
      {28, 3, "plan[28] = 3, expected a value from 0 to 2"},
      {25, INT32_MIN, "plan[25] = -2147483648, expected a value from 0 to 2"},
  };
  for (const Change& change : changes) {
    std::vector<int32_t> plan = kPlan;
    plan[change.position] = change.value;
    ExpectFault(Read(plan, 20), change.fault);
  }
  ExpectFault(Read(kPlan, 19), "plan[16] = 5, expected the number of steps that columns has, 4");
  ExpectFault(Read(kPlan, 21), "columns has 21 elements, expected a multiple of 4");
  for (const size_t size : {0, 1, 2}) {
    ExpectFault(Read(std::vector<int32_t>(size, 1), 20),
                "plan has " + std::to_string(size) + " elements, expected at least 3");
  }
  for (const size_t size : {3, 28, 30}) {
    std::vector<int32_t> plan = kPlan;
    plan.resize(size, 0);
    ExpectFault(Read(plan, 20), "plan has " + std::to_string(size) +
                                    " elements, expected 29 for 2 chunks, 3 tiles and 3 slices of "
                                    "4 rows");
  }
}

void TestForm() {
  ExpectFault(CheckForm(0, 0, 4, false), "");
  ExpectFault(CheckForm(INT32_MAX, INT32_MAX, 4, true), "");
  ExpectFault(CheckForm(1, 1, 16, true), "");
  const char* sizes[] = {"out_features = -1 and in_features = 1",
                         "out_features = 1 and in_features = 2147483648"};
  ExpectFault(CheckForm(-1, 1, 4, false),
              sizes[0] + std::string(", expected a value from 0 to 2147483647"));
  ExpectFault(CheckForm(1, int64_t{1} << 31, 4, false),
              sizes[1] + std::string(", expected a value from 0 to 2147483647"));
  for (const auto& [height, shared] : {std::pair(16, false), {8, true}, {5, true}, {0, false}}) {
    ExpectFault(CheckForm(1, 1, height, shared),
                "height = " + std::to_string(height) +
                    " and shared = " + (shared ? "true" : "false") +
                    ", expected a height of 4, or of 16 where columns are shared");
  }
}

void TestChoice() {
  std::string error;
  for (const Kernels* kernels : AvailableKernels()) {
    EXPECT(FindKernels(kernels->name, &error) == kernels, "%s", kernels->name);
  }
  EXPECT(FindKernels(nullptr, &error) == AvailableKernels().back(), "the default is not the best");
  EXPECT(FindKernels("", &error) == AvailableKernels().back(), "the default is not the best");
  EXPECT(FindKernels("auto", &error) == AvailableKernels().back(), "auto is not the best");
  EXPECT(FindKernels("mmx", &error) == nullptr && error.find("scalar") != std::string::npos, "%s",
         error.c_str());
}

void TestScratch() {
  Sliced w;
  w.rows = w.cols = INT32_MAX;
  w.tile = 4096;
  w.tiles = w.chunks = 1 << 19;
  for (const int64_t batch : {int64_t{1} << 33, int64_t{1} << 62}) {
    EXPECT(MultiplyTransposedScratch(w, batch) == -1, "an overflow is not seen");
    EXPECT(SampleScratch(w, batch) == -1, "an overflow is not seen");
  }
}

}  // namespace
}  // namespace accel_tf

int main() {
  accel_tf::TestForm();
  accel_tf::TestReadPlan();
  accel_tf::TestChoice();
  accel_tf::TestScratch();
  std::printf("%d failures\n", accel_tf::failures);
  return accel_tf::failures != 0;
}

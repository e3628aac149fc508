// Stands in for a header that XLA's headers include and TensorFlow's wheel lacks. It declares what
// they name in functions that are never called here; nothing of it is linked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace util {

using uint128_t = std::pair<uint64_t, uint64_t>;
uint32_t Fingerprint32(const char*, size_t);
uint64_t Fingerprint64(const char*, size_t);
uint128_t Fingerprint128(const char*, size_t);
uint64_t Uint128Low64(const uint128_t&);
uint64_t Uint128High64(const uint128_t&);

}  // namespace util

// Stands in for a header that XLA's headers include and TensorFlow's wheel lacks; see farmhash.h.
#pragma once

namespace highwayhash {

template <int kTarget>
class HighwayHashCatT {};

}  // namespace highwayhash

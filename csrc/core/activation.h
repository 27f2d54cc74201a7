// The activations that a product applies to its result before it is stored.
#pragma once

namespace tetris {

enum class Activation : int { kNone, kRelu, kGelu, kGeluTanh, kSilu };

}  // namespace tetris

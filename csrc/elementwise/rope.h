// RoPE of one pair of elements (x[k], x[k + D/2]) of a head. Shared by host and device.

#pragma once

#include "scalar.h"

namespace lmf {
namespace LMF_ISA {

struct RopePair {
  float first, second;
};

LMF_HD RopePair rotate(RopePair x, float cos, float sin) {
  return {x.first * cos - x.second * sin, x.second * cos + x.first * sin};
}

// The transposed rotation: gradients of the inputs from gradients of the outputs.
LMF_HD RopePair rotate_back(RopePair dy, float cos, float sin) {
  return {dy.first * cos + dy.second * sin, dy.second * cos - dy.first * sin};
}

}  // namespace LMF_ISA
}  // namespace lmf

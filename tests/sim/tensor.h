// SPDX-License-Identifier: MIT
// Tensor-core instructions, with the register layouts of the PTX manual ("Matrix Fragments for mma.m16n8k16 /
// m16n8k8", "ldmatrix"). Lane l = 4 g + t.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "memory.h"

namespace camk::sim {

struct Half {
  static constexpr unsigned k = 16, per_register = 2;
  static float value(std::uint32_t reg, unsigned i) {
    const std::uint32_t bits = reg >> (16 * i) & 0xffff;
    float magnitude = std::bit_cast<float>((bits & 0x7fff) << 13) * 0x1p112f;  // rebias; subnormals come out right
    if (magnitude >= 65536.f) magnitude = std::bit_cast<float>(std::bit_cast<std::uint32_t>(magnitude) | 0x7f800000u);
    return bits & 0x8000 ? -magnitude : magnitude;
  }
};
struct BFloat {
  static constexpr unsigned k = 16, per_register = 2;
  static float value(std::uint32_t reg, unsigned i) { return std::bit_cast<float>((reg >> (16 * i) & 0xffff) << 16); }
};
struct Tf32 {  // the tensor core ignores the low 13 bits
  static constexpr unsigned k = 8, per_register = 1;
  static float value(std::uint32_t reg, unsigned) { return std::bit_cast<float>(reg & 0xffffe000u); }
};

struct MatrixLane {
  const std::uint32_t *a, *b;
  float* d;
};

// D[16][8] += A[16][k] B[k][8]. Products are exact in float32; hardware may round the sum differently in the
// last bits.
template <class Format>
void multiply(void* const* lanes, std::uint32_t) {
  constexpr unsigned k_size = Format::k, per = Format::per_register, half_k = k_size / 2;
  float a[16][k_size], b[k_size][8];
  for (unsigned lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<const MatrixLane*>(lanes[lane]);
    const unsigned g = lane >> 2, t = lane & 3;
    for (unsigned reg = 0; reg < 4; ++reg)
      for (unsigned i = 0; i < per; ++i)
        a[g + 8 * (reg & 1)][half_k * (reg >> 1) + per * t + i] = Format::value(mine.a[reg], i);
    for (unsigned reg = 0; reg < 2; ++reg)
      for (unsigned i = 0; i < per; ++i) b[half_k * reg + per * t + i][g] = Format::value(mine.b[reg], i);
  }
  for (unsigned lane = 0; lane < 32; ++lane) {
    float* d = static_cast<MatrixLane*>(lanes[lane])->d;
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned row = (lane >> 2) + 8 * (i >> 1), column = 2 * (lane & 3) + (i & 1);
      for (unsigned k = 0; k < k_size; ++k) d[i] += a[row][k] * b[k][column];
    }
  }
}

template <class Format>
void matrix_product(float (&d)[4], const std::uint32_t* a, const std::uint32_t* b, const char* name,
                    const Where& where) {
  MatrixLane mine{a, b, d};
  ++state.statistics.matrix_products;
  meet_whole_warp(&mine, name, multiply<Format>, where);
}

struct LoadLane {
  std::uint16_t row[8];  // read by the lane itself, so that a bad address is reported where it was computed
  std::uint32_t* registers;
};

template <bool transposed>
void distribute(void* const* lanes, std::uint32_t) {
  for (unsigned lane = 0; lane < 32; ++lane) {
    const unsigned g = lane >> 2, t = lane & 3;
    for (unsigned matrix = 0; matrix < 4; ++matrix) {
      std::uint32_t reg = 0;
      for (unsigned i = 0; i < 2; ++i) {
        const unsigned row = transposed ? 2 * t + i : g, column = transposed ? g : 2 * t + i;
        reg |= static_cast<std::uint32_t>(static_cast<const LoadLane*>(lanes[matrix * 8 + row])->row[column])
               << (16 * i);
      }
      static_cast<LoadLane*>(lanes[lane])->registers[matrix] = reg;
    }
  }
}

template <bool transposed>
void load_matrices(std::uint32_t (&registers)[4], const void* row, const Where& where) {
  require_shared(row, "ldmatrix", where);
  require_aligned(row, 16, "ldmatrix", where);
  LoadLane mine{{}, registers};
  std::memcpy(mine.row, row, 16);
  ++state.statistics.matrix_loads;
  meet_whole_warp(&mine, transposed ? "ldmatrix.trans" : "ldmatrix", distribute<transposed>, where);
}

}  // namespace camk::sim

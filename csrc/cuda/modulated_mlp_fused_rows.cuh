// SPDX-License-Identifier: MIT
// What a layer of up to 256 columns does to a block's rows between products. Four lanes of a warp share a row's 64
// columns; each takes, of every 16, the places it has written, so that nothing need be waited for but other warps'
// sums. Formulas are csrc/math's.
#pragma once
#include "cuda/modulated_mlp_rows.cuh"
#include "cuda/product_steps.cuh"
#include "math/modulate.h"

namespace camk::cuda {

// A lane's part of four rows, 8 apart from each other.
template <int Across>
struct LaneRows {
  const NetworkJob<float>* job;
  int64_t first;     // point of the first row, in the launch
  int left;          // points from there on, in the tile
  float* values;     // the first row's, at this lane's place in the warp's first group of 16
  int stride, from;  // from: the feature of that place
  int64_t kept;      // the same place in the point's row in global memory
  float2* parts;     // [Across, rows of the block], at the first row
  int apart;         // between warps, in parts

  CAMK_DEVICE float* value(int q, int p) const { return values + q * 8 * stride + p * kStep; }
  CAMK_DEVICE float* row(int q) const { return job->rows + (first + q * 8) * job->stride; }
  CAMK_DEVICE float* keep(int q, int p) const { return row(q) + kept + p * kStep; }
  CAMK_DEVICE bool has(int q) const { return q * 8 < left; }
  // Feature of number j of group p.
  CAMK_DEVICE int column(int p, int j) const { return from + p * kStep + j % 2 + j / 2 * 8; }
  CAMK_DEVICE bool has_group(const Layer& layer, int p) const {
    return from / kWarpColumns * kWarpColumns + p * kStep < layer.out;
  }
  CAMK_DEVICE bool writes_row() const { return from == 0; }
};

template <class... F>
CAMK_DEVICE void quad_sum(F&... sums) {
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
    ((sums += __shfl_xor_sync(0xffffffffu, sums, distance)), ...);
  }
}

CAMK_DEVICE int columns_of(const Layer& layer, int warp) {
  return min(max(layer.out - warp * kWarpColumns, 0), kWarpColumns);
}

// Scale and shift of one point in one layer; per channel where there is modulation of that kind.
struct RowModulation {
  const NetworkJob<float>& job;
  int64_t at = -1;  // the first of them, in the tensor
  float scale = 1, shift = 0;

  CAMK_DEVICE RowModulation(const NetworkJob<float>& work, const Layer& layer, int l, int64_t point, bool there)
      : job(work) {
    if (!there || !job.modulation || !layer.modulated) return;
    const int64_t before = job.before + point, index = job.group == 1 ? before : before / job.group;
    at = (index * job.hidden + l) * 2 * job.channels;
    if (job.channels == 1) scale = read(0), shift = read(1);
  }
  CAMK_DEVICE bool per_channel() const { return at >= 0 && job.channels > 1; }
  CAMK_DEVICE math::ScaleShift<float> of(int c) const {
    if (per_channel()) return {read(c), read(job.channels + c)};
    return {scale, shift};
  }
  CAMK_DEVICE float read(int i) const { return load_number<float>(job.modulation, job.modulated, at + i); }
};

// ---- norm ----------------------------------------------------------------------------------------------------------

// A row's numbers in this lane: up to 4 groups of 4.
struct RowNumbers {
  float v[kWarpTiles][4];

  template <int Across>
  CAMK_DEVICE RowNumbers(const LaneRows<Across>& lane, const Layer& layer, int q) {
#pragma unroll
    for (int p = 0; p < kWarpTiles; ++p) {
      Four four{};
      if (lane.has_group(layer, p)) four = load_four(lane.value(q, p));
#pragma unroll
      for (int j = 0; j < 4; ++j) v[p][j] = lane.column(p, j) < layer.out ? four.v[j] : 0.0f;
    }
  }
};

// Mean over the columns of a warp, and the sum of squares about it.
template <int Across>
CAMK_DEVICE float2 moments(const LaneRows<Across>& lane, const Layer& layer, const RowNumbers& row) {
  const int some = columns_of(layer, lane.from / kWarpColumns);
  float mean = 0, squares = 0;
#pragma unroll
  for (int p = 0; p < kWarpTiles; ++p) {
#pragma unroll
    for (int j = 0; j < 4; ++j) mean += row.v[p][j];
  }
  quad_sum(mean);
  mean /= float(max(some, 1));
#pragma unroll
  for (int p = 0; p < kWarpTiles; ++p) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float c = lane.column(p, j) < layer.out ? row.v[p][j] - mean : 0.0f;
      squares += c * c;
    }
  }
  quad_sum(squares);
  return make_float2(mean, squares);
}

// Of the whole row, from those of all warps.
template <int Across>
CAMK_DEVICE float2 combined_moments(const LaneRows<Across>& lane, const Layer& layer, int q) {
  float mean = 0, squares = 0;
#pragma unroll
  for (int w = 0; w < Across; ++w) mean += lane.parts[w * lane.apart + q * 8].x * float(columns_of(layer, w));
  mean /= float(layer.out);
#pragma unroll
  for (int w = 0; w < Across; ++w) {
    const float2 part = lane.parts[w * lane.apart + q * 8];
    const float away = part.x - mean;
    squares += part.y + float(columns_of(layer, w)) * away * away;
  }
  return make_float2(mean, squares);
}

// For all warps: pair(q) of a row.
template <int Across, class Pair>
CAMK_DEVICE void share(const LaneRows<Across>& lane, const Pair& pair) {
#pragma unroll 1
  for (int q = 0; q < 4; ++q) {
    const float2 own = pair(q);
    if (threadIdx.x % 4 == 0) lane.parts[lane.from / kWarpColumns * lane.apart + q * 8] = own;
  }
  __syncthreads();
}

// ---- the layer's way forward ---------------------------------------------------------------------------------------

// values, W h + b -> activation(scale norm(values) + shift). Keep: the point's row takes what the way back needs.
template <int Across, bool Keep>
CAMK_NOINLINE __device__ void forward_rows(const LaneRows<Across> lane, int l) {
  const NetworkJob<float>& job = *lane.job;
  const Layer& layer = layer_of(job, l);
  const bool normalised = job.point_norm && layer.modulated;
  if (Across > 1 && normalised) {
    share(lane, [&](int q) { return moments(lane, layer, RowNumbers(lane, layer, q)); });
  }
  math::with_activation(math::Activation(layer.activation), [&](auto activation) {
    constexpr math::Activation kActivation{decltype(activation)::value};
    constexpr bool kSlope = Keep && kActivation > math::Activation::kRelu;
#pragma unroll 1
    for (int q = 0; q < 4; ++q) {
      const RowNumbers row(lane, layer, q);
      const RowModulation of_row(job, layer, l, lane.first + q * 8, lane.has(q));
      float centre = 0, r = 1;
      if (normalised) {
        const float2 whole = Across > 1 ? combined_moments(lane, layer, q) : moments(lane, layer, row);
        centre = whole.x, r = math::inverse_deviation(whole.y / float(layer.out), job.eps);
        if (Keep && lane.writes_row()) lane.row(q)[layer.deviation] = r;
      }
#pragma unroll
      for (int p = 0; p < kWarpTiles; ++p) {
        if (!lane.has_group(layer, p)) break;
        Four n, y, slope;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int c = lane.column(p, j);
          const bool there = c < layer.out;
          n.v[j] = there ? (row.v[p][j] - centre) * r : 0.0f;
          float rate = float(layer.omega);
          if (kActivation == math::Activation::kResidualSine && there) rate = load_readonly(job.frequencies + c);
          const float s = there ? of_row.of(c)(n.v[j]) : 0.0f;
          const math::Jet<float> f = math::activate<int(kSlope)>(activation, s, rate);
          y.v[j] = there ? f.value : 0.0f, slope.v[j] = there ? f.first : 0.0f;
        }
        store_four(lane.value(q, p), y);
        if constexpr (Keep) {
          store_four(lane.keep(q, p) + layer.n, n);
          if (layer.y >= 0) store_four(lane.keep(q, p) + layer.y, y);
          if (kSlope) store_four(lane.keep(q, p) + layer.dn, slope);
        }
      }
    }
  });
}

// ---- and back ------------------------------------------------------------------------------------------------------

// Gradients of scale and shift of a point, or of a channel of it.
CAMK_DEVICE void put_modulation(const NetworkJob<float>& job, int64_t point, int l, int c, float scale, float shift) {
  const Modulation<float> to(job, point, l);
  job.modulation_points[to.scale(c)] = scale, job.modulation_points[to.shift(c)] = shift;
}

// values, the gradient of what the layer gives -> that of W h + b, also into the point's row.
template <int Across>
CAMK_NOINLINE __device__ void back_rows(const LaneRows<Across> lane, int l) {
  const NetworkJob<float>& job = *lane.job;
  const Layer& layer = layer_of(job, l);
  const auto kind = math::Activation(layer.activation);
  const bool normalised = job.point_norm && layer.modulated;
  // values -> gradient of n, but for a scale that all channels share; its sum over the columns, and that with n
  const auto first_part = [&](int q) {
    const RowModulation of_row(job, layer, l, lane.first + q * 8, lane.has(q));
    float sum = 0, with_n = 0;
#pragma unroll
    for (int p = 0; p < kWarpTiles; ++p) {
      if (!lane.has_group(layer, p)) break;
      Four g = load_four(lane.value(q, p)), slope{{1, 1, 1, 1}};
      const Four n = load_four(lane.keep(q, p) + layer.n);
      if (kind > math::Activation::kRelu) slope = load_four(lane.keep(q, p) + layer.dn);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int c = lane.column(p, j);
        if (c >= layer.out) {
          g.v[j] = 0;
          continue;
        }
        const math::ScaleShift<float> own = of_row.of(c);
        const bool cut = kind == math::Activation::kRelu && !(own(n.v[j]) > 0.0f);
        const auto found = math::modulate_gradients(own.scale, n.v[j], g.v[j], cut ? 0.0f : slope.v[j]);
        g.v[j] = found.shift;
        if (of_row.per_channel()) {
          if (job.modulation_points) put_modulation(job, lane.first + q * 8, l, c, found.scale, found.shift);
          g.v[j] = found.n;
        }
        sum += g.v[j], with_n += g.v[j] * n.v[j];
      }
      store_four(lane.value(q, p), g);
    }
    quad_sum(sum, with_n);
    return make_float2(sum, with_n);
  };
  if constexpr (Across > 1) share(lane, first_part);
#pragma unroll 1
  for (int q = 0; q < 4; ++q) {
    float2 whole = make_float2(0, 0);
    if constexpr (Across > 1) {
#pragma unroll
      for (int w = 0; w < Across; ++w) {
        whole.x += lane.parts[w * lane.apart + q * 8].x, whole.y += lane.parts[w * lane.apart + q * 8].y;
      }
    } else {
      whole = first_part(q);
    }
    const RowModulation of_row(job, layer, l, lane.first + q * 8, lane.has(q));
    if (of_row.at >= 0 && job.channels == 1 && job.modulation_points && lane.writes_row()) {
      put_modulation(job, lane.first + q * 8, l, 0, whole.y, whole.x);
    }
    const float r = normalised ? lane.row(q)[layer.deviation] : 1.0f, scale = of_row.scale;
    const float mean = whole.x * scale / float(layer.out), with_n = whole.y * scale / float(layer.out);
#pragma unroll
    for (int p = 0; p < kWarpTiles; ++p) {
      if (!lane.has_group(layer, p)) break;
      const Four g = load_four(lane.value(q, p));
      Four n{}, dz;
      if (normalised) n = load_four(lane.keep(q, p) + layer.n);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        dz.v[j] = normalised ? math::norm_jacobian(scale * g.v[j], n.v[j], r, mean, with_n) : scale * g.v[j];
        if (lane.column(p, j) >= layer.out) dz.v[j] = 0;
      }
      store_four(lane.value(q, p), dz);
      store_four(lane.keep(q, p) + layer.n, dz);
    }
  }
}

}  // namespace camk::cuda

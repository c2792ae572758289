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
  // Whether the layer has all columns of the block and one scale and shift for a row: nothing need be asked of a
  // number.
  CAMK_DEVICE bool is_plain(const Layer& layer) const {
    return layer.out == Across * kWarpColumns && job->channels <= 1;
  }
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
  // Of channel c. Shared: all have the same.
  template <bool Shared>
  CAMK_DEVICE math::ScaleShift<float> of(int c) const {
    if (!Shared && per_channel()) return {read(c), read(job.channels + c)};
    return {scale, shift};
  }
  CAMK_DEVICE float read(int i) const { return load_number<float>(job.modulation, job.modulated, at + i); }
};

// ---- norm ----------------------------------------------------------------------------------------------------------

// Number j of group p in row q of the sums, whose column in the layer is LaneRows' column(p, j).
template <class Sums>
CAMK_DEVICE auto& sum_at(Sums& sums, int q, int p, int j) {
  return sums[q / 2][2 * p + j / 2][q % 2 * 2 + j % 2];
}

// Of the whole row, from mean and sum of squares about it that each warp has of its columns; each column's share.
template <int Across>
CAMK_DEVICE float2 combined_moments(const LaneRows<Across>& lane, const Layer& layer, int q, float share_of) {
  float mean = 0, squares = 0;
#pragma unroll
  for (int w = 0; w < Across; ++w) mean += lane.parts[w * lane.apart + q * 8].x * float(columns_of(layer, w));
  mean *= share_of;
#pragma unroll
  for (int w = 0; w < Across; ++w) {
    const float2 part = lane.parts[w * lane.apart + q * 8];
    const float away = part.x - mean;
    squares += part.y + float(columns_of(layer, w)) * away * away;
  }
  return make_float2(mean, squares);
}

// For all warps, behind the next __syncthreads.
template <int Across>
CAMK_DEVICE void share(const LaneRows<Across>& lane, int q, float2 pair) {
  if (threadIdx.x % 4 == 0) lane.parts[lane.from / kWarpColumns * lane.apart + q * 8] = pair;
}

// sums, W h + b -> n; all four rows at once, whose sums then do not wait for each other. Columns that the layer does
// not have stay 0.
template <bool Plain, int Across, bool Keep>
CAMK_DEVICE void normalise(WarpSums& sums, const LaneRows<Across>& lane, const Layer& layer) {
  const int some = columns_of(layer, lane.from / kWarpColumns);
  float mean[4], squares[4];
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    float part[kWarpTiles];
#pragma unroll
    for (int p = 0; p < kWarpTiles; ++p) {
      part[p] = (sum_at(sums, q, p, 0) + sum_at(sums, q, p, 1)) + (sum_at(sums, q, p, 2) + sum_at(sums, q, p, 3));
    }
    mean[q] = (part[0] + part[1]) + (part[2] + part[3]);
  }
  quad_sum(mean[0], mean[1], mean[2], mean[3]);
  const float share_of = 1.0f / float(layer.out), own_share = Across > 1 ? 1.0f / float(max(some, 1)) : share_of;
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    mean[q] *= own_share, squares[q] = 0;
#pragma unroll
    for (int p = 0; p < kWarpTiles; ++p) {
      float part = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float c = Plain || lane.column(p, j) < layer.out ? sum_at(sums, q, p, j) - mean[q] : 0.0f;
        part += c * c;
      }
      squares[q] += part;
    }
  }
  quad_sum(squares[0], squares[1], squares[2], squares[3]);
  if constexpr (Across > 1) {
#pragma unroll
    for (int q = 0; q < 4; ++q) share(lane, q, make_float2(mean[q], squares[q]));
    __syncthreads();
  }
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const float2 whole = Across > 1 ? combined_moments(lane, layer, q, share_of) : make_float2(mean[q], squares[q]);
    const float r = math::inverse_deviation(whole.y * share_of, lane.job->eps);
    if (Keep && lane.writes_row()) lane.row(q)[layer.deviation] = r;
#pragma unroll
    for (int p = 0; p < kWarpTiles; ++p) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float& n = sum_at(sums, q, p, j);
        n = Plain || lane.column(p, j) < layer.out ? (n - whole.x) * r : 0.0f;
      }
    }
  }
}

// ---- the layer's way forward ---------------------------------------------------------------------------------------

template <bool Plain, int Across, bool Keep, math::Activation Kind>
CAMK_DEVICE void activate_rows(const LaneRows<Across>& lane, const Layer& layer, int l) {
  const NetworkJob<float>& job = *lane.job;
  constexpr bool kSlope = Keep && Kind > math::Activation::kRelu;
#pragma unroll 1
  for (int q = 0; q < 4; ++q) {
    const RowModulation of_row(job, layer, l, lane.first + q * 8, lane.has(q));
#pragma unroll
    for (int p = 0; p < kWarpTiles; ++p) {
      if (!Plain && !lane.has_group(layer, p)) break;
      const Four n = load_four(lane.value(q, p));
      Four y, slope;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int c = lane.column(p, j);
        const bool there = Plain || c < layer.out;
        float rate = float(layer.omega);
        if (Kind == math::Activation::kResidualSine && there) rate = load_readonly(job.frequencies + c);
        const float s = there ? of_row.of<Plain>(c)(n.v[j]) : 0.0f;
        const math::Jet<float> f = math::activate<int(kSlope)>(Constant<int(Kind)>{}, s, rate);
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
}

// values, n -> activation(scale n + shift). Keep: the point's row takes what the way back needs.
template <int Across, bool Keep>
CAMK_NOINLINE __device__ void forward_rows(const LaneRows<Across> lane, int l) {
  const Layer& layer = layer_of(*lane.job, l);
  math::with_activation(math::Activation(layer.activation), [&](auto activation) {
    constexpr math::Activation kKind{decltype(activation)::value};
    if (kKind <= math::Activation::kRelu && lane.is_plain(layer)) {  // others have more to do than ask
      activate_rows<kKind <= math::Activation::kRelu, Across, Keep, kKind>(lane, layer, l);
    } else {
      activate_rows<false, Across, Keep, kKind>(lane, layer, l);
    }
  });
}

// ---- and back ------------------------------------------------------------------------------------------------------

// Gradients of scale and shift of a point, or of a channel of it.
CAMK_DEVICE void put_modulation(const NetworkJob<float>& job, int64_t point, int l, int c, float scale, float shift) {
  const Modulation<float> to(job, point, l);
  job.modulation_points[to.scale(c)] = scale, job.modulation_points[to.shift(c)] = shift;
}

// Four groups of a row: gradients, and n of the layer.
struct RowGradients {
  Four g[kWarpTiles], n[kWarpTiles];

  template <int Across>
  CAMK_DEVICE RowGradients(const LaneRows<Across>& lane, const Layer& layer, int q) {
#pragma unroll
    for (int p = 0; p < kWarpTiles; ++p) {
      g[p] = load_four(lane.value(q, p)), n[p] = Four{};
      if (lane.has_group(layer, p)) n[p] = load_four(lane.keep(q, p) + layer.n);
    }
  }
};

// Gradients of what the layer gives -> of n, but for a scale that all channels share; their sum over the columns, and
// that with n.
template <bool Plain, int Across>
CAMK_DEVICE float2 back_to_n(RowGradients& row, const LaneRows<Across>& lane, const Layer& layer, int l, int q) {
  const NetworkJob<float>& job = *lane.job;
  const auto kind = math::Activation(layer.activation);
  const RowModulation of_row(job, layer, l, lane.first + q * 8, lane.has(q));
  Four slope[kWarpTiles];
#pragma unroll
  for (int p = 0; p < kWarpTiles; ++p) {
    slope[p] = {{1, 1, 1, 1}};
    if (kind > math::Activation::kRelu && lane.has_group(layer, p)) slope[p] = load_four(lane.keep(q, p) + layer.dn);
  }
  float sum = 0, with_n = 0;
#pragma unroll
  for (int p = 0; p < kWarpTiles; ++p) {
    float part = 0, part_with_n = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int c = lane.column(p, j);
      const bool there = Plain || c < layer.out;
      const float n = row.n[p].v[j];
      const math::ScaleShift<float> own = there ? of_row.of<Plain>(c) : math::ScaleShift<float>{1, 0};
      const bool cut = !there || (kind == math::Activation::kRelu && !(own(n) > 0.0f));
      const auto found =
          math::modulate_gradients(own.scale, n, there ? row.g[p].v[j] : 0.0f, cut ? 0.0f : slope[p].v[j]);
      row.g[p].v[j] = found.shift;
      if (!Plain && of_row.per_channel()) {
        if (there && job.modulation_points) {
          put_modulation(job, lane.first + q * 8, l, c, found.scale, found.shift);
        }
        row.g[p].v[j] = found.n;
      }
      part += row.g[p].v[j], part_with_n += row.g[p].v[j] * n;
    }
    sum += part, with_n += part_with_n;
  }
  quad_sum(sum, with_n);
  return make_float2(sum, with_n);
}

// And on to W h + b, into values and the point's row. whole: the two sums over all columns.
template <bool Plain, int Across>
CAMK_DEVICE void back_to_sums(const RowGradients& row, float2 whole, const LaneRows<Across>& lane, const Layer& layer,
                              int l, int q) {
  const NetworkJob<float>& job = *lane.job;
  const bool normalised = job.point_norm && layer.modulated;
  const RowModulation of_row(job, layer, l, lane.first + q * 8, lane.has(q));
  if (of_row.at >= 0 && job.channels == 1 && job.modulation_points && lane.writes_row()) {
    put_modulation(job, lane.first + q * 8, l, 0, whole.y, whole.x);
  }
  const float r = normalised ? lane.row(q)[layer.deviation] : 1.0f, scale = of_row.scale;
  const float mean = whole.x * scale / float(layer.out), with_n = whole.y * scale / float(layer.out);
#pragma unroll
  for (int p = 0; p < kWarpTiles; ++p) {
    Four dz;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float g = scale * row.g[p].v[j];
      dz.v[j] = normalised ? math::norm_jacobian(g, row.n[p].v[j], r, mean, with_n) : g;
      if (!Plain && lane.column(p, j) >= layer.out) dz.v[j] = 0;
    }
    store_four(lane.value(q, p), dz);
    if (Plain || lane.has_group(layer, p)) store_four(lane.keep(q, p) + layer.n, dz);
  }
}

// values, the gradient of what the layer gives -> that of W h + b, also into the point's row.
template <bool Plain, int Across>
CAMK_DEVICE void back_all_rows(const LaneRows<Across>& lane, const Layer& layer, int l) {
  if constexpr (Across > 1) {
#pragma unroll 1
    for (int q = 0; q < 4; ++q) {
      RowGradients row(lane, layer, q);
      share(lane, q, back_to_n<Plain>(row, lane, layer, l, q));
#pragma unroll
      for (int p = 0; p < kWarpTiles; ++p) store_four(lane.value(q, p), row.g[p]);
    }
    __syncthreads();
  }
#pragma unroll 1
  for (int q = 0; q < 4; ++q) {
    RowGradients row(lane, layer, q);
    float2 whole = make_float2(0, 0);
    if constexpr (Across > 1) {
#pragma unroll
      for (int w = 0; w < Across; ++w) {
        whole.x += lane.parts[w * lane.apart + q * 8].x, whole.y += lane.parts[w * lane.apart + q * 8].y;
      }
    } else {
      whole = back_to_n<Plain>(row, lane, layer, l, q);
    }
    back_to_sums<Plain>(row, whole, lane, layer, l, q);
  }
}
template <int Across>
CAMK_NOINLINE __device__ void back_rows(const LaneRows<Across> lane, int l) {
  const Layer& layer = layer_of(*lane.job, l);
  if (lane.is_plain(layer)) {
    back_all_rows<true>(lane, layer, l);
  } else {
    back_all_rows<false>(lane, layer, l);
  }
}

}  // namespace camk::cuda

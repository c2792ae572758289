// SPDX-License-Identifier: MIT
// A block's tile of points and its way through layers of up to 256 columns in float32: sums stay in registers between
// products and activations, values go from layer to layer in shared memory, weights come in the order of their use from
// a stream that `pack` wrote.
#pragma once
#include "cuda/modulated_mlp_fused_rows.cuh"

namespace camk::cuda {

// What a block multiplies at once: so many steps of its own values, so many of x, by so many tiles of weights.
struct Product {
  int tiles, own_steps, x_steps;
  CAMK_HD int steps() const { return own_steps + x_steps; }
  CAMK_HD int numbers() const { return steps() * tiles * kTileNumbers; }
};
CAMK_HD int up(int a, int b) { return (a + b - 1) / b; }
CAMK_HD Product forward_product(const Layer& layer) {
  return {up(layer.out, kTileColumns), up(layer.own, kStep), up(layer.in - layer.own, kStep)};
}
// A product on the way back: of the gradients of layer l, for its inputs from `first` on.
struct Back {
  int l, first;
};
// Where the way back begins in layer l: the gradients of x, if they are wanted, `columns` at a time, then those of what
// comes from the layer before. Layer -1: it is at its end.
CAMK_HD Back back_from(const NetworkJob<float>& job, int l) {
  if (l < 0) return {-1, 0};
  const Layer& layer = layer_of(job, l);
  if (job.gx && layer.in > layer.own) return {l, layer.own};
  return layer.own > 0 ? Back{l, 0} : Back{-1, 0};
}
CAMK_HD Back back_after(const NetworkJob<float>& job, Back at, int columns) {
  const Layer& layer = layer_of(job, at.l);
  if (at.first >= layer.own) {
    if (at.first + columns < layer.in) return {at.l, at.first + columns};
    if (layer.own > 0) return {at.l, 0};
  }
  return back_from(job, at.l - 1);
}
CAMK_HD int back_columns(const Layer& layer, Back at, int columns) {
  const int left = (at.first < layer.own ? layer.own : layer.in) - at.first;
  return left < columns ? left : columns;
}
CAMK_HD Product back_product(const NetworkJob<float>& job, Back at, int columns) {
  if (at.l < 0) return {};
  const Layer& layer = layer_of(job, at.l);
  return {up(back_columns(layer, at, columns), kTileColumns), up(layer.out, kStep), 0};
}
// Warps of a block: `Across` side by side, 64 columns each, and kDown one below another, 32 points each.
template <int Across>
struct Block {
  static constexpr int kDown = Across == 1 ? 4 : 2;
  static constexpr int kThreads = 32 * Across * kDown, kPoints = kWarpRows * kDown, kColumns = kWarpColumns * Across;
  // Blocks at once on a multiprocessor for which the compiler leaves registers, of the value's kernel and the
  // gradients': as many as cost no local memory.
  static constexpr int kForward = Across == 4 ? 1 : 3;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static constexpr int kGradients = Across == 1 ? 2 : 1;
#else
  static constexpr int kGradients = Across == 4 ? 1 : 4 - Across;
#endif
  // Steps whose weights are in shared memory at once; another so many are on their way.
  static constexpr int kSteps = 1;
  static constexpr int kSlab = kSteps * kColumns * kStep;
  static constexpr int kRing = 2 * kSteps * kStep;  // columns for x

  // Numbers of a row: 16 more than a multiple of 32, so that 8 lanes access different banks with 16 bytes each. x has
  // columns of its own where it follows other values.
  CAMK_HD static constexpr int stride(bool skips) { return kColumns + kStep + (skips ? kRing : 0); }
  CAMK_HD static constexpr size_t shared_bytes(bool skips, size_t number) {
    return sizeof(float) * (kPoints * stride(skips) + 2 * Across * kPoints) + 2 * number * kSlab;
  }
};

template <int Across, class W>
class FusedTile {
 public:
  using B = Block<Across>;
  using Sums = WarpSums;

  CAMK_DEVICE FusedTile(const NetworkJob<float>& work, float* memory) : job(work), values(memory) {}

  const NetworkJob<float>& job;

  // What follows from the block and the launch is computed where it is needed: registers are what blocks are short of.
  static CAMK_DEVICE int64_t first() { return int64_t(blockIdx.x) * B::kPoints; }  // point of the launch
  CAMK_DEVICE int count() const { return int(min(job.points - first(), int64_t(B::kPoints))); }
  CAMK_DEVICE int stride() const { return B::stride(job.skips); }
  CAMK_DEVICE float2* parts() const { return reinterpret_cast<float2*>(values + B::kPoints * stride()); }
  static CAMK_DEVICE int lane() { return int(threadIdx.x) % 32; }
  static CAMK_DEVICE int down() { return int(threadIdx.x) / 32 / Across; }
  static CAMK_DEVICE int across() { return int(threadIdx.x) / 32 % Across; }
  // Row q of the four that this lane has a part of.
  CAMK_DEVICE int row_index(int q) const { return down() * kWarpRows + q * 8 + lane() / 4; }
  CAMK_DEVICE bool has(int q) const { return row_index(q) < count(); }
  CAMK_DEVICE LaneRows<Across> own_rows() const {
    const int place = across() * kWarpColumns + lane() % 4 * 4, row = row_index(0);
    return {&job,  first() + row, count() - row, values + row * stride() + place, stride(), feature_at(place),
            place, parts() + row, B::kPoints};
  }

  // ---- products ----------------------------------------------------------------------------------------------------

  CAMK_DEVICE void put_values(const Sums& sums) const {
    if constexpr (Across > 1) __syncthreads();  // others may still read them
    const LaneRows<Across> own = own_rows();
#pragma unroll
    for (int q = 0; q < 4; ++q) {
#pragma unroll
      for (int p = 0; p < kWarpTiles; ++p) {
        Four four;
#pragma unroll
        for (int j = 0; j < 4; ++j) four.v[j] = sum_at(sums, q, p, j);
        store_four(own.value(q, p), four);
      }
    }
  }
  // Starts the stream. Whoever multiplies says what comes next, whose weights then are on their way.
  CAMK_DEVICE void begin(const Product& product) { fetch<true>(product, 0); }
  // sums += values times weights; all threads of the block. WithX: x may be among the values, here or in what is next.
  template <bool WithX>
  CAMK_DEVICE void multiply(Sums& sums, const Product& product, const Product& next) {
    const int tiles = product.tiles - across() * kWarpTiles;
    const float* rows = values + (down() * kWarpRows + lane() / 4) * stride() + lane() % 4 * 4;
    for (int from = 0; from < product.steps(); from += B::kSteps) {
      cp_async_wait<0>();
      __syncthreads();
      const W* slab = slabs() + turn * B::kSlab;
      turn ^= 1;
      const bool last = from + B::kSteps >= product.steps();
      const Product coming{last ? next.tiles : product.tiles, last ? next.own_steps : product.own_steps,
                           last ? next.x_steps : product.x_steps};  // not by address: that would be local memory
      fetch<WithX>(coming, last ? 0 : from + B::kSteps);
#pragma unroll
      for (int s = 0; s < B::kSteps; ++s) {
        const int step = from + s;
        if (step >= product.steps()) break;
        const bool of_x = WithX && step >= product.own_steps;
        const int column = of_x ? ring(step - product.own_steps) : step * kStep;
        multiply_step(sums, rows + column, stride(), slab + (s * product.tiles + across() * kWarpTiles) * kTileNumbers,
                      tiles, job.terms);
      }
    }
  }

  // ---- the layer's way forward -------------------------------------------------------------------------------------

  // values <- activation(scale norm(values W^T + b) + shift)
  template <bool Keep>
  CAMK_DEVICE void forward(int l, const Product& next) {
    const Layer& layer = layer_of(job, l);
    Sums sums;
    begin_with_biases(sums, l);
    multiply<true>(sums, forward_product(layer), next);
    if (job.point_norm && layer.modulated) {
      if (own_rows().is_plain(layer)) {
        normalise<true, Across, Keep>(sums, own_rows(), layer);
      } else {
        normalise<false, Across, Keep>(sums, own_rows(), layer);
      }
    }
    put_values(sums);
    forward_rows<Across, Keep>(own_rows(), l);
  }

  // ---- and back ----------------------------------------------------------------------------------------------------

  static CAMK_DEVICE void clear(Sums& sums) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < 2 * kWarpTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[m][n][e] = 0;
      }
    }
  }

  // The gradient of the last layer's values, as given -> values.
  CAMK_DEVICE void load_gradient() const {
    __syncthreads();  // others have kept the deviation that this one needs
    const Layer& layer = layer_of(job, job.layers - 1);
    const LaneRows<Across> own = own_rows();
#pragma unroll 1
    for (int q = 0; q < 4; ++q) {
      const int64_t from = (job.before + first() + row_index(q)) * job.outputs;
      const int end = has(q) ? layer.out : 0;
      for (int p = 0; p < kWarpTiles && own.has_group(layer, p); ++p) {
        Four g;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int c = own.column(p, j);
          g.v[j] = c < end ? load_number<float>(job.g, job.weights, from + c) : 0.0f;
        }
        store_four(own.value(q, p), g);
      }
    }
  }
  CAMK_DEVICE void back(int l) const { back_rows(own_rows(), l); }

  // The gradient of x, columns from `first_column` on, of one layer; rows hold that of layers behind it.
  CAMK_DEVICE void add_points_gradient(const Sums& sums, int l, int first_column, int columns) const {
    bool started = false;
    for (int behind = l + 1; behind < job.layers; ++behind) {
      started |= layer_of(job, behind).in > layer_of(job, behind).own;
    }
    const int last = layer_of(job, job.layers - 1).out;  // in the result: where x may follow
    const LaneRows<Across> own = own_rows();
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const int64_t point = job.before + first() + row_index(q);
#pragma unroll
      for (int p = 0; p < 4; ++p) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int i = first_column + own.column(p, j);
          if (!has(q) || own.column(p, j) >= columns) continue;
          float* so_far = own.row(q) + job.gx_row + i;
          float sum = sum_at(sums, q, p, j);
          if (started) sum += *so_far;
          if (l > 0) {
            *so_far = sum;
          } else {
            if (job.outputs > last) sum += load_number<float>(job.g, job.weights, point * job.outputs + last + i);
            store_number(job.gx, job.coordinates, point * job.features + i, sum);
          }
        }
      }
    }
  }

  // x as the sums over points read it, where they cannot read it where it is.
  CAMK_DEVICE void keep_points() const {
    if (job.x_row < 0) return;
    const int columns = up(job.features, kStep) * kStep;
    for (int i = int(threadIdx.x); i < count() * columns; i += B::kThreads) {
      const int p = i / columns, c = i % columns;
      const int64_t at = (job.before + first() + p) * job.features + c;
      job.rows[(first() + p) * job.stride + job.x_row + c] =
          c < job.features ? load_number<float>(job.x, job.coordinates, at) : 0.0f;
    }
  }

  // The last layer's values as the result.
  CAMK_DEVICE void put_result() const {
    const Layer& layer = layer_of(job, job.layers - 1);
    const LaneRows<Across> own = own_rows();
    with_storage_of<float>(job.weights, [&]<class T>(T*) {
#pragma unroll 1
      for (int p = 0; p < kWarpTiles && own.has_group(layer, p); ++p) {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const Four y = load_four(own.value(q, p));
          T* to = static_cast<T*>(job.y) + (job.before + first() + row_index(q)) * job.outputs;
          const int end = has(q) ? layer.out : 0;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            T number;
            from_number(number, y.v[j], job.weights);
            if (own.column(p, j) < end) store_streaming(to + own.column(p, j), number);
          }
        }
      }
    });
    const int behind = job.outputs - layer.out;  // x
    for (int i = int(threadIdx.x); i < count() * behind; i += B::kThreads) {
      const int64_t point = job.before + first() + i / behind;
      const float number = load_number<float>(job.x, job.coordinates, point * job.features + i % behind);
      store_number(job.y, job.weights, point * job.outputs + layer.out + i % behind, number);
    }
  }

 private:
  float* values;
  int turn = 0, reached = 0;  // slab; numbers of the stream so far

  // Behind the parts of means [Across, kPoints].
  CAMK_DEVICE W* slabs() const { return reinterpret_cast<W*>(parts() + Across * B::kPoints); }
  CAMK_DEVICE int ring(int x_step) const { return (job.skips ? B::kColumns : 0) + x_step % (2 * B::kSteps) * kStep; }

  // ---- weights and x on their way ----------------------------------------------------------------------------------

  // Those of the steps from `from` on.
  template <bool WithX>
  CAMK_DEVICE void fetch(const Product& product, int from) {
    const int steps = min(B::kSteps, product.steps() - from), numbers = max(steps, 0) * product.tiles * kTileNumbers;
    constexpr int kWord = 16 / int(sizeof(W));
    W* to = slabs() + turn * B::kSlab;
    const W* stream = static_cast<const W*>(job.packed) + reached;
#pragma unroll 1
    for (int i = int(threadIdx.x) * kWord; i < numbers; i += B::kThreads * kWord) cp_async<16>(to + i, stream + i);
    reached += numbers;
    if constexpr (WithX) {
      for (int s = max(from, product.own_steps); s < from + steps; ++s) fetch_points(s - product.own_steps);
    }
    cp_async_commit();
  }
  // A step's columns of x, four of a row by each thread in turn; zeros beyond them and for points that there are not.
  CAMK_DEVICE void fetch_points(int step) {
    constexpr int kWords = B::kPoints * 4 / B::kThreads, kApart = B::kThreads / 4;
    const int row = int(threadIdx.x) / 4, column = int(threadIdx.x) % 4 * 4, features = job.features;
    const int left = features - step * kStep - column, rows = left > 0 ? count() - row : 0;
    const int64_t from = (job.before + first() + row) * features + step * kStep + column;
    float* to = values + row * stride() + ring(step) + column;
    if (!job.whole_words) {
#pragma unroll 1
      for (int w = 0; w < kWords; ++w) {
        Four four;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const bool there = w * kApart < rows && j < left;
          four.v[j] = there ? load_number<float>(job.x, job.coordinates, from + w * kApart * features + j) : 0.0f;
        }
        store_four(to + w * kApart * stride(), four);
      }
    } else if (job.coordinates == Storage::kFloat) {
      const float* x = static_cast<const float*>(job.x);
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const bool there = w * kApart < rows;
        cp_async<16>(to + w * kApart * stride(), there ? x + from + w * kApart * features : x, there);
      }
    } else {
      const Short* x = static_cast<const Short*>(job.x);
      Row<Short, 4> word[kWords];  // all on their way before one is waited for
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        word[w] = {};
        if (w * kApart < rows) {
          word[w] = load_readonly(reinterpret_cast<const Row<Short, 4>*>(x + from + w * kApart * features));
        }
      }
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        Four four;
#pragma unroll
        for (int j = 0; j < 4; ++j) four.v[j] = to_number(word[w].v[j], job.coordinates);
        store_four(to + w * kApart * stride(), four);
      }
    }
  }

  CAMK_DEVICE void begin_with_biases(Sums& sums, int l) const {
    const float* from = job.biases + l * B::kColumns + across() * kWarpColumns + lane() % 4 * 2;
#pragma unroll
    for (int n = 0; n < 2 * kWarpTiles; ++n) {
      const float2 b = load_readonly(reinterpret_cast<const float2*>(from + n * 8));
#pragma unroll
      for (int m = 0; m < 2; ++m) sums[m][n][0] = sums[m][n][2] = b.x, sums[m][n][1] = sums[m][n][3] = b.y;
    }
  }
};

}  // namespace camk::cuda

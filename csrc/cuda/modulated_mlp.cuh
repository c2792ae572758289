// SPDX-License-Identifier: MIT
// A block's tile of points and its way through the layers: products from rows to rows, between which warps take rows.
#pragma once
#include "cuda/modulated_mlp_rows.cuh"
#include "cuda/product.cuh"

namespace camk::cuda {

inline constexpr int kMaxThreads = kMaxGroups * kGroupThreads;

template <class C>
CAMK_DEVICE C* row_of(C* rows, const NetworkJob<C>& job, int64_t point) {
  return rows + point * job.stride;
}

// What a layer takes, or its tangent: some columns of the rows, then x.
template <class C>
struct Inputs {
  const NetworkJob<C>& job;
  C* rows;
  int64_t first;  // the point of the rows, in the launch
  int own, column;
  const void* x;

  CAMK_DEVICE Inputs(const NetworkJob<C>& work, int l, C* memory, int64_t first_point, bool tangent)
      : job(work),
        rows(memory),
        first(first_point),
        own(layer_of(work, l).own),
        column(0),
        x(tangent ? work.x_tangent : work.x) {
    if (l > 0) column = tangent ? layer_of(work, l - 1).dy : layer_of(work, l - 1).y;
  }
  // body(fetch): fetch(point of the rows, k) is a number, for k below `last` at least.
  template <class Body>
  CAMK_DEVICE void with_fetch(int last, const Body& body) const {
    if (last <= own || x == nullptr) {
      body([&](int point, int k) { return k < own ? row_of(rows, job, point)[column + k] : C(0); });
      return;
    }
    with_storage_of<C>(job.coordinates, [&]<class T>(T*) {
      const T* from = static_cast<const T*>(x) + (job.before + first) * job.features - own;
      body([&](int point, int k) {
        if (k < own) return row_of(rows, job, point)[column + k];
        return C(to_number(load_readonly(from + int64_t(point) * job.features + k), job.coordinates));
      });
    });
  }
};

template <class C>
struct Tile {
  const NetworkJob<C>& job;
  Slabs<C> slabs;
  int64_t first;  // point of the launch
  int count;
  C* rows;
  bool shared;  // whether the rows are in shared memory

  CAMK_DEVICE Tile(const NetworkJob<C>& work, const Slabs<C>& memory, int64_t first_point, C* own_rows, bool in_shared)
      : job(work),
        slabs(memory),
        first(first_point),
        count(int(min(work.points - first_point, int64_t(kTileRows)))),
        rows(own_rows),
        shared(in_shared) {}

  CAMK_DEVICE C* row(int p) const { return row_of(rows, job, p); }

  // store(point, column, sum) of what add(sums, first column) gives, for `columns` columns.
  template <class Add, class Store>
  CAMK_DEVICE void product(int columns, const Add& add, const Store& store) {
    for (int first_column = 0; first_column < columns; first_column += slabs.columns()) {
      SumsOf<C> sums(job.terms);
      add(sums, first_column);
      sums.each([&](int p, int c, C sum) {
        if (p < count && first_column + c < columns) store(p, first_column + c, sum);
      });
    }
    __syncthreads();
  }

  // sums += (inputs of the layer) W^T, for the outputs from o on
  CAMK_DEVICE void forward(SumsOf<C>& sums, const Layer& layer, const Inputs<C>& inputs, const void* weight, int o) {
    const auto values = [&](C* slab, int k0) -> Operand<C> {
      if (shared && k0 + kDepth <= inputs.own) return {rows + inputs.column + k0, job.stride};
      inputs.with_fetch(min(k0 + kDepth, layer.in), [&](const auto& fetch) {
        stage<Along::kDepth>(slab, kSlabRows,
                             [&](int p, int k) { return p < count && k0 + k < layer.in ? fetch(p, k0 + k) : C(0); });
      });
      return {slab, kSlabStride};
    };
    const auto matrix = [&](C* slab, int k0) -> Operand<C> {
      with_storage_of<C>(job.weights, [&]<class T>(T*) {
        const T* from = static_cast<const T*>(weight) + int64_t(o) * layer.in + k0;
        stage<Along::kDepth>(slab, slabs.columns(), [&](int c, int k) {
          if (o + c >= layer.out || k0 + k >= layer.in) return C(0);
          return C(to_number(load_readonly(from + int64_t(c) * layer.in + k), job.weights));
        });
      });
      return {slab, kSlabStride};
    };
    slabs.add(sums, layer.out - o, layer.in, values, matrix);
  }
  // sums += (gradients, in `column` of the rows) W, for the inputs from i on
  CAMK_DEVICE void back(SumsOf<C>& sums, const Layer& layer, const void* weight, int i, int column) {
    const auto gradients = [&](C* slab, int k0) -> Operand<C> {
      stage<Along::kDepth>(slab, kSlabRows, [&](int p, int k) {
        return p < count && k0 + k < layer.out ? row(p)[column + k0 + k] : C(0);
      });
      return {slab, kSlabStride};
    };
    const auto matrix = [&](C* slab, int k0) -> Operand<C> {
      with_storage_of<C>(job.weights, [&]<class T>(T*) {
        const T* from = static_cast<const T*>(weight) + int64_t(k0) * layer.in + i;
        stage<Along::kRows>(slab, slabs.columns(), [&](int c, int k) {
          if (i + c >= layer.in || k0 + k >= layer.out) return C(0);
          return C(to_number(load_readonly(from + int64_t(k) * layer.in + c), job.weights));
        });
      });
      return {slab, kSlabStride};
    };
    slabs.add(sums, layer.in - i, layer.out, gradients, matrix);
  }

  // body(point, its row) by a warp for every point
  template <class Body>
  CAMK_DEVICE void each_row(const Body& body) const {
    for (int p = int(threadIdx.x) / 32; p < count; p += int(blockDim.x) / 32) body(first + p, row(p));
    __syncthreads();
  }
  // body(point, column) by a thread for every number of [points, columns]
  template <class Body>
  CAMK_DEVICE void each_number(int columns, const Body& body) const {
    for (int i = int(threadIdx.x); i < count * columns; i += int(blockDim.x)) body(i / columns, i % columns);
    __syncthreads();
  }

  CAMK_DEVICE C bias(const void* from, int o) const { return from ? load_number<C>(from, job.weights, o) : C(0); }
  // W h + b into n, or its tangent into dz
  CAMK_DEVICE void linear(int l, bool tangent) {
    const Layer& layer = layer_of(job, l);
    const int column = tangent ? layer.dz : layer.n;
    const void* shift = tangent ? layer.bias_tangent : layer.bias;
    const bool second = tangent && layer.weight_tangent;
    product(
        layer.out,
        [&](SumsOf<C>& sums, int o) {
#pragma unroll 1
          for (int term = 0; term <= int(second); ++term) {  // one place in the code for (dh, W) and (h, dW)
            const Inputs<C> inputs(job, l, rows, first, tangent && term == 0);
            forward(sums, layer, inputs, term == 0 ? layer.weight : layer.weight_tangent, o);
          }
        },
        [&](int p, int o, C sum) { row(p)[column + o] = sum + bias(shift, o); });
  }
  // The gradient of layer l's inputs, or that of their tangent, of which nobody wants the part of x.
  CAMK_DEVICE void linear_back(int l, bool tangent) {
    const Layer& layer = layer_of(job, l);
    const int column = tangent ? job.dg_row : job.g_row;
    const bool second = !tangent && layer.weight_tangent;
    product(
        job.gx && !tangent ? layer.in : layer.own,
        [&](SumsOf<C>& sums, int i) {
#pragma unroll 1
          for (int term = 0; term <= int(second); ++term) {
            const void* weight = term == 0 ? layer.weight : layer.weight_tangent;
            back(sums, layer, weight, i, tangent || term == 1 ? layer.dn : layer.n);
          }
        },
        [&](int p, int i, C sum) {
          if (i < layer.own) {
            row(p)[column + i] = sum;
          } else {
            row(p)[job.gx_row + i - layer.own] += sum;
          }
        });
  }
  // Behind the last layer's results: x if it skips there, or what stands for it.
  CAMK_DEVICE void put_points(const void* x) const {
    const int width = layer_of(job, job.layers - 1).out;
    each_number(job.outputs - width, [&](int p, int i) {
      const C number = x ? load_number<C>(x, job.coordinates, (job.before + first + p) * job.features + i) : C(0);
      store_number(job.y, job.weights, (job.before + first + p) * job.outputs + width + i, number);
    });
  }
};

inline int groups_for(int width) { return width > kGroupColumns ? kMaxGroups : 1; }

}  // namespace camk::cuda

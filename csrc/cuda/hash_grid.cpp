// SPDX-License-Identifier: MIT
// The hash-grid operators on CUDA; schemas and shapes: python/camkernels/hash_grid.py. What a result is agrees with
// csrc/cpu.
#include <cuda_runtime_api.h>

#include "cuda/hash_grid.h"
#include "cuda/repeatable.h"
#include "cuda/stream.h"
#include "launch/hash_grid.h"
#include "torch/seam.h"

namespace camk::cuda {
namespace {

using launch::Grid;
using launch::GridLists;
using OptionalTensor = std::optional<Tensor>;
using Doubles = std::vector<double>;
using Ints = std::vector<int64_t>;

void check_like(const Tensor& t, const Tensor& like, int64_t numel, const char* name) {
  check_contiguous(t, "hash_grid", name);
  check_same_device(t, like, "hash_grid", name);
  require(t.scalar_type() == like.scalar_type() && t.numel() == numel, "hash_grid: dtype or size of ", name);
}

// The tensors every operator takes, checked, and the geometry.
struct Call {
  const Tensor& x;
  const Tensor& table;
  const OptionalTensor& counts;
  Grid grid;
  CurrentStream stream;

  Call(const Tensor& points, const Tensor& rows, const OptionalTensor& level_counts, const GridLists& lists)
      : x(points), table(rows), counts(level_counts), grid(unpack(lists)), stream(points) {}

  int64_t points() const { return x.size(0); }
  int64_t width() const { return grid.channels(); }

  // body(job) for every launch; job is a Job<float> or a Job<double> without anything but points and geometry.
  template <class Body>
  void each_launch(const Body& body) const {
    if (points() == 0) return;
    if (x.scalar_type() == ScalarType::Double) {
      each_launch_of<double>(body);
    } else {
      each_launch_of<float>(body);
    }
  }

  void check(cudaError_t error) const {
    if (error != cudaSuccess) fail("hash_grid: the CUDA kernel could not run: ", explain(error));
  }

 private:
  Grid unpack(const GridLists& lists) const {
    require(x.dim() == 2 && table.dim() == 2, "hash_grid: x and table must have 2 dimensions");
    Grid g = launch::unpack_grid(x.size(1), table.size(1), lists);
    require(g.dims >= 1 && g.dims <= math::kMaxDims, "hash_grid: 1 to 7 axes");
    require(!g.levels.empty() && g.offsets.back() + g.levels.back().size == table.size(0),
            "hash_grid: the table does not fit the geometry");
    require(g.active_levels >= 0 && g.active_levels <= g.n_levels, "hash_grid: active_levels");
    const bool wide = x.scalar_type() == ScalarType::Double;
    require(wide || x.scalar_type() == ScalarType::Float, "hash_grid: x must be float32 or float64");
    require(wide || storage_of(table, "hash_grid", "table") != Storage::kDouble,
            "hash_grid: x must be float64 beside a float64 table");
    check_contiguous(x, "hash_grid", "x");
    check_contiguous(table, "hash_grid", "table");
    check_same_device(table, x, "hash_grid", "table");
    if (counts) {
      check_contiguous(*counts, "hash_grid", "level_counts");
      check_same_device(*counts, x, "hash_grid", "level_counts");
      const bool fits = counts->scalar_type() == ScalarType::Int && counts->numel() == x.size(0);
      require(fits, "hash_grid: level_counts");
    }
    return g;
  }

  template <class S>
  Job<S> job_from(int first) const {
    Job<S> job{};
    job.points = points(), job.channels = width();
    job.dims = grid.dims, job.features = grid.features;
    job.first_level = first, job.n_levels = std::min(kLevelsPerLaunch, grid.n_levels - first);
    job.active_levels = grid.active_levels, job.levels_per_thread = 1;
    job.interpolation = grid.interpolation, job.outside = grid.outside;
    job.storage = storage_of(table, "hash_grid", "table");
    job.accumulate = first > 0;
    job.x = read<S>(x);
    job.counts = counts ? read<int32_t>(*counts) : nullptr;
    for (int l = 0; l < job.n_levels; ++l) {
      const math::Level& level = grid.levels[first + l];
      JobLevel<S>& record = job.level[l];
      for (int d = 0; d < grid.dims; ++d) record.scale[d] = S(level.scale[d]), record.stride[d] = level.stride[d];
      record.shift = S(level.shift), record.size = level.size, record.first_row = grid.offsets[first + l];
      record.hashed = level.hashed, record.ceil_corner = level.ceil_corner;
    }
    return job;
  }

  template <class S, class Body>
  void each_launch_of(const Body& body) const {
    for (int first = 0; first < grid.n_levels; first += kLevelsPerLaunch) {
      Job<S> job = job_from<S>(first);
      body(job);
    }
  }
};

const void* data(const Tensor& t) { return t.const_data_ptr(); }

template <class S>
void set_coordinates(const S*& pointer, const OptionalTensor& t) {
  if (t) pointer = read<S>(*t);
}

// The table gradient: `tell(job)` says what it is of. Sums are float32, float64 for a float64 table.
template <class Tell>
Tensor table_gradient(const Call& call, bool wanted, bool anything, bool deterministic, const Tell& tell) {
  const Tensor& table = call.table;
  if (!wanted) return empty(table, {0});
  const Storage kind = storage_of(table, "hash_grid", "table");
  const bool direct = kind == Storage::kFloat || kind == Storage::kDouble;
  const ScalarType sum_type = kind == Storage::kDouble ? ScalarType::Double : ScalarType::Float;
  const Tensor sums = zeros(table, table.sizes(), sum_type);
  const auto pass = [&](Sums way, const RepeatableSum* repeatable) {
    call.each_launch([&](auto job) {
      tell(job);
      job.sums = sums.mutable_data_ptr();
      if (repeatable) job.fixed = repeatable->fixed(), job.largest = repeatable->largest();
      call.check(launch_table(job, way, call.stream.get()));
    });
  };
  if (anything && call.points() > 0) {
    if (deterministic) {
      const RepeatableSum repeatable(table, sums.numel());
      pass(Sums::kLargest, &repeatable);
      pass(Sums::kFixed, &repeatable);
      const int64_t terms = call.points() << call.grid.dims;
      call.check(repeatable.finish(sums.mutable_data_ptr(), kind, terms, call.stream.get()));
    } else {
      pass(Sums::kFast, nullptr);
    }
  }
  if (direct) return sums;
  const Tensor rounded = empty_as(table);
  call.check(launch_round(read<float>(sums), rounded.mutable_data_ptr(), kind, sums.numel(), call.stream.get()));
  return rounded;
}

// The gradient in x of what `tell(job)` says.
template <class Tell>
Tensor coordinate_gradient(const Call& call, bool wanted, bool anything, const Tell& tell) {
  if (!wanted) return empty(call.x, {0});
  const Tensor gx = empty_as(call.x);
  call.each_launch([&]<class S>(Job<S> job) {
    if (anything) tell(job);
    job.gx = write<S>(gx);
    call.check(launch_coordinates(job, call.stream.get()));
  });
  return gx;
}

Tensor forward(Tensor x, Tensor table, OptionalTensor counts, Doubles scales, double shift, Ints layout,
               bool ceil_corner, int64_t outside, int64_t interpolation, int64_t active_levels, bool) {
  const Call call(x, table, counts, {scales, shift, layout, ceil_corner, outside, interpolation, active_levels});
  const Tensor y = empty(table, {x.size(0), call.width()});
  call.each_launch([&](auto job) {
    job.values = data(table), job.y = y.mutable_data_ptr();
    call.check(launch_rows(job, call.stream.get()));
  });
  return y;
}

std::tuple<Tensor, Tensor> jacobian(Tensor x, Tensor table, OptionalTensor counts, Doubles scales, double shift,
                                    Ints layout, bool ceil_corner, int64_t outside, int64_t interpolation,
                                    int64_t active_levels, bool) {
  const Call call(x, table, counts, {scales, shift, layout, ceil_corner, outside, interpolation, active_levels});
  const Tensor y = empty(table, {x.size(0), call.width()}), j = empty(x, {x.size(0), call.width(), x.size(1)});
  call.each_launch([&]<class S>(Job<S> job) {
    job.values = data(table), job.y = y.mutable_data_ptr(), job.j = write<S>(j);
    call.check(launch_rows(job, call.stream.get()));
  });
  return {y, j};
}

// Gradients of <g, y> + <gj, j>; backward of the value alone has no gj.
std::tuple<Tensor, Tensor> first_order(const Call& call, const OptionalTensor& g, const OptionalTensor& gj,
                                       bool deterministic, const std::vector<bool>& mask) {
  if (g) check_like(*g, call.table, call.points() * call.width(), "grad");
  if (gj) check_like(*gj, call.x, call.points() * call.width() * call.grid.dims, "grad_jacobian");
  const auto tell = [&]<class S>(Job<S>& job) {
    job.values = job.table = data(call.table);
    if (g) job.g = data(*g);
    set_coordinates(job.gj, gj);
  };
  const bool anything = g || gj;
  const Tensor gx = coordinate_gradient(call, mask[0], anything, tell);
  return {gx, table_gradient(call, mask[1], anything, deterministic, tell)};
}

std::tuple<Tensor, Tensor> backward(Tensor grad, Tensor x, Tensor table, OptionalTensor counts, Doubles scales,
                                    double shift, Ints layout, bool ceil_corner, int64_t outside, int64_t interpolation,
                                    int64_t active_levels, bool deterministic, std::vector<bool> mask) {
  const Call call(x, table, counts, {scales, shift, layout, ceil_corner, outside, interpolation, active_levels});
  return first_order(call, grad, std::nullopt, deterministic, mask);
}

std::tuple<Tensor, Tensor> jacobian_backward(OptionalTensor grad, OptionalTensor grad_jacobian, Tensor x, Tensor table,
                                             OptionalTensor counts, Doubles scales, double shift, Ints layout,
                                             bool ceil_corner, int64_t outside, int64_t interpolation,
                                             int64_t active_levels, bool deterministic, std::vector<bool> mask) {
  const Call call(x, table, counts, {scales, shift, layout, ceil_corner, outside, interpolation, active_levels});
  return first_order(call, grad, grad_jacobian, deterministic, mask);
}

std::tuple<Tensor, Tensor, Tensor> backward_backward(OptionalTensor ggx, OptionalTensor ggtable, Tensor grad, Tensor x,
                                                     Tensor table, OptionalTensor counts, Doubles scales, double shift,
                                                     Ints layout, bool ceil_corner, int64_t outside,
                                                     int64_t interpolation, int64_t active_levels, bool deterministic,
                                                     std::vector<bool> mask) {
  const Call call(x, table, counts, {scales, shift, layout, ceil_corner, outside, interpolation, active_levels});
  check_like(grad, table, x.size(0) * call.width(), "grad");
  if (ggx) check_like(*ggx, x, x.numel(), "ggx");
  if (ggtable) check_like(*ggtable, table, table.numel(), "ggtable");
  const auto tell = [&]<class S>(Job<S>& job) {
    job.table = data(table);
    if (ggtable) job.values = data(*ggtable);
    job.g = data(grad);
    set_coordinates(job.v, ggx);
  };
  Tensor ggrad = empty(grad, {0});
  if (mask[0]) {
    ggrad = empty_as(grad);
    call.each_launch([&](auto job) {
      tell(job);
      job.g = nullptr, job.y = ggrad.mutable_data_ptr();
      call.check(launch_rows(job, call.stream.get()));
    });
  }
  const Tensor gx = coordinate_gradient(call, mask[1], ggx || ggtable, tell);
  return {ggrad, gx, table_gradient(call, mask[2], ggx.has_value(), deterministic, tell)};
}

}  // namespace
}  // namespace camk::cuda

STABLE_TORCH_LIBRARY_IMPL(CAMK_NAMESPACE, CAMK_DISPATCH_KEY, m) {
  m.impl("hash_grid", TORCH_BOX(&camk::cuda::forward));
  m.impl("hash_grid_backward", TORCH_BOX(&camk::cuda::backward));
  m.impl("hash_grid_backward_backward", TORCH_BOX(&camk::cuda::backward_backward));
  m.impl("hash_grid_jacobian", TORCH_BOX(&camk::cuda::jacobian));
  m.impl("hash_grid_jacobian_backward", TORCH_BOX(&camk::cuda::jacobian_backward));
}

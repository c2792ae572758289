// SPDX-License-Identifier: MIT
// The hash-grid operators on the CPU; schemas and shapes: python/camkernels/hash_grid.py. The setting `deterministic`
// changes nothing here: sums have one order for any number of threads.
#include "cpu/dispatch.h"
#include "cpu/hash_grid_pass.h"

namespace camk::cpu {
namespace {

using launch::Grid;
using launch::GridLists;
using OptionalTensor = std::optional<Tensor>;
using Doubles = std::vector<double>;
using Ints = std::vector<int64_t>;

Grid checked_grid(const Tensor& x, const Tensor& table, const OptionalTensor& counts, const GridLists& lists) {
  require(x.dim() == 2 && table.dim() == 2, "hash_grid: x and table must have 2 dimensions");
  const Grid grid = launch::unpack_grid(x.size(1), table.size(1), lists);
  require(!grid.levels.empty(), "hash_grid: the settings describe no grid of ", x.size(1), " axes");
  require(grid.offsets.back() + grid.levels.back().size == table.size(0),
          "hash_grid: the table does not fit the geometry");
  require(grid.active_levels >= 0 && grid.active_levels <= grid.n_levels, "hash_grid: active_levels");
  const bool number = x.scalar_type() == ScalarType::Double || x.scalar_type() == ScalarType::Float;
  require(number, "hash_grid: x must be float32 or float64");
  check_contiguous(x, "hash_grid", "x");
  check_contiguous(table, "hash_grid", "table");
  if (counts) {
    check_contiguous(*counts, "hash_grid", "level_counts");
    require(counts->scalar_type() == ScalarType::Int && counts->numel() == x.size(0), "hash_grid: level_counts");
  }
  return grid;
}

void check_like(const Tensor& t, const Tensor& like, int64_t numel, const char* name) {
  check_contiguous(t, "hash_grid", name);
  require(t.scalar_type() == like.scalar_type() && t.numel() == numel, "hash_grid: dtype or size of ", name);
}

// Of a gradient of the value, whose rows may lie apart, but have no gaps inside.
void check_rows(const Tensor& grad, const Tensor& x, const Tensor& table, int64_t width) {
  require(grad.scalar_type() == table.scalar_type() && grad.dim() == 2 && grad.size(0) == x.size(0) &&
              grad.size(1) == width,
          "hash_grid: dtype or shape of grad_y");
  require(grad.is_contiguous() || (grad.stride(1) == 1 && grad.stride(0) >= width), "hash_grid: rows of grad_y");
}

Tensor forward(Tensor x, Tensor table, OptionalTensor counts, Doubles scales, double shift, Ints layout,
               bool ceil_corner, int64_t outside, int64_t interpolation, int64_t active_levels, bool) {
  const Grid grid =
      checked_grid(x, table, counts, {scales, shift, layout, ceil_corner, outside, interpolation, active_levels});
  const Tensor y = in_large_pages(empty(table, {x.size(0), grid.channels()}));
  dispatch("hash_grid", x, table, [&]<class S, class T>(Tag<S>, Tag<T>) {
    const Pass<S, T> pass(grid, x, counts, grid.channels());
    pass.each_chunk([&](const Chunk<S>& chunk) {
      parallel_points(chunk.n, [&](int64_t begin, int64_t end) {
        const bool special = chunk.settle(pass.x(), begin, end);
        pass.each_piece(read<T>(table), begin, end,
                        [&](const Kernels<S, T>& loops, Piece<S, T>& piece, int64_t channel) {
                          piece.y = pass.channel(channel);
                          loops.value(piece);
                        });
        chunk.write_rows(pass.channel(0), 0, write<T>(y), begin, end, special);
      });
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> jacobian(Tensor x, Tensor table, OptionalTensor counts, Doubles scales, double shift,
                                    Ints layout, bool ceil_corner, int64_t outside, int64_t interpolation,
                                    int64_t active_levels, bool) {
  const Grid grid =
      checked_grid(x, table, counts, {scales, shift, layout, ceil_corner, outside, interpolation, active_levels});
  const int64_t width = grid.channels(), dims = grid.dims;
  const Tensor y = in_large_pages(empty(table, {x.size(0), width}));
  const Tensor j = in_large_pages(empty(x, {x.size(0), width, dims}));
  dispatch("hash_grid", x, table, [&]<class S, class T>(Tag<S>, Tag<T>) {
    const Pass<S, T> pass(grid, x, counts, width * (1 + dims));
    pass.each_chunk([&](const Chunk<S>& chunk) {
      parallel_points(chunk.n, [&](int64_t begin, int64_t end) {
        const bool special = chunk.settle(pass.x(), begin, end);
        pass.each_piece(read<T>(table), begin, end,
                        [&](const Kernels<S, T>& loops, Piece<S, T>& piece, int64_t channel) {
                          piece.y = pass.channel(channel);
                          piece.j = pass.channel(width + channel * dims);
                          loops.jacobian(piece);
                        });
        chunk.write_rows(pass.channel(0), 0, write<T>(y), begin, end, special);
        chunk.write_rows(pass.channel(width), int(dims), write<S>(j), begin, end, special);
      });
    });
  });
  return {y, j};
}

// Gradients of <g, y> + <gj, j>; backward of the value alone has no gj.
std::tuple<Tensor, Tensor> value_and_jacobian_backward(const Grid& grid, const OptionalTensor& g,
                                                       const OptionalTensor& gj, const Tensor& x, const Tensor& table,
                                                       const OptionalTensor& counts, const std::vector<bool>& mask) {
  const int64_t width = grid.channels(), dims = grid.dims;
  check_mask("hash_grid", mask, 2);
  if (g) check_rows(*g, x, table, width);
  if (gj) check_like(*gj, x, x.size(0) * width * dims, "grad_jacobian");
  const Tensor gx = mask[0] ? empty_as(x) : empty(x, {0});
  Tensor gtable;
  dispatch("hash_grid", x, table, [&]<class S, class T>(Tag<S>, Tag<T>) {
    // Scratch channels: gradients of the value, of the Jacobian, then of x.
    const int64_t jacobians = g ? width : 0, coordinates = jacobians + (gj ? width * dims : 0);
    const Pass<S, T> pass(grid, x, counts, coordinates + (mask[0] ? dims : 0));
    const TableGradient<T> sums(table, mask[1], x.size(0) == 0);
    const auto point_at = [&](auto& piece, int64_t channel) {
      piece.g = pass.channel(channel);
      piece.gj = pass.channel(jacobians + channel * dims);
      piece.gx = pass.channel(coordinates);
    };
    pass.each_chunk([&](const Chunk<S>& chunk) {
      parallel_points(chunk.n, [&](int64_t begin, int64_t end) {
        const bool special = chunk.settle(pass.x(), begin, end);
        if (g) chunk.read_rows(read<T>(*g), g->stride(0), 0, pass.channel(0), begin, end, special);
        if (gj) chunk.read_rows(read<S>(*gj), width * dims, int(dims), pass.channel(jacobians), begin, end, special);
        if (!mask[0]) return;
        chunk.clear(pass.channel(coordinates), dims, begin, end);
        pass.each_piece(read<T>(table), begin, end,
                        [&](const Kernels<S, T>& loops, Piece<S, T>& piece, int64_t channel) {
                          point_at(piece, channel);
                          if (g) loops.backward_x(piece);
                          if (gj) loops.jacobian_backward_x(piece);
                        });
        chunk.write_coordinates(pass.channel(coordinates), write<S>(gx), begin, end, special);
      });
      if (!mask[1]) return;
      pass.each_owned_piece(chunk, sums.sums(), [&](const Kernels<S, T>& loops, auto& piece, int64_t channel) {
        point_at(piece, channel);
        if (g) loops.backward_table(piece);
        if (gj) loops.jacobian_backward_table(piece);
      });
    });
    gtable = sums.rounded();
  });
  return {gx, gtable};
}

std::tuple<Tensor, Tensor> backward(Tensor grad, Tensor x, Tensor table, OptionalTensor counts, Doubles scales,
                                    double shift, Ints layout, bool ceil_corner, int64_t outside, int64_t interpolation,
                                    int64_t active_levels, bool, std::vector<bool> mask) {
  const Grid grid =
      checked_grid(x, table, counts, {scales, shift, layout, ceil_corner, outside, interpolation, active_levels});
  return value_and_jacobian_backward(grid, grad, std::nullopt, x, table, counts, mask);
}

std::tuple<Tensor, Tensor> jacobian_backward(OptionalTensor grad, OptionalTensor grad_jacobian, Tensor x, Tensor table,
                                             OptionalTensor counts, Doubles scales, double shift, Ints layout,
                                             bool ceil_corner, int64_t outside, int64_t interpolation,
                                             int64_t active_levels, bool, std::vector<bool> mask) {
  const Grid grid =
      checked_grid(x, table, counts, {scales, shift, layout, ceil_corner, outside, interpolation, active_levels});
  return value_and_jacobian_backward(grid, grad, grad_jacobian, x, table, counts, mask);
}

std::tuple<Tensor, Tensor, Tensor> backward_backward(OptionalTensor ggx, OptionalTensor ggtable, Tensor grad, Tensor x,
                                                     Tensor table, OptionalTensor counts, Doubles scales, double shift,
                                                     Ints layout, bool ceil_corner, int64_t outside,
                                                     int64_t interpolation, int64_t active_levels, bool,
                                                     std::vector<bool> mask) {
  const Grid grid =
      checked_grid(x, table, counts, {scales, shift, layout, ceil_corner, outside, interpolation, active_levels});
  const int64_t width = grid.channels(), dims = grid.dims;
  check_mask("hash_grid", mask, 3);
  check_rows(grad, x, table, width);
  if (ggx) check_like(*ggx, x, x.numel(), "ggx");
  if (ggtable) check_like(*ggtable, table, table.numel(), "ggtable");
  const Tensor ggrad = mask[0] ? in_large_pages(empty_as(grad)) : empty(grad, {0});
  const Tensor gx = mask[1] ? empty_as(x) : empty(x, {0});
  Tensor gtable;
  dispatch("hash_grid", x, table, [&]<class S, class T>(Tag<S>, Tag<T>) {
    const int64_t second = width, along = 2 * width, coordinates = along + dims;  // scratch behind the gradient
    const Pass<S, T> pass(grid, x, counts, coordinates + dims);
    const TableGradient<T> sums(table, mask[2], x.size(0) == 0 || !ggx);
    const auto point_at = [&](auto& piece, int64_t channel) {
      piece.g = pass.channel(channel);
      piece.y = pass.channel(second + channel);
      piece.v = pass.channel(along);
      piece.gx = pass.channel(coordinates);
    };
    const auto with_table = [&](const Kernels<S, T>& loops, Piece<S, T>& piece, int64_t channel) {
      point_at(piece, channel);
      if (mask[0]) loops.along(piece);
      if (mask[1]) loops.along_backward_x(piece);
    };
    const auto with_ggtable = [&](const Kernels<S, T>& loops, Piece<S, T>& piece, int64_t channel) {
      point_at(piece, channel);
      if (mask[0]) loops.value(piece);
      if (mask[1]) loops.backward_x(piece);
    };
    pass.each_chunk([&](const Chunk<S>& chunk) {
      parallel_points(chunk.n, [&](int64_t begin, int64_t end) {
        const bool special = chunk.settle(pass.x(), begin, end);
        chunk.read_rows(read<T>(grad), grad.stride(0), 0, pass.channel(0), begin, end, special);
        if (ggx) chunk.read_coordinates(read<S>(*ggx), pass.channel(along), begin, end);
        chunk.clear(pass.channel(second), width, begin, end);
        chunk.clear(pass.channel(coordinates), dims, begin, end);
        if (ggtable) pass.each_piece(read<T>(*ggtable), begin, end, with_ggtable);
        if (ggx) pass.each_piece(read<T>(table), begin, end, with_table);
        if (mask[0]) chunk.write_rows(pass.channel(second), 0, write<T>(ggrad), begin, end, special);
        if (mask[1]) chunk.write_coordinates(pass.channel(coordinates), write<S>(gx), begin, end, special);
      });
      if (!mask[2] || !ggx) return;
      pass.each_owned_piece(chunk, sums.sums(), [&](const Kernels<S, T>& loops, auto& piece, int64_t channel) {
        point_at(piece, channel);
        loops.along_backward_table(piece);
      });
    });
    gtable = sums.rounded();
  });
  return {ggrad, gx, gtable};
}

}  // namespace
}  // namespace camk::cpu

STABLE_TORCH_LIBRARY_IMPL(camkernels, CPU, m) {
  m.impl("hash_grid", TORCH_BOX(&camk::cpu::forward));
  m.impl("hash_grid_backward", TORCH_BOX(&camk::cpu::backward));
  m.impl("hash_grid_backward_backward", TORCH_BOX(&camk::cpu::backward_backward));
  m.impl("hash_grid_jacobian", TORCH_BOX(&camk::cpu::jacobian));
  m.impl("hash_grid_jacobian_backward", TORCH_BOX(&camk::cpu::jacobian_backward));
}

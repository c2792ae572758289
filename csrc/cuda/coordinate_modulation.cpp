// SPDX-License-Identifier: MIT
// The operators of coordinate_modulation on CUDA; schemas and shapes: python/camkernels/coordinate_modulation.py.
#include <cuda_runtime_api.h>

#include "cuda/coordinate_modulation.h"
#include "cuda/repeatable.h"
#include "cuda/stream.h"
#include "launch/coordinate_modulation.h"
#include "torch/seam.h"

namespace camk::cuda {
namespace {

using launch::NodeGrids;
using OptionalTensor = std::optional<Tensor>;
constexpr const char* kOp = "coordinate_modulation";

// The tensors every operator takes, checked, and the measured grids.
struct Call {
  const Tensor& coords;
  const Tensor& grids;
  NodeGrids measured;
  Storage storage;
  CurrentStream stream;

  Call(const Tensor& points, const Tensor& parameters, const launch::LookupOptions& options)
      : coords(points),
        grids(parameters),
        measured(checked(options)),
        storage(storage_of(grids, kOp, "grids")),
        stream(points) {}

  int64_t points() const { return coords.size(0); }
  int64_t numbers() const { return points() * measured.width(); }  // of the value

  void check_like(const OptionalTensor& t, const Tensor& like, int64_t numel, const char* name) const {
    if (!t) return;
    check_contiguous(*t, kOp, name);
    check_same_device(*t, like, kOp, name);
    require(t->scalar_type() == like.scalar_type() && t->numel() == numel, kOp, ": dtype or size of ", name);
  }
  void check(cudaError_t error) const {
    if (error != cudaSuccess) fail(kOp, ": the CUDA kernel could not run: ", explain(error));
  }

  // body(Tag<S>) with the arithmetic type, which is the dtype of the coordinates.
  template <class Body>
  void with_arithmetic(const Body& body) const {
    if (coords.scalar_type() == ScalarType::Double) return body(Tag<double>{});
    body(Tag<float>{});
  }

  template <class S>
  RowLayout layout() const {
    constexpr int64_t kNumbers = kPackBytes / int64_t(sizeof(S));
    RowLayout found{};
    found.nodes = int64_t(measured.grid.rows);
    found.width = uint32_t(measured.width()), found.pitch = uint32_t(divide_up(found.width, kNumbers) * kNumbers);
    found.planes = uint32_t(measured.planes), found.each = uint32_t(measured.each());
    return found;
  }

  // A job without anything but points and grids that are not there yet.
  template <class S>
  LookupJob<S> job() const {
    LookupJob<S> made{};
    made.grid = measured.grid_in<S>(), made.layout = layout<S>();
    made.dims = measured.dims, made.slots = measured.slots;
    made.points = points(), made.storage = storage;
    made.coords = read<S>(coords);
    return made;
  }

  // Packed rows of grids, or of a cotangent; the tensor keeps them alive.
  template <class S>
  Tensor pack(const Tensor& from) const {
    const RowLayout rows = layout<S>();
    const Tensor packed = empty(coords, {rows.numbers()});
    check(launch_pack(rows, from.const_data_ptr(), storage, write<S>(packed), stream.get()));
    return packed;
  }

  // Results of the points that the job asks for, and, where wanted, the gradient in the grids, which is returned:
  // pass(way, job) launches the kernel, once for all where sums need not be repeatable.
  template <class S, class Pass>
  Tensor run(LookupJob<S> job, bool wanted, bool deterministic, const Pass& pass) const {
    if (!wanted || deterministic) {
      if (job.gu || job.y) pass(Sums::kFast, job);
      job.gu = nullptr, job.y = nullptr;
    }
    if (!wanted) return empty(grids, {0});
    const RowLayout rows = layout<S>();
    const Tensor sums = zeros(coords, {rows.numbers()}, coords.scalar_type());
    job.sums = write<S>(sums);
    if (deterministic) {
      sum_repeatably(job, pass);
    } else {
      pass(Sums::kFast, job);
    }
    const Tensor gradient = empty_as(grids);
    check(launch_unpack(rows, read<S>(sums), gradient.mutable_data_ptr(), storage, stream.get()));
    return gradient;
  }

 private:
  template <class S, class Pass>
  void sum_repeatably(LookupJob<S> job, const Pass& pass) const {
    const RepeatableSum repeatable(coords, job.layout.numbers());
    job.fixed = repeatable.fixed(), job.largest = repeatable.largest();
    pass(Sums::kLargest, job);
    pass(Sums::kFixed, job);
    constexpr Storage kind = sizeof(S) == 8 ? Storage::kDouble : Storage::kFloat;
    check(repeatable.finish(job.sums, kind, points() << measured.dims, stream.get()));
  }

  NodeGrids checked(const launch::LookupOptions& options) const {
    const bool wide = coords.scalar_type() == ScalarType::Double;
    require(wide || coords.scalar_type() == ScalarType::Float, kOp, ": coords must be float32 or float64");
    require(wide || storage_of(grids, kOp, "grids") != Storage::kDouble, kOp,
            ": coords must be float64 beside float64 grids");
    check_contiguous(coords, kOp, "coords");
    check_contiguous(grids, kOp, "grids");
    check_same_device(grids, coords, kOp, "grids");
    const NodeGrids found = launch::measure_grids(coords, grids, options);
    require(found.width() < int64_t(1) << 31, kOp,
            ": nodes of 2^31 numbers and more run with backend='reference' only");
    return found;
  }
};

Tensor forward(Tensor coords, Tensor grids, bool zeros, bool align_corners, bool planes, bool) {
  const Call call(coords, grids, {zeros, align_corners, planes});
  const NodeGrids& g = call.measured;
  const Tensor y = g.channels < 0 ? empty(grids, {call.points(), g.layers, 2})
                                  : empty(grids, {call.points(), g.layers, 2, g.channels});
  call.with_arithmetic([&]<class S>(Tag<S>) {
    const Tensor rows = call.pack<S>(grids);
    LookupJob<S> job = call.job<S>();
    job.rows = read<S>(rows), job.y = y.mutable_data_ptr();
    call.check(launch_lookup(job, call.stream.get()));
  });
  return y;
}

std::tuple<Tensor, Tensor> backward(Tensor grad, Tensor coords, Tensor grids, bool zeros, bool align_corners,
                                    bool planes, bool deterministic, std::vector<bool> mask) {
  const Call call(coords, grids, {zeros, align_corners, planes});
  check_mask(kOp, mask, 2);
  call.check_like(grad, grids, call.numbers(), "grad_y");
  const Tensor gu = mask[0] ? empty_as(coords) : empty(coords, {0});
  Tensor ggrids;
  call.with_arithmetic([&]<class S>(Tag<S>) {
    const Tensor rows = mask[0] || planes ? call.pack<S>(grids) : empty(coords, {0});  // sums of one lookup need none
    LookupJob<S> job = call.job<S>();
    job.rows = read<S>(rows), job.g = grad.const_data_ptr();
    if (mask[0]) job.gu = write<S>(gu);
    ggrids = call.run(job, mask[1], deterministic, [&](Sums way, const LookupJob<S>& part) {
      call.check(launch_lookup_backward(part, way, call.stream.get()));
    });
  });
  return {gu, ggrids};
}

std::tuple<Tensor, Tensor, Tensor> backward_backward(OptionalTensor v, OptionalTensor tangents, Tensor grad,
                                                     Tensor coords, Tensor grids, bool zeros, bool align_corners,
                                                     bool planes, bool deterministic, std::vector<bool> mask) {
  const Call call(coords, grids, {zeros, align_corners, planes});
  check_mask(kOp, mask, 3);
  call.check_like(grad, grids, call.numbers(), "grad_y");
  call.check_like(v, coords, coords.numel(), "grad_coords");
  call.check_like(tangents, grids, grids.numel(), "grad_grids");
  const Tensor ggrad = mask[0] ? empty_as(grad) : empty(grad, {0});
  const Tensor gu = mask[1] ? empty_as(coords) : empty(coords, {0});
  Tensor ggrids;
  call.with_arithmetic([&]<class S>(Tag<S>) {
    const Tensor rows = call.pack<S>(grids), along = tangents ? call.pack<S>(*tangents) : empty(coords, {0});
    LookupJob<S> job = call.job<S>();
    job.rows = read<S>(rows), job.g = grad.const_data_ptr();
    if (v) job.v = read<S>(*v);
    if (tangents) job.tangents = read<S>(along);
    if (mask[0]) job.y = ggrad.mutable_data_ptr();
    if (mask[1]) job.gu = write<S>(gu);
    ggrids = call.run(job, mask[2], deterministic, [&](Sums way, const LookupJob<S>& part) {
      call.check(launch_lookup_second_order(part, way, call.stream.get()));
    });
  });
  return {ggrad, gu, ggrids};
}

}  // namespace
}  // namespace camk::cuda

STABLE_TORCH_LIBRARY_IMPL(CAMK_NAMESPACE, CAMK_DISPATCH_KEY, m) {
  m.impl("coordinate_modulation", TORCH_BOX(&camk::cuda::forward));
  m.impl("coordinate_modulation_backward", TORCH_BOX(&camk::cuda::backward));
  m.impl("coordinate_modulation_backward_backward", TORCH_BOX(&camk::cuda::backward_backward));
}

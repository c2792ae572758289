// SPDX-License-Identifier: MIT
// What a layer of the modulated MLP does to a point's row between its products: norm, scale, shift, activation, and
// their derivatives. A warp takes a point; its lanes take channels 32 apart and read only what they wrote themselves.
// Formulas are csrc/math's.
#pragma once
#include "cuda/device.cuh"
#include "cuda/modulated_mlp.h"
#include "cuda/storage.cuh"
#include "math/modulate.h"
#include "math/norm.h"

namespace camk::cuda {

template <class C>
CAMK_HD const Layer& layer_of(const NetworkJob<C>& job, int l) {
  return (job.more ? job.more : job.layer)[l];
}

template <class C>
CAMK_DEVICE C warp_sum(C x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

// body(channel) for those of this lane.
template <class Body>
CAMK_DEVICE void each_channel(int width, const Body& body) {
  for (int c = int(threadIdx.x) % 32; c < width; c += 32) body(c);
}

// Scale and shift of one point in one layer, or what belongs to them: gradients, tangents.
template <class C>
struct Modulation {
  int64_t at;  // of the scale, in the tensor
  int channels;

  // index: of the point in the tensor's rows
  CAMK_DEVICE Modulation(const NetworkJob<C>& job, int64_t index, int layer)
      : at((index * job.hidden + layer) * 2 * job.channels), channels(job.channels) {}
  CAMK_DEVICE int64_t scale(int c) const { return at + (channels == 1 ? 0 : c); }
  CAMK_DEVICE int64_t shift(int c) const { return scale(c) + channels; }
};

// A point's row in one layer.
template <class C>
struct PointLayer {
  const NetworkJob<C>& job;
  const Layer& layer;
  int64_t point;  // of the launch
  C* row;
  int index;  // of the layer
  Modulation<C> place;

  CAMK_DEVICE PointLayer(const NetworkJob<C>& work, int l, int64_t i, C* memory)
      : job(work),
        layer(layer_of(work, l)),
        point(i),
        row(memory),
        index(l),
        place(work, (work.before + i) / work.group, l) {}

  CAMK_DEVICE bool normalised() const { return job.point_norm && layer.modulated; }
  CAMK_DEVICE C read(const void* from, int64_t at) const { return load_number<C>(from, job.modulated, at); }
  CAMK_DEVICE C scale(int c) const {
    return job.modulation && layer.modulated ? read(job.modulation, place.scale(c)) : C(1);
  }
  CAMK_DEVICE C shift(int c) const {
    return job.modulation && layer.modulated ? read(job.modulation, place.shift(c)) : C(0);
  }
  // Tangents of scale and shift.
  CAMK_DEVICE math::ScaleShift<C> along(int c) const {
    if (!job.modulation_tangent || !layer.modulated) return {C(0), C(0)};
    return {read(job.modulation_tangent, place.scale(c)), read(job.modulation_tangent, place.shift(c))};
  }
  // Values of the activation's argument s and its derivatives.
  template <int OrderOf, int I>
  CAMK_DEVICE math::Jet<C> activate(Constant<I> activation, int c, C s) const {
    const bool own = math::Activation{I} == math::Activation::kResidualSine;
    return math::activate<OrderOf>(activation, s, own ? load_readonly(job.frequencies + c) : C(layer.omega));
  }
  // body(Constant<I>, channel)
  template <class Body>
  CAMK_DEVICE void each(const Body& body) const {
    math::with_activation(math::Activation(layer.activation),
                          [&](auto activation) { each_channel(layer.out, [&](int c) { body(activation, c); }); });
  }
  CAMK_DEVICE C mean(C part) const { return warp_sum(part) / C(layer.out); }

  // What the layer gives, into its row; of the last layer into the result, if there is one.
  CAMK_DEVICE void put(int c, int column, C number, bool result) const {
    if (index + 1 < job.layers) {
      row[column + c] = number;
    } else if (result) {
      store_number(job.y, job.weights, (job.before + point) * job.outputs + c, number);
    }
  }

  // W h + b -> n; returns one over its deviation.
  CAMK_DEVICE C normalise() const {
    if (!normalised()) return C(1);
    C* n = row + layer.n;
    C sum(0), squares(0);
    each_channel(layer.out, [&](int c) { sum += n[c]; });
    const C centre = mean(sum);
    each_channel(layer.out, [&](int c) {
      n[c] -= centre;
      squares += n[c] * n[c];
    });
    const C r = math::inverse_deviation(mean(squares), job.eps);
    each_channel(layer.out, [&](int c) { n[c] *= r; });
    return r;
  }

  // Adds up, or writes per channel, the gradient of scale and shift.
  struct ModulationGradient {
    const PointLayer& at;
    C of_scale{}, of_shift{};

    CAMK_DEVICE C* target() const { return at.layer.modulated ? at.job.modulation_points : nullptr; }
    CAMK_DEVICE void add(int c, C scale, C shift) {
      if (at.job.channels == 1) {
        of_scale += scale, of_shift += shift;
      } else if (target()) {
        const Modulation<C> own(at.job, at.point, at.index);
        target()[own.scale(c)] = scale, target()[own.shift(c)] = shift;
      }
    }
    CAMK_DEVICE void finish() {
      if (at.job.channels != 1 || !target()) return;
      of_scale = warp_sum(of_scale), of_shift = warp_sum(of_shift);
      if (threadIdx.x % 32 != 0) return;
      const Modulation<C> own(at.job, at.point, at.index);
      target()[own.scale(0)] = of_scale, target()[own.shift(0)] = of_shift;
    }
  };
};

// The functions below are no part of the kernels that call them: each is compiled once, and registers that the products
// need are free.

// y = f(scale n + shift)
template <class C>
CAMK_NOINLINE __device__ void activate_row(const NetworkJob<C>& job, int l, int64_t point, C* row, bool result) {
  const PointLayer<C> at(job, l, point, row);
  const Layer& layer = at.layer;
  const C r = at.normalise();
  if (layer.deviation >= 0 && threadIdx.x % 32 == 0) row[layer.deviation] = r;
  const C* n = row + layer.n;
  at.each([&](auto activation, int c) {
    at.put(c, layer.y, at.template activate<0>(activation, c, at.scale(c) * n[c] + at.shift(c)).value, result);
  });
}

// Gradient of y, in the row's g -> of W h + b, over n. g is left with other things.
template <class C>
CAMK_NOINLINE __device__ void deactivate_row(const NetworkJob<C>& job, int l, int64_t point, C* row) {
  const PointLayer<C> at(job, l, point, row);
  const Layer& layer = at.layer;
  C *n = row + layer.n, *g = row + job.g_row;
  typename PointLayer<C>::ModulationGradient change{at};
  C sum_w(0), sum_nw(0);
  at.each([&](auto activation, int c) {
    const C scale = at.scale(c);
    const C slope = at.template activate<1>(activation, c, scale * n[c] + at.shift(c)).first;
    const auto of = math::modulate_gradients(scale, n[c], g[c], slope);
    change.add(c, of.scale, of.shift);
    g[c] = of.n;
    sum_w += g[c], sum_nw += n[c] * g[c];
  });
  change.finish();
  if (!at.normalised()) {
    each_channel(layer.out, [&](int c) { n[c] = g[c]; });
    return;
  }
  const C r = row[layer.deviation], mean_w = at.mean(sum_w), mean_nw = at.mean(sum_nw);
  each_channel(layer.out, [&](int c) { n[c] = math::norm_jacobian(g[c], n[c], r, mean_w, mean_nw); });
}

// ---- Together with the tangents ----------------------------------------------------------------------------

// y = f(scale n + shift) with its tangent, which is the result.
template <class C>
CAMK_NOINLINE __device__ void activate_tangent_row(const NetworkJob<C>& job, int l, int64_t point, C* row) {
  const PointLayer<C> at(job, l, point, row);
  const Layer& layer = at.layer;
  const C r = at.normalise();
  const C *n = row + layer.n, *dz = row + layer.dz;
  C* dn = row + layer.dn;
  C mean_dz(0), mean_ndz(0);
  if (at.normalised()) {
    C sum(0), sum_n(0);
    each_channel(layer.out, [&](int c) { sum += dz[c], sum_n += n[c] * dz[c]; });
    mean_dz = at.mean(sum), mean_ndz = at.mean(sum_n);
    if (threadIdx.x % 32 == 0) row[layer.deviation] = r, row[layer.deviation + 1] = mean_ndz;
  }
  at.each([&](auto activation, int c) {
    dn[c] = at.normalised() ? math::norm_jacobian(dz[c], n[c], r, mean_dz, mean_ndz) : dz[c];
    const C scale = at.scale(c);
    const C ds = math::modulate_tangent(scale, at.along(c), n[c], dn[c]);
    const auto f = at.template activate<1>(activation, c, scale * n[c] + at.shift(c));
    at.put(c, layer.y, f.value, false);
    at.put(c, layer.dy, f.first * ds, job.y != nullptr);
  });
}

// Gradients of y, in the row's g, and of dy, in dg -> of W h + b, over n, and of its tangent, over dn.
template <class C>
CAMK_NOINLINE __device__ void deactivate_tangent_row(const NetworkJob<C>& job, int l, int64_t point, C* row) {
  const PointLayer<C> at(job, l, point, row);
  const Layer& layer = at.layer;
  C *n = row + layer.n, *dn = row + layer.dn, *g = row + job.g_row, *dg = row + job.dg_row;
  typename PointLayer<C>::ModulationGradient change{at};
  C sum_v(0), sum_nv(0), sum_vdn(0);
  at.each([&](auto activation, int c) {
    const C scale = at.scale(c);
    const math::ScaleShift<C> along = at.along(c);
    const auto f = at.template activate<2>(activation, c, scale * n[c] + at.shift(c));
    const auto ct = math::tangent_cotangents(dg[c], math::modulate_tangent(scale, along, n[c], dn[c]), f);
    const C of_s = math::add_present(g[c], f.first, ct.s);
    const auto of = math::tangent_gradients(scale, along.scale, n[c], dn[c], of_s, ct.ds);
    change.add(c, of.scale, of.shift);
    g[c] = of.n, dg[c] = of.dn;
    sum_v += dg[c], sum_nv += n[c] * dg[c], sum_vdn += dg[c] * dn[c];
  });
  change.finish();
  if (!at.normalised()) {
    each_channel(layer.out, [&](int c) { n[c] = g[c], dn[c] = dg[c]; });
    return;
  }
  const C r = row[layer.deviation], mean_ndz = row[layer.deviation + 1];
  const C mean_v = at.mean(sum_v), mean_nv = at.mean(sum_nv);
  const C rest = math::norm_second_order_rest(r, at.mean(sum_vdn));
  const C* dz = row + layer.dz;
  C sum_w(0), sum_nw(0);
  each_channel(layer.out, [&](int c) {
    g[c] = math::norm_second_order(g[c], dg[c], dz[c], r, mean_ndz, mean_nv);
    sum_w += g[c], sum_nw += n[c] * g[c];
  });
  const C mean_w = at.mean(sum_w), mean_nw = at.mean(sum_nw);
  each_channel(layer.out, [&](int c) {
    dn[c] = math::norm_jacobian(dg[c], n[c], r, mean_v, mean_nv);
    n[c] = math::norm_jacobian(g[c], n[c], r, mean_w, mean_nw) + rest * n[c];
  });
}

}  // namespace camk::cuda

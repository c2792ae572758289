// SPDX-License-Identifier: MIT
// A group of modulate, which a team of threads works on: a warp, or for long groups a block. Its numbers are read again
// in every pass, from the cache if they fit. Formulas are csrc/math's.
#pragma once
#include "cuda/device.cuh"
#include "cuda/modulate.h"
#include "cuda/storage.cuh"
#include "math/modulate.h"
#include "math/norm.h"

namespace camk::cuda {

inline constexpr int kWarpTeam = 32, kBlockTeam = 256;
inline constexpr int kMostSums = 7;  // that a team takes at once

template <class C, int kThreads>
struct Team {
  C* part;  // of a block: [kMostSums, warps] in shared memory

  CAMK_DEVICE static int thread() { return int(threadIdx.x) % kThreads; }

  // The sums over the team's threads, to all of them.
  template <int N>
  CAMK_DEVICE Vec<C, N> sum(Vec<C, N> x) const {
    unroll<N>([&](auto i) {
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) x[i] += __shfl_xor_sync(0xffffffffu, x[i], distance);
    });
    if constexpr (kThreads > 32) {
      constexpr int kWarps = kThreads / 32;
      if (threadIdx.x % 32 == 0) unroll<N>([&](auto i) { part[i * kWarps + threadIdx.x / 32] = x[i]; });
      __syncthreads();
      unroll<N>([&](auto i) {
        x[i] = C(0);
        for (int warp = 0; warp < kWarps; ++warp) x[i] += part[i * kWarps + warp];
      });
      __syncthreads();
    }
    return x;
  }
};

// Scale or shift of a group, and what is added to its gradient.
template <class C, int kThreads>
struct GroupItem {
  const SharedItems<C>& items;
  const C *values, *along;
  C* gradient;
  bool fresh;  // nothing has been added to the gradient
  C sum = C(0);

  CAMK_DEVICE GroupItem(const SharedItems<C>& all, const GroupPieces& pieces, int64_t piece, int64_t group)
      : items(all) {
    const int64_t item = group / all.share, at = item * all.numbers();
    values = all.values + at;
    along = all.along ? all.along + at : nullptr;
    fresh = group == pieces.begin(piece) || group % all.share == 0;
    gradient = nullptr;
    if (all.gradient == nullptr) return;
    gradient = pieces.holds(piece, item, all.share) ? all.gradient + at
                                                    : all.edges + pieces.edge(piece, item, all.share) * all.numbers();
  }

  CAMK_DEVICE int64_t at(int64_t row, int64_t k) const {
    return (items.rows > 1 ? row * items.width : 0) + (items.width > 1 ? k : 0);
  }
  CAMK_DEVICE C value(int64_t row, int64_t k) const { return load_readonly(values + at(row, k)); }
  CAMK_DEVICE C tangent(int64_t row, int64_t k) const { return along ? load_readonly(along + at(row, k)) : C(0); }

  CAMK_DEVICE void put(int64_t row, int64_t k, C more) const {
    C& to = gradient[at(row, k)];
    to = fresh && (items.rows > 1 || row == 0) ? more : to + more;
  }
  // A column always belongs to the same thread.
  CAMK_DEVICE void add(int64_t row, int64_t k, C more) {
    if (items.width == 1) {
      sum += more;
    } else if (gradient) {
      put(row, k, more);
    }
  }
  CAMK_DEVICE void end_row(const Team<C, kThreads>& team, int64_t row, bool last) {
    if (gradient == nullptr || items.width > 1 || (items.rows == 1 && !last)) return;
    const C total = team.template sum<1>({{sum}})[0];
    if (team.thread() == 0) put(items.rows > 1 ? row : 0, 0, total);
    sum = C(0);
  }
};

template <class C, int kThreads>
struct GroupWork {
  const ModulateJob<C>& job;
  Team<C, kThreads> team;
  int64_t group, first;  // first: of its numbers
  GroupItem<C, kThreads> scale, shift;
  C centre, r;  // n = (h - centre) r

  CAMK_DEVICE GroupWork(const ModulateJob<C>& work, C* part, int64_t piece, int64_t index)
      : job(work),
        team{part},
        group(index),
        first(index * work.rows * work.width),
        scale(work.scale, work.pieces, piece, index),
        shift(work.shift, work.pieces, piece, index),
        centre(0),
        r(1) {
    if (!job.norm) return;
    centre = mean(sums<1>([&](int64_t at, Vec<C, 1>& sum) { sum[0] += read(job.h, at); })[0]);
    const auto squares = sums<1>([&](int64_t at, Vec<C, 1>& sum) {
      const C c = read(job.h, at) - centre;
      sum[0] += c * c;
    });
    r = math::inverse_deviation(mean(squares[0]), job.eps);
  }

  CAMK_DEVICE C read(const void* from, int64_t at) const { return load_number<C>(from, job.storage, first + at); }
  CAMK_DEVICE void store(void* to, int64_t at, C number) const { store_number(to, job.storage, first + at, number); }
  CAMK_DEVICE C mean(C sum) const { return sum / C(job.rows * job.width); }
  CAMK_DEVICE C normalised(int64_t at) const { return (read(job.h, at) - centre) * r; }
  CAMK_DEVICE C tangent(int64_t at) const { return job.h_along ? read(job.h_along, at) : C(0); }
  CAMK_DEVICE math::ScaleShift<C> modulation(int64_t row, int64_t k) const {
    return {scale.value(row, k), shift.value(row, k)};
  }
  // f and its derivatives at s
  template <int kOrder, int I>
  CAMK_DEVICE math::Jet<C> activate(Constant<I> f, int64_t k, C s) const {
    C rate = job.omega;
    if constexpr (math::Activation{I} == math::Activation::kResidualSine) {
      rate = load_readonly(job.frequencies + (job.frequency_per_group ? group % job.frequency_count : k));
    }
    return math::activate<kOrder>(f, s, rate);
  }

  // body(row, column, where the number lies in the group) for those of this thread; end(row) after each row.
  template <class Body, class End>
  CAMK_DEVICE void each(const Body& body, const End& end) const {
#pragma unroll 1
    for (int64_t row = 0; row < job.rows; ++row) {
#pragma unroll 1
      for (int64_t k = team.thread(); k < job.width; k += kThreads) body(row, k, row * job.width + k);
      end(row);
    }
  }
  // The same with the activation.
  template <class Body, class End>
  CAMK_DEVICE void each_activated(const Body& body, const End& end) const {
    math::with_activation(math::Activation(job.activation),
                          [&](auto f) { each([&](int64_t row, int64_t k, int64_t at) { body(f, row, k, at); }, end); });
  }
  // Sums over the group: body(where a number lies, sums) adds to them.
  template <int N, class Body>
  CAMK_DEVICE Vec<C, N> sums(const Body& body) const {
    Vec<C, N> part{};
    each([&](int64_t, int64_t, int64_t at) { body(at, part); }, [](int64_t) {});
    return team.sum(part);
  }

  CAMK_DEVICE void value() const {
    each_activated(
        [&](auto f, int64_t row, int64_t k, int64_t at) {
          const C s = modulation(row, k)(normalised(at));
          store(job.y, at, activate<0>(f, k, s).value);
        },
        [](int64_t) {});
  }

  CAMK_DEVICE void end_row(int64_t row) {
    scale.end_row(team, row, row + 1 == job.rows), shift.end_row(team, row, row + 1 == job.rows);
  }

  template <class F>
  CAMK_DEVICE math::ModulateGradients<C> gradients_at(F f, int64_t row, int64_t k, int64_t at, C n) const {
    const math::ScaleShift<C> m = modulation(row, k);
    return math::modulate_gradients(m.scale, n, read(job.g, at), activate<1>(f, k, m(n)).first);
  }

  CAMK_DEVICE void gradients() {
    Vec<C, 2> part{};  // of w and n w, w the gradient of n
    each_activated(
        [&](auto f, int64_t row, int64_t k, int64_t at) {
          const C n = normalised(at);
          const auto found = gradients_at(f, row, k, at, n);
          scale.add(row, k, found.scale), shift.add(row, k, found.shift);
          part[0] += found.n, part[1] += n * found.n;
          if (job.gh && !job.norm) store(job.gh, at, found.n);
        },
        [&](int64_t row) { end_row(row); });
    if (!job.gh || !job.norm) return;
    const Vec<C, 2> total = team.sum(part);
    const C mean_w = mean(total[0]), mean_nw = mean(total[1]);
    each_activated(
        [&](auto f, int64_t row, int64_t k, int64_t at) {
          const C n = normalised(at);
          store(job.gh, at, math::norm_jacobian(gradients_at(f, row, k, at, n).n, n, r, mean_w, mean_nw));
        },
        [](int64_t) {});
  }

  // Means of the tangent t of h, and of n t.
  struct TangentMeans {
    C t, nt;
  };
  CAMK_DEVICE C tangent_of_n(C t, C n, const TangentMeans& means) const {
    return job.norm ? math::norm_jacobian(t, n, r, means.t, means.nt) : t;
  }
  struct SecondOrder {
    C g;
    math::TangentGradients<C> of;
  };
  template <class F>
  CAMK_DEVICE SecondOrder second_order_at(F f, int64_t row, int64_t k, int64_t at, C n, C dn) const {
    const math::ScaleShift<C> m = modulation(row, k), along{scale.tangent(row, k), shift.tangent(row, k)};
    const C ds = math::modulate_tangent(m.scale, along, n, dn);
    const auto of = math::tangent_cotangents(read(job.g, at), ds, activate<2>(f, k, m(n)));
    return {of.g, math::tangent_gradients(m.scale, along.scale, n, dn, of.s, of.ds)};
  }

  CAMK_DEVICE void second_order() {
    TangentMeans means{};
    if (job.norm && job.h_along) {
      const auto sum = sums<2>([&](int64_t at, Vec<C, 2>& part) {
        const C t = tangent(at);
        part[0] += t, part[1] += normalised(at) * t;
      });
      means = {mean(sum[0]), mean(sum[1])};
    }
    Vec<C, 5> part{};  // of u, n u, v, n v, v dn: u and v are the gradients of n and dn
    each_activated(
        [&](auto f, int64_t row, int64_t k, int64_t at) {
          const C n = normalised(at), dn = tangent_of_n(tangent(at), n, means);
          const auto found = second_order_at(f, row, k, at, n, dn);
          scale.add(row, k, found.of.scale), shift.add(row, k, found.of.shift);
          part[0] += found.of.n, part[1] += n * found.of.n;
          part[2] += found.of.dn, part[3] += n * found.of.dn, part[4] += found.of.dn * dn;
          if (job.y) store(job.y, at, found.g);
          if (job.gh && !job.norm) store(job.gh, at, found.of.n);
        },
        [&](int64_t row) { end_row(row); });
    if (job.gh && job.norm) through_norm(means, team.sum(part));
  }

  CAMK_DEVICE void through_norm(const TangentMeans& means, const Vec<C, 5>& total) const {
    const C mean_v = mean(total[2]), mean_nv = mean(total[3]);
    const C rest = math::norm_second_order_rest(r, mean(total[4]));
    const C mean_w = math::norm_second_order(mean(total[0]), mean_v, means.t, r, means.nt, mean_nv);
    const C mean_nw = math::norm_second_order(mean(total[1]), mean_nv, means.nt, r, means.nt, mean_nv);
    each_activated(
        [&](auto f, int64_t row, int64_t k, int64_t at) {
          const C n = normalised(at), t = tangent(at);
          const auto found = second_order_at(f, row, k, at, n, tangent_of_n(t, n, means));
          const C w = math::norm_second_order(found.of.n, found.of.dn, t, r, means.nt, mean_nv);
          store(job.gh, at, math::norm_jacobian(w, n, r, mean_w, mean_nw) + rest * n);
        },
        [](int64_t) {});
  }
};

}  // namespace camk::cuda

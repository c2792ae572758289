// SPDX-License-Identifier: MIT
// The operators of the modulated MLP on CUDA; schemas and shapes: python/camkernels/modulated_mlp.py. Nothing is kept
// for the derivatives: their kernels compute the values anew.
#include <algorithm>

#include "cuda/modulated_mlp_call.h"

namespace camk::cuda {
namespace {

// Estimated, not measured: rows of a launch that stay in the L2 cache until the sums over points read them.
constexpr int64_t kRowBytesPerMultiprocessor = 512 << 10;

struct Wishes {
  bool y, x, weights, biases, modulation;
};

struct Results {
  Tensor y, x;
  Tensors weights, biases;
  Tensor modulation;
};

// ---- kernels -------------------------------------------------------------------------------------------------------

// For any network.
template <class C>
struct General {
  using Number = C;

  static void value(Call& call, NetworkJob<C>& job) {
    assign_places(call.layers, job);
    const int blocks = forward_blocks(job);
    const Tensor rows = empty(call.x, {blocks * kTileRows * job.stride}, call.number_type());
    if (blocks > 0) job.rows = write<C>(rows);
    const Tensor records = call.place_layers(job);
    call.check(launch_forward(job, call.stream.get()));
  }

  // Columns of a row: what every layer leaves for the way back, and gradients.
  static void assign_columns(std::vector<Layer>& layers, NetworkJob<C>& job, Order order) {
    int next = 0;
    const auto take = [&](int count) { return std::exchange(next, next + count); };
    for (size_t l = 0; l < layers.size(); ++l) {
      Layer& layer = layers[l];
      const int given = l + 1 < layers.size() ? layer.out : 0;
      layer.n = take(layer.out), layer.y = take(given);
      layer.deviation = job.point_norm && layer.modulated ? take(2) : -1;
      if (order == Order::kSecond) layer.dn = take(layer.out), layer.dz = take(layer.out), layer.dy = take(given);
    }
    job.g_row = take(job.widest), job.gx_row = take(job.features);
    if (order == Order::kSecond) job.dg_row = take(job.widest);
    job.stride = next;
  }

  // Whole tiles: at least one for every multiprocessor.
  static int64_t points_per_launch(const NetworkJob<C>& job) {
    const int64_t processors = device_number(cudaDevAttrMultiProcessorCount);
    const int64_t fitting = processors * kRowBytesPerMultiprocessor / (job.stride * int64_t(sizeof(C)));
    const int64_t most = std::max(fitting / kTileRows, processors) * kTileRows;
    return std::min(most, divide_up(job.points, kTileRows) * kTileRows);
  }

  // Weights are read where they are.
  static Tensor pack(const Call& call, NetworkJob<C>&, bool) { return scratch_bytes(call.x, 0); }
  static int splits(NetworkJob<C>& job, int64_t points) { return splits_for(job, points); }
  static void derivatives(const Call& call, const NetworkJob<C>& job, Order order) {
    call.check(launch_backward(job, order, call.stream.get()));
  }
  static void sums(const Call& call, const NetworkJob<C>& job, Order order) {
    call.check(launch_weight_sums(job, order, call.stream.get()));
  }

 private:
  // Columns of a row of the forward pass: two places, into which the results of every layer come. Those that products
  // read from shared memory lie in words of 16 bytes, rows 4 banks apart.
  static void assign_places(std::vector<Layer>& layers, NetworkJob<C>& job) {
    constexpr int64_t kBanks = 32;
    for (Layer& layer : layers) layer.y = 0, layer.n = job.widest, layer.deviation = -1;
    job.stride = divide_up(2 * job.widest, kBanks) * kBanks + 4;
  }
};

// For narrow layers in float32, but for second derivatives.
struct Fused {
  using Number = float;

  static void value(const Call& call, NetworkJob<float>& job) {
    std::copy_n(call.layers.begin(), job.layers, job.layer);
    const Tensor packed = pack(call, job, false);
    call.check(launch_fused_forward(job, call.stream.get()));
  }

  // In whole steps of 16.
  static void assign_columns(std::vector<Layer>& layers, NetworkJob<float>& job, Order) {
    int next = 0;
    const auto take = [&](int count) { return std::exchange(next, next + int(divide_up(count, 16)) * 16); };
    for (size_t l = 0; l < layers.size(); ++l) {
      Layer& layer = layers[l];
      layer.n = take(layer.out), layer.y = l + 1 < layers.size() ? take(layer.out) : -1;
      layer.dn = layer.activation > int(math::Activation::kRelu) ? take(layer.out) : -1;
      layer.deviation = job.point_norm && layer.modulated ? take(1) : -1;
    }
    job.x_row = job.whole_words && job.coordinates == Storage::kFloat ? -1 : take(job.features);
    job.gx_row = take(job.features);
    job.stride = next;
  }

  static int64_t points_per_launch(const NetworkJob<float>& job) { return fused_points_per_launch(job); }
  // The weights in the order of their use; back: for gradients too.
  static Tensor pack(const Call& call, NetworkJob<float>& job, bool back) {
    Tensor packed = scratch_bytes(call.x, packed_bytes(job, back));
    call.check(launch_pack(job, packed.mutable_data_ptr(), back, call.stream.get()));
    return packed;
  }
  static int splits(NetworkJob<float>& job, int64_t points) { return fused_splits(job, points); }
  static void derivatives(const Call& call, const NetworkJob<float>& job, Order) {
    call.check(launch_fused_gradients(job, call.stream.get()));
  }
  static void sums(const Call& call, const NetworkJob<float>& job, Order) {
    call.check(launch_point_sums(job, call.stream.get()));
  }
};

// body(the kernels of a call)
template <class Body>
auto with_kernels(const Call& call, Order order, const Body& body) {
  if (call.is_wide()) return body(General<double>{});
  if (order != Order::kSecond && is_fused(call.job<float>())) return body(Fused{});
  return body(General<float>{});
}

Tensor value(Call& call) {
  const Tensor y = empty(call.weights[0], {call.points(), call.outputs()});
  if (call.points() == 0) return y;
  with_kernels(call, Order::kValue, [&]<class Kernels>(Kernels) {
    auto job = call.job<typename Kernels::Number>();
    job.y = y.mutable_data_ptr();
    Kernels::value(call, job);
  });
  return y;
}

// ---- derivatives ---------------------------------------------------------------------------------------------------

// One pass: results, scratch memory, and launches over parts of the points.
template <class Kernels>
class Derivatives {
 public:
  using C = typename Kernels::Number;
  Results results;

  Derivatives(Call& call, Order order, const Tensor& g, const Wishes& wishes) : call_(call), order_(order) {
    job_ = call.job<C>();
    Kernels::assign_columns(call.layers, job_, order);
    job_.g = g.const_data_ptr();
    results.y = wishes.y ? fresh(g) : empty(g, {0});
    results.x = wishes.x ? fresh(call.x) : empty(call.x, {0});
    if (wishes.y) job_.y = results.y.mutable_data_ptr();
    if (wishes.x) job_.gx = results.x.mutable_data_ptr();
    for (size_t l = 0; l < call.layers.size(); ++l) {
      Layer& layer = call.layers[l];
      if (wishes.weights) layer.weight_gradient = add(results.weights, call.weights[l]);
      if (wishes.biases) layer.bias_gradient = add(results.biases, call.biases[l]);
    }
    with_sums_ = wishes.weights || wishes.biases;
    with_modulation_ = wishes.modulation;
    if (with_modulation_) results.modulation = fresh(*call.modulation);
  }

  void run(const Tangents* along) {
    if (call_.points() == 0) return;
    if (along) set_directions(*along);
    const int64_t per_launch = Kernels::points_per_launch(job_);
    const Tensor rows = numbers(per_launch * job_.stride);
    job_.rows = write<C>(rows);
    place_sums();
    const Tensor records = call_.place_layers(job_), packed = Kernels::pack(call_, job_, true);
    const Tensor sums = plan_sums(std::min(per_launch, call_.points()));
    plan_modulation(per_launch);
    for (int64_t before = 0; before < call_.points(); before += per_launch) run_part(before, per_launch);
    if (with_sums_) call_.check(launch_weight_gradients(job_, stream()));
    if (groups_ && !same_) store(*groups_, 0, call_.modulation->numel());
  }

 private:
  Call& call_;
  Order order_;
  NetworkJob<C> job_;
  bool with_sums_, with_modulation_;
  bool same_ = true;                       // gradients of the modulation are stored as C
  std::optional<Tensor> points_, groups_;  // gradients of the modulation: of each point, sums of groups

  cudaStream_t stream() const { return call_.stream.get(); }
  Tensor numbers(int64_t count) const { return empty(call_.x, {count}, call_.number_type()); }
  Tensor fresh(const Tensor& t) const {
    return call_.points() == 0 ? zeros(t, t.sizes(), t.scalar_type()) : empty_as(t);
  }
  void* add(Tensors& list, const Tensor& like) const {
    list.push_back(fresh(like));
    return list.back().mutable_data_ptr();
  }

  void set_directions(const Tangents& along) {
    if (along.x) job_.x_tangent = along.x->const_data_ptr();
    if (along.modulation) job_.modulation_tangent = along.modulation->const_data_ptr();
    for (size_t l = 0; l < call_.layers.size(); ++l) {
      if (!along.weights.empty()) call_.layers[l].weight_tangent = along.weights[l].const_data_ptr();
      if (!along.biases.empty()) call_.layers[l].bias_tangent = along.biases[l].const_data_ptr();
    }
  }

  void place_sums() {
    for (Layer& layer : call_.layers) {
      layer.sums = job_.weight_sums;
      const int64_t count = int64_t(layer.out) * (layer.in + 1);
      job_.weight_sums += count, job_.most_sums = std::max(job_.most_sums, count);
      job_.sum_tiles += divide_up(layer.out, kTileRows) * divide_up(layer.in, kTileRows);
    }
  }

  Tensor plan_sums(int64_t points) {
    if (with_sums_) job_.splits = Kernels::splits(job_, points);
    const Tensor sums = numbers(job_.splits * job_.weight_sums);
    job_.sums = write<C>(sums);
    return sums;
  }

  void plan_modulation(int64_t per_launch) {
    if (!with_modulation_) return;
    same_ = call_.modulation->scalar_type() == call_.number_type();
    if (same_ && job_.group == 1) return;
    points_ = numbers(per_launch * modulation_values(job_));
    job_.modulation_points = write<C>(*points_);
    if (job_.group > 1) groups_ = same_ ? results.modulation : numbers(call_.modulation->numel());
  }

  void run_part(int64_t before, int64_t per_launch) {
    const int64_t values = modulation_values(job_);
    job_.before = before, job_.points = std::min(per_launch, call_.points() - before);
    job_.accumulate = before > 0;
    if (with_modulation_ && !points_) job_.modulation_points = write<C>(results.modulation) + before * values;
    Kernels::derivatives(call_, job_, order_);
    if (with_sums_) Kernels::sums(call_, job_, order_);
    if (groups_) {
      call_.check(launch_group_sums(job_, write<C>(*groups_), stream()));
    } else if (points_) {
      store(*points_, before * values, job_.points * values);
    }
  }

  void store(const Tensor& from, int64_t offset, int64_t count) {
    const Storage kind = storage_of(results.modulation, "modulated_mlp", "modulation");
    auto* to = static_cast<char*>(results.modulation.mutable_data_ptr()) + offset * bytes_of(kind);
    call_.check(launch_store(read<C>(from), to, kind, count, stream()));
  }
};

Results derivatives(Call& call, Order order, const Tensor& g, const Tangents* along, const Wishes& wishes) {
  return with_kernels(call, order, [&]<class Kernels>(Kernels) {
    Derivatives<Kernels> pass(call, order, g, wishes);
    pass.run(along);
    return pass.results;
  });
}

// ---- operators -----------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> forward(Tensor x, Tensors weights, Tensors biases, OptionalTensor modulation,
                                   OptionalTensor frequencies, Ints activations, Doubles omegas, Bools skips,
                                   bool output_layer, bool point_norm, double eps, bool tf32, bool, bool, bool) {
  Call call(x, weights, biases, modulation, frequencies,
            {activations, omegas, skips, output_layer, point_norm, eps, tf32});
  return {value(call), empty(x, {0}, call.number_type())};
}

std::tuple<Tensor, Tensors, Tensors, Tensor> backward(Tensor g, Tensor x, Tensors weights, Tensors biases,
                                                      OptionalTensor modulation, OptionalTensor frequencies, Tensor,
                                                      Ints activations, Doubles omegas, Bools skips, bool output_layer,
                                                      bool point_norm, double eps, bool tf32, bool, bool, bool,
                                                      Bools mask) {
  Call call(x, weights, biases, modulation, frequencies,
            {activations, omegas, skips, output_layer, point_norm, eps, tf32});
  call.check_gradient(g);
  Results found = derivatives(call, Order::kGradients, g, nullptr, {false, mask[0], mask[1], mask[2], mask[3]});
  if (!mask[3]) found.modulation = empty(modulation ? *modulation : g, {0});
  return {found.x, found.weights, found.biases, found.modulation};
}

std::tuple<Tensor, Tensor, Tensors, Tensors, Tensor> backward_backward(
    OptionalTensor x_tangent, Tensors weight_tangents, Tensors bias_tangents, OptionalTensor modulation_tangent,
    Tensor g, Tensor x, Tensors weights, Tensors biases, OptionalTensor modulation, OptionalTensor frequencies, Tensor,
    Ints activations, Doubles omegas, Bools skips, bool output_layer, bool point_norm, double eps, bool tf32, bool,
    bool, bool, Bools mask) {
  Call call(x, weights, biases, modulation, frequencies,
            {activations, omegas, skips, output_layer, point_norm, eps, tf32});
  call.check_gradient(g);
  call.check_like(x_tangent, x, "grad_x");
  call.check_like(weight_tangents, weights, "grad_weights");
  call.check_like(bias_tangents, biases, "grad_biases");
  if (modulation) call.check_like(modulation_tangent, *modulation, "grad_modulation");
  const Tangents along{x_tangent, weight_tangents, bias_tangents, modulation_tangent};
  Results found = derivatives(call, Order::kSecond, g, &along, {mask[0], mask[1], mask[2], mask[3], mask[4]});
  if (!mask[4]) found.modulation = empty(modulation ? *modulation : x_tangent ? *x_tangent : g, {0});
  return {found.y, found.x, found.weights, found.biases, found.modulation};
}

}  // namespace
}  // namespace camk::cuda

STABLE_TORCH_LIBRARY_IMPL(CAMK_NAMESPACE, CAMK_DISPATCH_KEY, m) {
  m.impl("modulated_mlp", TORCH_BOX(&camk::cuda::forward));
  m.impl("modulated_mlp_backward", TORCH_BOX(&camk::cuda::backward));
  m.impl("modulated_mlp_backward_backward", TORCH_BOX(&camk::cuda::backward_backward));
}

// SPDX-License-Identifier: MIT
// The operators of the modulated MLP on the CPU; schemas and shapes: python/camkernels/modulated_mlp.py. The setting
// `deterministic` changes nothing here: sums have one order for any number of threads.
#include "cpu/memory.h"
#include "cpu/modulated_mlp_second_order.h"

namespace camk::cpu {
namespace {

using Ints = std::vector<int64_t>;
using Doubles1 = std::vector<double>;
using Bools = std::vector<bool>;

// ---- checks ---------------------------------------------------------------------------------------------------------

// Whether the arithmetic is float64: where a tensor is.
bool any_wide(const Tensor& x, const TensorList& weights, const OptionalTensor& modulation,
              const OptionalTensor& frequencies) {
  return is_wide(x) || is_wide(weights[0]) || (modulation && is_wide(*modulation)) ||
         (frequencies && is_wide(*frequencies));
}

void check(const Tensor& x, const TensorList& weights, const TensorList& biases, const OptionalTensor& modulation,
           const OptionalTensor& frequencies, const NetLists& lists) {
  const char* op = kMlp;
  const size_t layers = weights.size();
  require(x.dim() == 2 && layers > 0, op, ": x must have 2 dimensions, and there must be weights");
  require(lists.activations.size() == layers && lists.omegas.size() == layers && lists.skips.size() == layers, op,
          ": settings of another number of layers");
  require(biases.empty() || biases.size() == layers, op, ": biases of another number of layers");
  check_contiguous(x, op, "x");
  int64_t given = x.size(1), width = 0;
  for (size_t l = 0; l < layers; ++l) {
    const Tensor& w = weights[l];
    require(w.dim() == 2 && w.size(1) == given && w.size(0) > 0, op, ": shape of weights[", l, "]");
    check_contiguous(w, op, "weights");
    width = w.size(0), given = width + (lists.skips[l] ? x.size(1) : 0);
    require(biases.empty() || biases[l].numel() == width, op, ": shape of biases[", l, "]");
    if (!biases.empty()) check_contiguous(biases[l], op, "biases");
    const bool waves = math::Activation(lists.activations[l]) == math::Activation::kResidualSine;
    require(lists.activations[l] >= 0 && lists.activations[l] < math::kActivations, op, ": activation ", l);
    require(!waves || (frequencies && frequencies->numel() == width), op, ": frequencies");
  }
  if (!modulation) return;
  const int64_t groups = modulation->size(0), hidden = int64_t(layers) - lists.output_layer;
  check_contiguous(*modulation, op, "modulation");
  require(modulation->dim() == 3 || modulation->dim() == 4, op, ": modulation must have 3 or 4 dimensions");
  require(modulation->size(1) == hidden && modulation->size(2) == 2, op, ": shape of modulation");
  require(groups > 0 ? x.size(0) % groups == 0 : x.size(0) == 0, op, ": rows of modulation must divide those of x");
  for (int64_t l = 0; l < hidden && modulation->dim() == 4; ++l) {
    require(weights[l].size(0) == modulation->size(3), op, ": channels of modulation");
  }
}

void check_like(const OptionalTensor& t, const Tensor& like, const char* name) {
  if (!t) return;
  check_contiguous(*t, kMlp, name);
  require(t->numel() == like.numel(), kMlp, ": size of ", name);
}

// ---- work over points -----------------------------------------------------------------------------------------------

// body(first point, number of points) for every tile of a range.
template <class Body>
void each_tile(int64_t begin, int64_t end, const Body& body) {
  for (; begin < end; begin += kTile) body(begin, std::min(kTile, end - begin));
}

// Points in parts that keep sums of their own, added in order at the end: as many for any number of threads.
constexpr int64_t kMostParts = 64, kLeastPoints = 512, kMostBytes = int64_t(128) << 20;

template <class C>
class Parts {
 public:
  Parts(const Net<C>& net, const Tensor& like, bool sums, bool modulation) : net_(net) {
    rows_ = modulation && net.shares_rows() ? net.hidden * 2 * net.values : 0;
    sums_ = sums ? net.sums : 0;
    const int64_t bytes = std::max<int64_t>(1, (sums_ + rows_) * int64_t(sizeof(C)));
    const int64_t most = std::clamp<int64_t>(kMostBytes / bytes, 1, kMostParts);
    const int64_t wanted = std::clamp<int64_t>(net.points / kLeastPoints, 1, most);
    points_ = round_up((net.points + wanted - 1) / wanted, kTile);
    count_ = net.points ? (net.points + points_ - 1) / points_ : 0;
    int64_t size = 0;
    for (int64_t p = 0; p < count_; ++p) starts_.push_back(size), size += sums_ + groups(p) * rows_;
    starts_.push_back(size);
    memory_ = in_large_pages(scratch_bytes(like, size * int64_t(sizeof(C))));
  }

  // body(tile, first point, number of points, sums) for every tile of every part; make_tile(): one for a thread.
  template <class MakeTile, class Body>
  void each_tile(const MakeTile& make_tile, const Body& body) const {
    torch::stable::parallel_for(0, count_, 1, [&](int64_t first, int64_t last) {
      auto tile = make_tile();
      for (int64_t p = first; p < last; ++p) {
        C* sums = at(p);
        std::memset(sums, 0, size_t(starts_[p + 1] - starts_[p]) * sizeof(C));
        const PartSums<C> part{sums, sums + sums_, net_.group_of(begin(p))};
        cpu::each_tile(begin(p), end(p), [&](int64_t begin, int64_t count) { body(tile, begin, count, part); });
      }
    });
  }

  // The sum over parts of the numbers from `first` on: width columns of `outs` rows in panels, or one row.
  void add_up(int64_t first, int64_t outs, int64_t width, const Tensor& to) const {
    const int64_t size = outs * padded(width);
    std::vector<C> total(size);
    for (int64_t p = 0; p < count_; ++p) {
      const C* from = at(p) + first;
      for (int64_t i = 0; i < size; ++i) total[i] += from[i];
    }
    with_numbers(kMlp, to.scalar_type(), [&]<class T>(Tag<T>) {
      T* rows = write<T>(to);
      for (int64_t k = 0; k < width; k += kPanel) {
        const C* panel = total.data() + in_panels(outs, 0, k);
        for (int64_t o = 0; o < outs; ++o)
          convert(panel + o * kPanel, std::min(kPanel, width - k), rows + o * width + k);
      }
    });
  }

  void add_up_modulation(const Tensor& to) const {
    std::vector<C> total(net_.groups * rows_);
    for (int64_t p = 0; p < count_; ++p) {
      const C* from = at(p) + sums_;
      C* rows = total.data() + net_.group_of(begin(p)) * rows_;
      for (int64_t i = 0; i < groups(p) * rows_; ++i) rows[i] += from[i];
    }
    write_rows(Rows<C>{total.data()}, 0, 1, net_.groups * rows_, to);
  }

 private:
  int64_t begin(int64_t p) const { return p * points_; }
  int64_t end(int64_t p) const { return std::min(net_.points, begin(p) + points_); }
  int64_t groups(int64_t p) const { return net_.group_of(end(p) - 1) - net_.group_of(begin(p)) + 1; }
  C* at(int64_t p) const { return write<C>(memory_) + starts_[p]; }

  const Net<C>& net_;
  int64_t rows_, sums_, points_, count_;
  std::vector<int64_t> starts_;
  Tensor memory_;
};

TensorList empty_like_all(const TensorList& list, bool wanted) {
  TensorList made;
  for (size_t i = 0; wanted && i < list.size(); ++i) made.push_back(empty_as(list[i]));
  return made;
}

Tensor empty_or_like(const Tensor& like, bool wanted) { return wanted ? empty_as(like) : empty(like, {0}); }

template <class C>
void add_up_all(const Net<C>& net, const Parts<C>& parts, const TensorList& weights, const TensorList& biases) {
  torch::stable::parallel_for(0, int64_t(net.layers.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t l = first; l < last; ++l) {
      const Layer<C>& layer = net.layers[l];
      if (!weights.empty()) parts.add_up(layer.sums, layer.width, layer.in, weights[l]);
      if (!biases.empty()) parts.add_up(layer.sums + layer.width * padded(layer.in), 1, layer.width, biases[l]);
    }
  });
}

// ---- operators ------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> forward(Tensor x, TensorList weights, TensorList biases, OptionalTensor modulation,
                                   OptionalTensor frequencies, Ints activations, Doubles1 omegas, Bools skips,
                                   bool output_layer, bool point_norm, double eps, bool, bool bfloat16, bool keep,
                                   bool) {
  const NetLists lists{activations, omegas, skips, output_layer, point_norm, eps, bfloat16};
  check(x, weights, biases, modulation, frequencies, lists);
  Tensor y, kept;
  with_arithmetic(any_wide(x, weights, modulation, frequencies), [&]<class C>(Tag<C>) {
    const Net<C> net(x, weights, biases, modulation, frequencies, lists, false);
    y = in_large_pages(empty(weights[0], {net.points, net.out}));
    kept = in_large_pages(empty(x, {keep ? net.points * net.kept_values() : 0}, number_type<C>()));
    torch::stable::parallel_for(0, round_up(net.points, kTile) / kTile, 4, [&](int64_t first, int64_t last) {
      ForwardTile<C> tile(net, modulation);
      each_tile(first * kTile, std::min(net.points, last * kTile),
                [&](int64_t begin, int64_t count) { tile.run(x, begin, count, y, keep ? write<C>(kept) : nullptr); });
      far_stores_done();
    });
  });
  return {y, kept};
}

std::tuple<Tensor, TensorList, TensorList, Tensor> backward(Tensor grad, Tensor x, TensorList weights,
                                                            TensorList biases, OptionalTensor modulation,
                                                            OptionalTensor frequencies, Tensor kept, Ints activations,
                                                            Doubles1 omegas, Bools skips, bool output_layer,
                                                            bool point_norm, double eps, bool, bool bfloat16, bool,
                                                            bool, Bools mask) {
  const NetLists lists{activations, omegas, skips, output_layer, point_norm, eps, bfloat16};
  check(x, weights, biases, modulation, frequencies, lists);
  check_mask(kMlp, mask, 4);
  const Tensor gx = empty_or_like(x, mask[0]), gm = empty_or_like(modulation ? *modulation : x, mask[3]);
  const TensorList gw = empty_like_all(weights, mask[1]), gb = empty_like_all(biases, mask[2]);
  with_arithmetic(any_wide(x, weights, modulation, frequencies), [&]<class C>(Tag<C>) {
    const Net<C> net(x, weights, biases, modulation, frequencies, lists, mask[0]);
    require(grad.numel() == net.points * net.out, kMlp, ": size of grad_y");
    check_contiguous(grad, kMlp, "grad_y");
    const bool fits = kept.numel() == net.points * net.kept_values() && kept.scalar_type() == number_type<C>();
    const Gradients<C> gradients(net, gm, mask);
    const Parts<C> parts(net, x, mask[1] || mask[2], mask[3]);
    const auto run = [&](BackwardTile<C>& tile, int64_t begin, int64_t count, const PartSums<C>& sums) {
      tile.run(grad, x, begin, count, gradients, sums, mask[0] ? &gx : nullptr);
    };
    parts.each_tile([&] { return BackwardTile<C>(net, modulation, fits ? read<C>(kept) : nullptr); }, run);
    add_up_all(net, parts, gw, gb);
    if (mask[3] && net.shares_rows()) parts.add_up_modulation(gm);
  });
  return {gx, gw, gb, gm};
}

std::tuple<Tensor, Tensor, TensorList, TensorList, Tensor> backward_backward(
    OptionalTensor ggx, TensorList ggweights, TensorList ggbiases, OptionalTensor ggmodulation, Tensor grad, Tensor x,
    TensorList weights, TensorList biases, OptionalTensor modulation, OptionalTensor frequencies, Tensor,
    Ints activations, Doubles1 omegas, Bools skips, bool output_layer, bool point_norm, double eps, bool, bool bfloat16,
    bool, bool, Bools mask) {
  const NetLists lists{activations, omegas, skips, output_layer, point_norm, eps, bfloat16};
  check(x, weights, biases, modulation, frequencies, lists);
  check_mask(kMlp, mask, 5);
  require(ggweights.empty() || ggweights.size() == weights.size(), kMlp, ": grad_weights of another number of layers");
  require(ggbiases.empty() || ggbiases.size() == biases.size(), kMlp, ": grad_biases of another number of layers");
  check_like(ggx, x, "grad_x");
  if (modulation) check_like(ggmodulation, *modulation, "grad_modulation");
  for (size_t l = 0; l < ggweights.size(); ++l) check_like(ggweights[l], weights[l], "grad_weights");
  for (size_t l = 0; l < ggbiases.size(); ++l) check_like(ggbiases[l], biases[l], "grad_biases");
  const Tensor dy = empty_or_like(grad, mask[0]), gx = empty_or_like(x, mask[1]);
  const Tensor gm = empty_or_like(modulation ? *modulation : x, mask[4]);
  const TensorList gw = empty_like_all(weights, mask[2]), gb = empty_like_all(biases, mask[3]);
  const Directions along{ggx, ggweights, ggbiases, ggmodulation};
  with_arithmetic(any_wide(x, weights, modulation, frequencies), [&]<class C>(Tag<C>) {
    const Net<C> net(x, weights, biases, modulation, frequencies, lists, mask[1]);
    require(grad.numel() == net.points * net.out, kMlp, ": size of grad_y");
    check_contiguous(grad, kMlp, "grad_y");
    Scratch<C> memory;
    const std::vector<Panels<C>> panels = pack_directions(net, along, mask[1], memory);
    const Gradients<C> gradients(net, gm, {mask[1], mask[2], mask[3], mask[4]});
    const Parts<C> parts(net, x, mask[2] || mask[3], mask[4]);
    const auto run = [&](TangentTile<C>& tile, int64_t begin, int64_t count, const PartSums<C>& sums) {
      tile.run(grad, x, panels, begin, count, gradients, sums, mask[0] ? &dy : nullptr, mask[1] ? &gx : nullptr);
    };
    parts.each_tile([&] { return TangentTile<C>(net, modulation, along); }, run);
    add_up_all(net, parts, gw, gb);
    if (mask[4] && net.shares_rows()) parts.add_up_modulation(gm);
  });
  return {dy, gx, gw, gb, gm};
}

}  // namespace
}  // namespace camk::cpu

STABLE_TORCH_LIBRARY_IMPL(camkernels, CPU, m) {
  m.impl("modulated_mlp", TORCH_BOX(&camk::cpu::forward));
  m.impl("modulated_mlp_backward", TORCH_BOX(&camk::cpu::backward));
  m.impl("modulated_mlp_backward_backward", TORCH_BOX(&camk::cpu::backward_backward));
}

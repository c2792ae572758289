// SPDX-License-Identifier: MIT
// A modulated MLP made ready for its tiles: weights in panels, in the arithmetic type C, and what its tensors look
// like.
#pragma once
#include "cpu/matrix_unit.h"
#include "cpu/modulated_mlp_rows.h"
#include "cpu/parallel.h"

namespace camk::cpu {

using TensorList = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;
inline constexpr const char* kMlp = "modulated_mlp";

// Points that pass through all layers together.
inline constexpr int64_t kTile = 96;
static_assert(kTile % kBlockRows == 0 && kTile % (2 * kUnit) == 0);

// A matrix in one of three forms: panels of it, its few columns, or panels of pairs of rows rounded to bfloat16.
template <class C>
struct Matrix {
  const C* exact = nullptr;
  const C* few = nullptr;
  const uint32_t* rounded = nullptr;
  explicit operator bool() const { return exact || few || rounded; }
};

// A weight, its transpose, the bias [padded]; null where there is none or nobody reads it.
template <class C>
struct Panels {
  Matrix<C> forward, backward;
  const C* bias = nullptr;
};

template <class C>
struct Layer : RowLayer<C> {
  int64_t in, next;  // values that it takes and gives, x of a skip included
  bool skip, modulated;
  bool kept;  // whether z of all points stays for the backward pass, if that keeps any
  Panels<C> panels;
  int64_t sums;  // where the gradients of weight, then bias, begin among a part's sums
};

// The operator's settings, as in python/camkernels/modulated_mlp.py.
struct NetLists {
  const std::vector<int64_t>& activations;
  const std::vector<double>& omegas;
  const std::vector<bool>& skips;
  bool output_layer, point_norm;
  double eps;
  bool bfloat16;  // whether products may round their factors
};

// Pairs of bfloat16 in a row of numbers, or rows in a column: whole registers of the matrix unit where there is one.
inline int64_t pairs_of(int64_t numbers) {
  const int64_t pairs = (numbers + 1) / 2;
  return has_matrix_unit() ? round_up(pairs, kUnit) : pairs;
}

// value(k, j) of a [depth, columns] matrix
template <class C, class Value>
Matrix<C> pack(int64_t depth, int64_t columns, bool rounded, Scratch<C>& memory, const Value& value) {
  if (!rounded && columns <= kFew && depth % kPanel == 0) {
    C* made = memory.take(kFew * depth);
    for (int64_t j = 0; j < columns; ++j) {
      for (int64_t k = 0; k < depth; ++k) made[j * depth + k] = value(k, j);
    }
    return {.few = made};
  }
  const int64_t rows = rounded ? pairs_of(depth) : depth;
  C* made = memory.take(rows * padded(columns));
  if (!rounded) {
    fill_panels(depth, columns, made, value);
    return {.exact = made};
  }
  uint32_t* to = reinterpret_cast<uint32_t*>(made);
  const auto bits = [&](int64_t k, int64_t j) {
    return k < depth ? uint32_t(from_number<BFloat16>(value(k, j)).bits) : 0u;
  };
  fill_panels(rows, columns, to, [&](int64_t k, int64_t j) { return bits(2 * k, j) | bits(2 * k + 1, j) << 16; });
  return {.rounded = to};
}

// Weight [out, in]; centred: W - mean(W) over its rows, which makes the mean of z = W h + b zero. The transpose is of W
// as it is: gradients that come through a norm have mean zero, too.
template <class C>
void pack_weight(const Tensor& weight, bool centred, bool transposed, bool rounded, Scratch<C>& memory, Panels<C>& to) {
  const int64_t out = weight.size(0), in = weight.size(1);
  std::vector<C> w(out * in), mean(in);
  read_rows(weight, 0, 1, out * in, Rows<C>{w.data()});
  for (int64_t i = 0; centred && i < out * in; ++i) mean[i % in] += w[i] / C(out);
  to.forward = pack(in, out, rounded, memory, [&](int64_t k, int64_t o) { return w[o * in + k] - mean[k]; });
  if (!transposed) return;
  to.backward = pack(out, in, rounded, memory, [&](int64_t o, int64_t k) { return w[o * in + k]; });
}

template <class C>
const C* pack_bias(const Tensor& bias, bool centred, Scratch<C>& memory) {
  const int64_t out = bias.numel();
  C* b = memory.take(out);
  read_rows(bias, 0, 1, out, Rows<C>{b});
  C mean = 0;
  for (int64_t o = 0; centred && o < out; ++o) mean += b[o] / C(out);
  for (int64_t o = 0; o < out; ++o) b[o] -= mean;
  return b;
}

template <class C>
struct Net {
  int64_t points, in, out, hidden, groups, values;  // values: of a scale, 1 or the width of the layers
  std::vector<Layer<C>> layers;
  int64_t sums = 0;    // numbers that the gradients of weights and biases take
  bool skips = false;  // whether any layer has one
  bool rounds;         // whether products are of bfloat16
  Scratch<C> memory;

  Net(const Tensor& x, const TensorList& weights, const TensorList& biases, const OptionalTensor& modulation,
      const OptionalTensor& frequencies, const NetLists& lists, bool transposed)
      : points(x.size(0)),
        in(x.size(1)),
        hidden(int64_t(weights.size()) - lists.output_layer),
        groups(modulation ? modulation->size(0) : 1),
        values(modulation && modulation->dim() == 4 ? modulation->size(3) : 1),
        rounds(std::is_same_v<C, float> && lists.bfloat16 && multiplies_bfloat16()) {
    C* waves = nullptr;
    if (frequencies) {
      waves = memory.take(padded(frequencies->numel()));
      read_rows(*frequencies, 0, 1, frequencies->numel(), Rows<C>{waves});
    }
    int64_t given = in;
    for (size_t l = 0; l < weights.size(); ++l) {
      const int64_t width = weights[l].size(0);
      Layer<C> layer{};
      layer.modulated = int64_t(l) < hidden;
      layer.width = width, layer.padded = padded(width), layer.in = given;
      layer.skip = lists.skips[l], layer.next = width + (layer.skip ? in : 0), skips |= layer.skip;
      layer.activation = math::Activation(lists.activations[l]), layer.omega = C(lists.omegas[l]);
      layer.frequencies = waves, layer.eps = C(lists.eps);
      layer.norm = lists.point_norm && layer.modulated;
      layer.per_channel = modulation && modulation->dim() == 4 && layer.modulated;
      pack_weight(weights[l], layer.norm, transposed || l > 0, rounds, memory, layer.panels);
      if (!biases.empty()) layer.panels.bias = pack_bias(biases[l], layer.norm, memory);
      layer.sums = sums;
      sums += width * padded(given) + padded(width);
      layers.push_back(layer), given = layer.next;
    }
    out = given;
    choose_kept();
  }

  // A plain output layer, whose result is the network's; of all others derivatives need z.
  bool is_plain(const Layer<C>& layer) const { return !layer.modulated && layer.activation == math::Activation::kNone; }
  int64_t kept_values() const {
    int64_t sum = 0;
    for (const Layer<C>& layer : layers) sum += layer.kept ? layer.padded : 0;
    return sum;
  }
  // The longest row that a tile holds.
  int64_t widest() const {
    int64_t most = in;
    for (const Layer<C>& layer : layers) most = std::max({most, layer.padded, layer.next});
    return most;
  }
  // Whether points share rows of the modulation, or there are rows and no points: then gradients are sums.
  bool shares_rows() const { return groups != points; }
  int64_t group_of(int64_t point) const { return shares_rows() ? point / (points / groups) : point; }

 private:
  // Leaves out a quarter or more, the layers of fewest inputs: computing z again takes little longer there than to
  // write and read it, and memory stays below a quarter of what PyTorch keeps. As in
  // python/camkernels/modulated_mlp.py.
  void choose_kept() {
    std::vector<Layer<C>*> order;
    int64_t all = 0, left_out = 0;
    for (Layer<C>& layer : layers) {
      if (!is_plain(layer)) order.push_back(&layer), all += layer.padded;
    }
    std::stable_sort(order.begin(), order.end(), [](Layer<C>* a, Layer<C>* b) { return a->in < b->in; });
    for (Layer<C>* layer : order) {
      layer->kept = 4 * left_out >= all;
      if (!layer->kept) left_out += layer->padded;
    }
  }
};

}  // namespace camk::cpu

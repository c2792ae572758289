// SPDX-License-Identifier: MIT
// A modulated MLP made ready for its tiles: weights in panels, in the arithmetic type C, and what its tensors look
// like.
#pragma once
#include "cpu/channels.h"
#include "cpu/matrix_unit.h"
#include "cpu/modulated_mlp_rows.h"
#include "cpu/parallel.h"

namespace camk::cpu {

using TensorList = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;
inline constexpr const char* kMlp = "modulated_mlp";

// Points that pass through all layers together.
inline constexpr int64_t kTile = 96;
static_assert(kTile % (2 * kBlockRows) == 0 && kTile % (2 * kUnit) == 0);

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

// A matrix in memory whose rows, or whose columns, are `stride` numbers apart.
template <class C>
struct Dense {
  const C* data;
  int64_t stride;
  bool by_columns;
  Dense transposed() const { return {data, stride, !by_columns}; }

  // Columns from `first` on: to[k * pitch + j]
  void copy_columns(int64_t first, int64_t depth, int64_t columns, C* to, int64_t pitch) const {
    if (by_columns) return transpose(data + first * stride, columns, depth, stride, to, pitch);
    const C* from = data + first;
    for (int64_t k = 0; k < depth; ++k, from += stride, to += pitch) convert(from, columns, to);
  }
};

template <class C>
Matrix<C> pack_rounded(Dense<C> from, int64_t depth, int64_t columns, Scratch<C>& memory) {
  const int64_t pairs = pairs_of(depth);
  uint32_t* made = reinterpret_cast<uint32_t*>(memory.take(pairs * padded(columns)));
  const auto bits = [](C number) { return uint32_t(from_number<BFloat16>(number).bits); };
  for (int64_t first = 0; first < columns; first += kPanel) {
    std::vector<C> panel(2 * pairs * kPanel);
    from.copy_columns(first, depth, std::min(kPanel, columns - first), panel.data(), kPanel);
    uint32_t* to = made + first * pairs;
    for (const C* row = panel.data(); row < panel.data() + panel.size(); row += 2 * kPanel, to += kPanel) {
      for (int64_t j = 0; j < kPanel; ++j) to[j] = bits(row[j]) | bits(row[kPanel + j]) << 16;
    }
  }
  return {.rounded = made};
}

template <class C>
Matrix<C> pack(Dense<C> from, int64_t depth, int64_t columns, bool rounded, Scratch<C>& memory) {
  if (rounded) return pack_rounded(from, depth, columns, memory);
  if (columns <= kFew && depth % kPanel == 0) {
    C* made = memory.take(kFew * depth);
    from.transposed().copy_columns(0, columns, depth, made, depth);
    return {.few = made};
  }
  const int64_t size = depth * padded(columns);
  C* made = columns % kPanel ? memory.take(size) : memory.take_unset(size);
  for (int64_t first = 0; first < columns; first += kPanel) {
    from.copy_columns(first, depth, std::min(kPanel, columns - first), made + first * depth, kPanel);
  }
  return {.exact = made};
}

// to = w [out, in] - its mean over the rows; to may be w
template <class C>
void centre(const C* w, int64_t out, int64_t in, C* to) {
  std::vector<C> mean(in);
  const C share = C(1) / C(out);
  for (int64_t o = 0; o < out; ++o) {
    for (int64_t k = 0; k < in; ++k) mean[k] += share * w[o * in + k];
  }
  for (int64_t o = 0; o < out; ++o) {
    for (int64_t k = 0; k < in; ++k) to[o * in + k] = w[o * in + k] - mean[k];
  }
}

// Weight [out, in]; centred: W - mean(W) over its rows, which makes the mean of z = W h + b zero. The transpose is of W
// as it is: gradients that come through a norm have mean zero, too.
template <class C>
void pack_weight(const Tensor& weight, bool centred, bool transposed, bool rounded, Scratch<C>& memory, Panels<C>& to) {
  const int64_t out = weight.size(0), in = weight.size(1);
  const C* w = static_cast<const C*>(weight.const_data_ptr());
  const bool foreign = weight.scalar_type() != number_type<C>();
  const auto own = foreign || centred ? std::make_unique_for_overwrite<C[]>(out * in) : nullptr;
  if (foreign) read_rows(weight, 0, 1, out * in, Rows<C>{own.get()}), w = own.get();
  if (transposed) to.backward = pack<C>({w, in, false}, out, in, rounded, memory);
  if (centred) centre(w, out, in, own.get()), w = own.get();
  to.forward = pack<C>({w, in, true}, in, out, rounded, memory);
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
  int64_t tile_rows;   // that a tile has room for
  Scratch<C> memory;

  Net(const Tensor& x, const TensorList& weights, const TensorList& biases, const OptionalTensor& modulation,
      const OptionalTensor& frequencies, const NetLists& lists, bool transposed)
      : points(x.size(0)),
        in(x.size(1)),
        hidden(int64_t(weights.size()) - lists.output_layer),
        groups(modulation ? modulation->size(0) : 1),
        values(modulation && modulation->dim() == 4 ? modulation->size(3) : 1),
        rounds(std::is_same_v<C, float> && lists.bfloat16 && multiplies_bfloat16()),
        tile_rows(whole_rows(points)) {
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

  // Rows that products make of `count` in a tile: whole blocks, or registers, of numbers or of pairs of rows.
  int64_t whole_rows(int64_t count) const {
    const int64_t unit = !rounds ? kBlockRows : 2 * (has_matrix_unit() ? kUnit : kBlockRows);
    return std::min(kTile, round_up(count, unit));
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

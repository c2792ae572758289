// SPDX-License-Identifier: MIT
// Second derivatives of a modulated MLP: a tile runs forward together with its tangent dy along given directions (the
// cotangents of the first gradients), then <g, dy> is differentiated on the way back.
#pragma once
#include "cpu/modulated_mlp_tile.h"

namespace camk::cpu {

// Directions of x, weights, biases and modulation; absent: zero.
struct Directions {
  const OptionalTensor& x;
  const TensorList &weights, &biases;
  const OptionalTensor& modulation;
};

// Panels of the directions of weights and biases.
template <class C>
std::vector<Panels<C>> pack_directions(const Net<C>& net, const Directions& along, bool transposed,
                                       Scratch<C>& memory) {
  std::vector<Panels<C>> made(net.layers.size());
  for (size_t l = 0; l < made.size(); ++l) {
    const bool centred = net.layers[l].norm;
    if (!along.weights.empty())
      pack_weight(along.weights[l], centred, transposed || l > 0, net.rounds, memory, made[l]);
    if (!along.biases.empty()) made[l].bias = pack_bias(along.biases[l], centred, memory);
  }
  return made;
}

template <class C>
class TangentTile {
 public:
  TangentTile(const Net<C>& net, const OptionalTensor& modulation, const Directions& along)
      : net_(net),
        along_(along),
        modulation_(net, modulation, memory_),
        direction_(net, along.modulation, memory_, 0),
        products_(net, memory_) {
    for (size_t l = 0; l < net.layers.size(); ++l) {
      const Layer<C>& layer = net.layers[l];
      TangentRows<C> t{};
      for (Rows<C>* rows : {&t.n, &t.dn, &t.dz, &t.slope, &t.bend}) *rows = memory_.rows(layer.width, net.tile_rows);
      t.r = memory_.take(kTile), t.mean_ndz = memory_.take(kTile);
      rows_.push_back(t);
      h_.push_back(memory_.rows(layer.next, net.tile_rows)), dh_.push_back(memory_.rows(layer.next, net.tile_rows));
      change_.push_back(TileModulation<C>::rows_for(layer, net.tile_rows, memory_));
    }
    for (Rows<C>* rows : {&x_, &dx_, &gx_, &unused_}) *rows = memory_.rows(net.in, net.tile_rows);
    for (Rows<C>& rows : d_) rows = memory_.rows(net.widest(), net.tile_rows);
    for (Rows<C>& rows : e_) rows = memory_.rows(net.widest(), net.tile_rows);
  }

  // panels: of the directions of the weights. Gives dy, and gradients of <grad, dy>.
  void run(const Tensor& grad, const Tensor& x, const std::vector<Panels<C>>& panels, int64_t begin, int64_t count,
           const Gradients<C>& gradients, const PartSums<C>& sums, const Tensor* dy, const Tensor* gx) {
    const Rows<C> input = tile_of(x, begin, count, x_, true);
    const Rows<C> tangent = along_.x ? tile_of(*along_.x, begin, count, dx_, true) : dx_;
    modulation_.read(begin, count);
    direction_.read(begin, count);
    products_.start(count);
    fetch_next(grad, begin, products_.ahead), fetch_next(x, begin, products_.ahead);
    forward(input, tangent, panels, count);
    if (dy) write_rows(dh_.back(), begin, count, net_.out, *dy);

    Rows<C> d = of_width(d_[0], net_.out), e = of_width(e_[0], net_.out);  // gradients of y and dy
    std::memset(d.data, 0, size_t(net_.tile_rows * d.stride) * sizeof(C));
    read_rows(grad, begin, count, net_.out, e);
    std::memset(gx_.data, 0, size_t(net_.tile_rows * gx_.stride) * sizeof(C));
    for (int64_t l = int64_t(net_.layers.size()) - 1; l >= 0; --l) {
      const Layer<C>& layer = net_.layers[l];
      BackwardTile<C>::take_skip(layer, d, gx_, count);
      BackwardTile<C>::take_skip(layer, e, unused_, count);
      if (!net_.is_plain(layer)) {
        deactivate_tangents(layer, count, rows_with_modulation(l), d, e, change_[l]);
        gradients.add_modulation(l, change_[l], begin, count, sums);
      }
      gradients.add(products_, layer, d, l ? h_[l - 1] : input, count, sums);
      gradients.add(products_, layer, e, l ? dh_[l - 1] : tangent, count, sums, false);
      if (l == 0 && !gx) return;
      const int other = d.data == d_[0].data;
      const Rows<C> d_below = of_width(d_[other], layer.in), e_below = of_width(e_[other], layer.in);
      back(layer, layer.panels.backward, d, d_below, false);
      if (panels[l].backward) back(layer, panels[l].backward, e, d_below, true);
      back(layer, layer.panels.backward, e, e_below, false);
      d = d_below, e = e_below;
    }
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t k = 0; k < net_.in; ++k) d[i][k] += gx_[i][k];
    }
    write_rows(d, begin, count, net_.in, *gx);
  }

 private:
  TangentRows<C> rows_with_modulation(size_t l) const {
    TangentRows<C> t = rows_[l];
    t.modulation = modulation_[l], t.direction = direction_[l];
    return t;
  }

  void back(const Layer<C>& layer, Matrix<C> matrix, Rows<C> d, Rows<C> below, bool add) {
    products_(d, matrix, layer.width, layer.in, nullptr, below, add);
  }

  void forward(Rows<C> input, Rows<C> tangent, const std::vector<Panels<C>>& panels, int64_t count) {
    Rows<C> h = input, dh = tangent;
    for (size_t l = 0; l < net_.layers.size(); ++l) {
      const Layer<C>& layer = net_.layers[l];
      const TangentRows<C> t = rows_with_modulation(l);
      const bool plain = net_.is_plain(layer);
      const Rows<C> z = plain ? h_[l] : t.n, dz = plain ? dh_[l] : t.dn;
      const auto product = [&](Rows<C> a, Matrix<C> matrix, const C* bias, Rows<C> c, bool add) {
        products_(a, matrix, layer.in, layer.width, bias, c, add);
      };
      product(h, layer.panels.forward, layer.panels.bias, z, false);
      product(dh, layer.panels.forward, panels[l].bias, dz, false);
      if (panels[l].forward) product(h, panels[l].forward, nullptr, dz, true);
      if (!plain) activate_tangents(layer, count, t, h_[l], dh_[l]);
      if (layer.skip) {
        copy_columns(input, net_.in, count, h_[l], layer.width);
        copy_columns(tangent, net_.in, count, dh_[l], layer.width);
      }
      h = h_[l], dh = dh_[l];
    }
  }

  const Net<C>& net_;
  const Directions& along_;
  Scratch<C> memory_;
  TileModulation<C> modulation_, direction_;
  TileProducts<C> products_;
  std::vector<TangentRows<C>> rows_;
  std::vector<Rows<C>> h_, dh_;
  std::vector<Modulation<C>> change_;
  Rows<C> x_, dx_, gx_, unused_, d_[2], e_[2];
};

}  // namespace camk::cpu

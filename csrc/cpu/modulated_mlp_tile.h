// SPDX-License-Identifier: MIT
// A tile of points on its way through a modulated MLP and back. One tile object serves one thread.
#pragma once
#include "cpu/modulated_mlp_products.h"

namespace camk::cpu {

// The rows of a tensor [N, width] that belong to a tile: in `room`, or where they lie if they can stay there. columns:
// if packs of lanes are read of them, down the rows, and at a row's end with what is behind it.
template <class C>
Rows<C> tile_of(const Tensor& t, int64_t begin, int64_t count, Rows<C> room, bool columns) {
  const int64_t width = t.size(1), end = (begin + count - 1) * width + (columns ? padded(width) : width);
  const bool crowded = columns && width * int64_t(sizeof(C)) % 512 == 0;  // in a cache, see spacing()
  if (t.scalar_type() == number_type<C>() && count == kTile && end <= t.numel() && !crowded) {
    return {const_cast<C*>(read<C>(t)) + begin * width, width};
  }
  const Rows<C> to = of_width(room, width);
  read_rows(t, begin, count, width, to);
  return to;
}

// The rows of a tensor [N, width] that belong to the tile behind `begin`, if there is one.
inline void fetch_next(const Tensor& t, int64_t begin, Ahead& ahead) {
  const int64_t first = begin + kTile, count = std::min(kTile, t.size(0) - first);
  const int64_t bytes = t.size(1) * int64_t(t.element_size());
  ahead.add(static_cast<const char*>(t.const_data_ptr()) + first * bytes, count * bytes);
}

// Where the tile's rows of a tensor [N, width] may be written as whole packs, or else `room`.
template <class C>
Rows<C> room_in(const Tensor* t, int64_t begin, int64_t count, Rows<C> room) {
  const int64_t width = t->size(1);
  const bool fits = t->scalar_type() == number_type<C>() && count == kTile && width == padded(width);
  return fits ? Rows<C>{write<C>(*t) + begin * width, width} : of_width(room, width);
}

template <class C>
void copy_columns(Rows<C> from, int64_t columns, int64_t count, Rows<C> to, int64_t at) {
  for (int64_t i = 0; i < count; ++i) std::memcpy(to[i] + at, from[i], size_t(columns) * sizeof(C));
}

// Whole rows of packs, one behind the other.
template <class C>
void write_far(Rows<C> from, int64_t columns, int64_t count, C* to) {
  for (int64_t i = 0; i < count; ++i, to += columns) {
    for (int64_t o = 0; o < columns; o += lanes_of<Lanes<C>>) Lanes<C>::load(from[i] + o).store_far(to + o);
  }
}

// Scale and shift of every layer for the points of a tile: where they lie if they can stay there, or a copy. Where
// there is no tensor: 1 and 0, or 0 and 0.
template <class C>
class TileModulation {
 public:
  TileModulation(const Net<C>& net, const OptionalTensor& rows, Scratch<C>& memory, C scale = 1)
      : net_(net), row_(net.hidden * 2 * net.values) {
    if (rows) rows_.emplace(*rows);
    const Modulation<C> neutral{{memory.take(2), 0}, 1};
    *neutral.scale(0) = scale;
    for (const Layer<C>& layer : net.layers) {
      room_.push_back(layer.modulated ? rows_for(layer, net.tile_rows, memory) : neutral);
      if (!layer.per_channel) *room_.back().scale(0) = scale;
      made_.push_back(room_.back());
      made_.back().rows.stride = 0;
    }
  }

  void read(int64_t begin, int64_t count) {
    if (!rows_) return;
    const bool alike = net_.group_of(begin) == net_.group_of(begin + count - 1);
    const bool whole_packs = !net_.layers[0].per_channel || net_.values == padded(net_.values);
    if (rows_->type == number_type<C>() && whole_packs && (alike || !net_.shares_rows())) {
      C* first = const_cast<C*>(static_cast<const C*>(rows_->data)) + net_.group_of(begin) * row_;
      for (int64_t l = 0; l < net_.hidden; ++l) {
        made_[l] = {{first + l * 2 * net_.values, alike ? 0 : row_}, net_.values};
      }
      return;
    }
    with_numbers(kMlp, rows_->type, [&]<class T>(Tag<T>) {
      for (int64_t l = 0; l < net_.hidden; ++l) {
        made_[l] = room_[l];
        if (alike) made_[l].rows.stride = 0;
        for (int64_t i = 0; i < (alike ? 1 : count); ++i) {
          const T* from = static_cast<const T*>(rows_->data) + net_.group_of(begin + i) * row_ + l * 2 * net_.values;
          convert(from, net_.values, made_[l].scale(i));
          convert(from + net_.values, net_.values, made_[l].shift(i));
        }
      }
    });
  }
  const Modulation<C>& operator[](size_t layer) const { return made_[layer]; }

  static Modulation<C> rows_for(const Layer<C>& layer, int64_t rows, Scratch<C>& memory) {
    const int64_t values = layer.per_channel ? layer.padded : 1;
    return {{memory.take(rows * 2 * values), 2 * values}, values};
  }

 private:
  const Net<C>& net_;
  int64_t row_;  // numbers of a row of the tensor
  std::optional<Source> rows_;
  std::vector<Modulation<C>> room_, made_;
};

// Sums of one part of the points: gradients of weights (in panels) and biases, then of the modulation's rows that its
// points share with others, from row `first_group` on.
template <class C>
struct PartSums {
  C* sums;
  C* modulation;
  int64_t first_group;
};

template <class C>
class Gradients {
 public:
  Gradients(const Net<C>& net, const Tensor& modulation, const std::vector<bool>& mask)
      : net_(net), modulation_(modulation), wants_weights_(mask[1] || mask[2]), wants_modulation_(mask[3]) {}

  bool wants_modulation() const { return wants_modulation_; }

  // d^T x and the sum of d, for a layer.
  void add(TileProducts<C>& products, const Layer<C>& layer, Rows<C> d, Rows<C> x, int64_t count, const PartSums<C>& to,
           bool bias = true) const {
    if (!wants_weights_) return;
    C* sums = to.sums + layer.sums;
    products.add_outer(d, layer.width, x, layer.in, count, sums);
    sums += layer.width * padded(layer.in);
    if (!bias) return;
    each_pack<C>(layer, [&](int64_t o) CAMK_INLINED {
      Lanes<C> sum[4] = {Lanes<C>::load(sums + o), Lanes<C>(C(0)), Lanes<C>(C(0)), Lanes<C>(C(0))};
      int64_t i = 0;
      for (; i + 4 <= count; i += 4) {  // four chains of additions
        unroll<4>([&](auto k) CAMK_INLINED { sum[k] = sum[k] + Lanes<C>::load(d[i + k] + o); });
      }
      for (; i < count; ++i) sum[0] = sum[0] + Lanes<C>::load(d[i] + o);
      ((sum[0] + sum[1]) + (sum[2] + sum[3])).store(sums + o);
    });
  }

  // Gradients of scale and shift of layer l, for points from `begin` on.
  void add_modulation(int64_t l, const Modulation<C>& change, int64_t begin, int64_t count,
                      const PartSums<C>& to) const {
    if (!wants_modulation_ || l >= net_.hidden) return;
    const int64_t values = net_.values, row = net_.hidden * 2 * values;
    if (net_.shares_rows()) {
      for (int64_t i = 0; i < count; ++i) {
        C* sums = to.modulation + (net_.group_of(begin + i) - to.first_group) * row + l * 2 * values;
        for (int64_t v = 0; v < values; ++v) sums[v] += change.scale(i)[v], sums[values + v] += change.shift(i)[v];
      }
      return;
    }
    with_numbers(kMlp, modulation_.type, [&]<class T>(Tag<T>) {
      for (int64_t i = 0; i < count; ++i) {
        T* to = static_cast<T*>(modulation_.data) + (begin + i) * row + l * 2 * values;
        convert(change.scale(i), values, to);
        convert(change.shift(i), values, to + values);
      }
    });
  }

 private:
  const Net<C>& net_;
  Target modulation_;
  bool wants_weights_, wants_modulation_;
};

// ---- forward --------------------------------------------------------------------------------------------------------

template <class C>
class ForwardTile {
 public:
  ForwardTile(const Net<C>& net, const OptionalTensor& modulation)
      : net_(net), modulation_(net, modulation, memory_), products_(net, memory_) {
    x_ = memory_.rows(net.in, net.tile_rows);
    h_[0] = memory_.rows(net.widest(), net.tile_rows), h_[1] = memory_.rows(net.widest(), net.tile_rows);
    r_ = memory_.take(kTile);
  }

  // kept: where z of the layers is to stay, or null.
  void run(const Tensor& x, int64_t begin, int64_t count, const Tensor& y, C* kept) {
    const Rows<C> input = tile_of(x, begin, count, x_, false);
    modulation_.read(begin, count);
    products_.start(count);
    fetch_next(x, begin, products_.ahead);
    Rows<C> h = input;
    for (size_t l = 0; l < net_.layers.size(); ++l) {
      const Layer<C>& layer = net_.layers[l];
      const Rows<C> z = of_width(h_[l % 2], layer.next);
      C* to = kept && layer.kept ? kept + begin * layer.padded : nullptr;
      if (to) kept += net_.points * layer.padded;
      if (!activate_in_registers(layer, h, modulation_[l], count, z, to)) {
        products_(h, layer.panels.forward, layer.in, layer.width, layer.panels.bias, z);
        if (to) write_far(z, layer.padded, count, to);
        if (!net_.is_plain(layer)) activate_rows<0>(layer, count, z, modulation_[l], r_, z, Rows<C>{});
      }
      h = z;
      if (layer.skip) copy_columns(input, net_.in, count, h, layer.width);
    }
    write_rows(h, begin, count, net_.out, y);
  }

 private:
  // y of a layer's input h, and z to `kept`, if it is not null. Returns false where rows do not fit into registers or
  // the activation is more than an instruction or two.
  bool activate_in_registers(const Layer<C>& layer, Rows<C> h, const Modulation<C>& modulation, int64_t count,
                             Rows<C> y, C* kept) {
    bool done = false;
    with_light_activation(layer.activation, [&](auto activation) {
      with_form(layer.per_channel, [&](auto per_channel) {
        const auto finish = [=, layer = RowLayer<C>(layer), share = layer.share()](int64_t i, auto z) CAMK_INLINED {
          const auto far = [=](int64_t o) CAMK_INLINED { z.load(o).store_far(kept + i * layer.padded + o); };
          if (kept) z.each_column(far);
          activate_row<decltype(per_channel)::value>(layer, activation, share, z, modulation.scale(i),
                                                     modulation.shift(i), y[i]);
        };
        done = products_.by_rows(h, layer.panels.forward, layer.in, layer.width, layer.panels.bias, count, finish);
      });
    });
    return done;
  }

  const Net<C>& net_;
  Scratch<C> memory_;
  TileModulation<C> modulation_;
  TileProducts<C> products_;
  Rows<C> x_, h_[2];
  C* r_;
};

// ---- backward -------------------------------------------------------------------------------------------------------

// A layer's rows: z of its linear map, 1 / deviation, what it gives to the next, f'.
template <class C>
struct ActivatedRows {
  Rows<C> z, h, slope;
  C* r;
};

template <class C>
class BackwardTile {
 public:
  // kept: z of the layers from the forward pass; null: computed again.
  BackwardTile(const Net<C>& net, const OptionalTensor& modulation, const C* kept)
      : net_(net), modulation_(net, modulation, memory_), products_(net, memory_) {
    for (const Layer<C>& layer : net.layers) {
      kept_.push_back(kept && layer.kept ? kept : nullptr);
      if (kept_.back()) kept += net.points * layer.padded;
    }
    share_rooms();
    change_ = TileModulation<C>::rows_for(net.layers[0], net.tile_rows, memory_);
    x_ = memory_.rows(net.in, net.tile_rows), gx_ = memory_.rows(net.in, net.tile_rows);
    d_[0] = memory_.rows(net.widest(), net.tile_rows), d_[1] = memory_.rows(net.widest(), net.tile_rows);
  }

  void run(const Tensor& grad, const Tensor& x, int64_t begin, int64_t count, const Gradients<C>& gradients,
           const PartSums<C>& sums, const Tensor* gx) {
    const Rows<C> input = tile_of(x, begin, count, x_, true);
    modulation_.read(begin, count);
    products_.start(count);
    fetch_all_next(grad, x, begin, gx);
    Rows<C> d = of_width(d_[0], net_.out);
    read_rows(grad, begin, count, net_.out, d);
    if (net_.skips) std::memset(gx_.data, 0, size_t(net_.tile_rows * gx_.stride) * sizeof(C));
    const int64_t last = int64_t(net_.layers.size()) - 1;
    if (!net_.is_plain(net_.layers[last])) activate(last, input, begin, count);
    bool deactivated = false;
    for (int64_t l = last; l >= 0; --l) {
      const Layer<C>& layer = net_.layers[l];
      take_skip(layer, d, gx_, count);
      if (!net_.is_plain(layer)) {
        if (!deactivated) deactivate(l, d, count, gradients);
        gradients.add_modulation(l, change_, begin, count, sums);
      }
      if (l && !follows(l)) activate(l - 1, input, begin, count);
      gradients.add(products_, layer, d, l ? rows_[l - 1].h : input, count, sums);
      if (l == 0 && !gx) return;
      Rows<C> below = of_width(d_[d.data == d_[0].data], layer.in);
      if (l == 0) below = room_in(gx, begin, count, below);
      deactivated = l && deactivate_in_registers(l, d, count, gradients, below);
      if (!deactivated) products_(d, layer.panels.backward, layer.width, layer.in, nullptr, below);
      d = below;
    }
    for (int64_t i = 0; net_.skips && i < count; ++i) {
      for (int64_t k = 0; k < net_.in; ++k) d[i][k] += gx_[i][k];
    }
    if (d.data == d_[0].data || d.data == d_[1].data) write_rows(d, begin, count, net_.in, *gx);
  }

  // The gradient of a layer's output: x's part of it goes to gx, zeros take its place.
  static void take_skip(const Layer<C>& layer, Rows<C> d, Rows<C> gx, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t k = 0; k < layer.next - layer.width; ++k) gx[i][k] += d[i][layer.width + k];
      for (int64_t o = layer.width; o < padded(layer.next); ++o) d[i][o] = 0;
    }
  }

 private:
  // Whether z is computed again, from the rows of the layer before.
  bool follows(int64_t l) const { return l > 0 && !kept_[l] && !net_.is_plain(net_.layers[l]); }

  // A layer's rows are done with when the one before it is activated, so both may take the same memory; layers that
  // follow each other are needed together and have a room each.
  void share_rooms() {
    std::vector<ActivatedRows<C>> rooms;
    int64_t widest = 0;
    for (const Layer<C>& layer : net_.layers) widest = std::max({widest, layer.padded, layer.next});
    const auto rows = [&] { return memory_.rows(widest, net_.tile_rows); };
    size_t room = 0;
    for (int64_t l = 0; l < int64_t(net_.layers.size()); ++l) {
      room = follows(l) ? room + 1 : 0;
      if (room == rooms.size()) rooms.push_back({rows(), rows(), rows(), memory_.take(kTile)});
      const Layer<C>& layer = net_.layers[l];
      const ActivatedRows<C>& in = rooms[room];
      rows_.push_back({of_width(in.z, layer.width), of_width(in.h, layer.next), of_width(in.slope, layer.width), in.r});
    }
  }

  void fetch_all_next(const Tensor& grad, const Tensor& x, int64_t begin, const Tensor* gx) {
    Ahead& ahead = products_.ahead;
    fetch_next(x, begin, ahead), fetch_next(grad, begin, ahead);
    if (gx) fetch_next(*gx, begin, ahead);  // written faster where it is in the cache
    const int64_t first = begin + kTile, count = std::min(kTile, net_.points - first);
    for (size_t l = 0; l < kept_.size(); ++l) {
      const int64_t width = net_.layers[l].padded;
      if (kept_[l]) ahead.add(kept_[l] + first * width, count * width * int64_t(sizeof(C)));
    }
  }

  // body(deactivate): deactivate(row, d) makes of d, gradient of a row of layer l's y, that of its z, and of scale and
  // shift. Everything is a copy, as in activate_rows.
  template <class Body>
  void with_deactivation(int64_t l, const Gradients<C>& gradients, const Body& body) const {
    with_form(net_.layers[l].per_channel, [&](auto per_channel) {
      body([layer = RowLayer<C>(net_.layers[l]), share = net_.layers[l].share(), rows = rows_[l],
            modulation = modulation_[l], change = change_,
            wanted = gradients.wants_modulation()](int64_t i, auto d) CAMK_INLINED {
        deactivate_row<decltype(per_channel)::value>(layer, share, rows.z[i], rows.slope[i], rows.r[i],
                                                     modulation.scale(i), d, change.scale(i), change.shift(i), wanted);
      });
    });
  }

  // d: gradient of layer l's y -> of its z.
  void deactivate(int64_t l, Rows<C> d, int64_t count, const Gradients<C>& gradients) const {
    with_deactivation(l, gradients, [=](const auto& deactivate) {
      for (int64_t i = 0; i < count; ++i) deactivate(i, MemoryRow<C>{d[i]});
    });
  }

  // The gradient d of layer l's z -> that of the layer before it. Returns false, and does nothing, where x comes in
  // between, or rows do not fit into registers, or do not fill them: behind the last column an infinite gradient leaves
  // NaN, which take_skip() clears in memory.
  bool deactivate_in_registers(int64_t l, Rows<C> d, int64_t count, const Gradients<C>& gradients, Rows<C> below) {
    const Layer<C>&layer = net_.layers[l], &before = net_.layers[l - 1];
    if (before.skip || before.width < before.padded) return false;
    bool done = false;
    with_deactivation(l - 1, gradients, [&](const auto& deactivate) {
      const auto finish = [=](int64_t i, auto row) CAMK_INLINED {
        deactivate(i, row);
        row.each_column([=](int64_t o) CAMK_INLINED { row.load(o).store(below[i] + o); });
      };
      done = products_.by_rows(d, layer.panels.backward, layer.width, layer.in, nullptr, count, finish);
    });
    return done;
  }

  void activate(int64_t l, Rows<C> input, int64_t begin, int64_t count) {
    const Layer<C>& layer = net_.layers[l];
    ActivatedRows<C>& rows = rows_[l];
    if (follows(l)) activate(l - 1, input, begin, count);
    if (kept_[l]) {
      rows.z = {const_cast<C*>(kept_[l]) + begin * layer.padded, layer.padded};
    } else {
      products_(l ? rows_[l - 1].h : input, layer.panels.forward, layer.in, layer.width, layer.panels.bias, rows.z);
    }
    activate_rows<1>(layer, count, rows.z, modulation_[l], rows.r, rows.h, rows.slope);
    if (layer.skip) copy_columns(input, net_.in, count, rows.h, layer.width);
  }

  const Net<C>& net_;
  Scratch<C> memory_;
  TileModulation<C> modulation_;
  TileProducts<C> products_;
  std::vector<const C*> kept_;          // per layer: z of all points, or null
  std::vector<ActivatedRows<C>> rows_;  // per layer
  Modulation<C> change_;
  Rows<C> x_, gx_, d_[2];
};

}  // namespace camk::cpu

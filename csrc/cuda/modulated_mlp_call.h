// SPDX-License-Identifier: MIT
// The tensors and settings of a call of the modulated MLP on CUDA: checked, and as the kernels take them.
#pragma once
#include <algorithm>

#include "cuda/modulated_mlp.h"
#include "cuda/stream.h"
#include "math/activation.h"
#include "torch/seam.h"

namespace camk::cuda {

using OptionalTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;
using Doubles = std::vector<double>;
using Ints = std::vector<int64_t>;
using Bools = std::vector<bool>;

struct Settings {
  const Ints& activations;
  const Doubles& omegas;
  const Bools& skips;
  bool output_layer, point_norm;
  double eps;
  bool tf32;
};

// Directions along which gradients are differentiated.
struct Tangents {
  const OptionalTensor& x;
  const Tensors &weights, &biases;
  const OptionalTensor& modulation;
};

// The tensors every operator takes, checked, and the records of the layers.
class Call {
 public:
  Call(const Tensor& points, const Tensors& matrices, const Tensors& vectors, const OptionalTensor& scales,
       const OptionalTensor& constants, const Settings& chosen)
      : x(points),
        weights(matrices),
        biases(vectors),
        modulation(scales),
        frequencies(constants),
        settings(chosen),
        layers(checked_layers()),
        stream(points) {}

  const Tensor& x;
  const Tensors &weights, &biases;
  const OptionalTensor &modulation, &frequencies;
  const Settings settings;
  std::vector<Layer> layers;
  CurrentStream stream;

  int64_t points() const { return x.size(0); }
  int64_t outputs() const { return layers.back().out + (settings.skips.back() ? x.size(1) : 0); }
  // Hidden values are float64 where a tensor is.
  bool is_wide() const {
    const auto wide = [](const Tensor& t) { return t.scalar_type() == ScalarType::Double; };
    return wide(x) || wide(weights[0]) || (modulation && wide(*modulation)) || (frequencies && wide(*frequencies));
  }
  ScalarType number_type() const { return is_wide() ? ScalarType::Double : ScalarType::Float; }
  int64_t group() const { return modulation && modulation->size(0) > 0 ? points() / modulation->size(0) : 1; }

  void check_like(const OptionalTensor& t, const Tensor& like, const char* name) const {
    if (!t) return;
    check_tensor(*t, name);
    require(t->scalar_type() == like.scalar_type() && t->numel() == like.numel(), "modulated_mlp: dtype or size of ",
            name);
  }
  void check_like(const Tensors& some, const Tensors& like, const char* name) const {
    require(some.empty() || some.size() == like.size(), "modulated_mlp: length of ", name);
    for (size_t i = 0; i < some.size(); ++i) check_like(some[i], like[i], name);
  }
  void check_gradient(const Tensor& g) const {
    check_tensor(g, "grad_y");
    require(g.scalar_type() == weights[0].scalar_type() && g.numel() == points() * outputs(),
            "modulated_mlp: dtype or size of grad_y");
  }
  void check(cudaError_t error) const {
    if (error != cudaSuccess) fail("modulated_mlp: the CUDA kernel could not run: ", explain(error));
  }

  // A job without columns, results and directions.
  template <class C>
  NetworkJob<C> job() const {
    NetworkJob<C> job{};
    job.points = points(), job.group = group();
    job.layers = int(layers.size()), job.hidden = job.layers - settings.output_layer;
    job.features = int(x.size(1)), job.outputs = int(outputs());
    for (const auto& layer : layers) job.widest = std::max(job.widest, layer.out);
    job.channels = modulation && modulation->dim() == 4 ? int(modulation->size(3)) : 1;
    job.weights = storage_of(weights[0], "modulated_mlp", "weights"),
    job.coordinates = storage_of(x, "modulated_mlp", "x");
    job.modulated = modulation ? storage_of(*modulation, "modulated_mlp", "modulation") : Storage::kFloat;
    job.terms = settings.tf32 ? 1 : job.weights == Storage::kFloat ? 3 : 2, job.sum_terms = settings.tf32 ? 1 : 3;
    job.point_norm = settings.point_norm, job.eps = C(settings.eps);
    job.x = x.const_data_ptr();
    job.whole_words = x.size(1) % 4 == 0 && reinterpret_cast<uintptr_t>(job.x) % (4 * bytes_of(job.coordinates)) == 0;
    for (size_t l = 1; l < layers.size(); ++l) job.skips |= layers[l].in > layers[l].own;
    if (modulation) job.modulation = modulation->const_data_ptr();
    if (frequencies) job.frequencies = read<C>(*frequencies);
    return job;
  }

  // The records, with these gradients and directions, where the kernels find them.
  template <class C>
  Tensor place_layers(NetworkJob<C>& job) const {
    std::copy_n(layers.begin(), std::min<size_t>(layers.size(), kLayersInArguments), job.layer);
    if (layers.size() <= kLayersInArguments) return scratch_bytes(x, 0);
    Tensor memory = scratch_bytes(x, int64_t(layers.size() * sizeof(Layer)));
    auto* records = static_cast<Layer*>(memory.mutable_data_ptr());
    check(launch_set_layers(layers.data(), records, int64_t(layers.size()), stream.get()));
    job.more = records;
    return memory;
  }

 private:
  void check_tensor(const Tensor& t, const char* name) const {
    check_contiguous(t, "modulated_mlp", name);
    check_same_device(t, x, "modulated_mlp", name);
    storage_of(t, "modulated_mlp", name);
  }

  std::vector<Layer> checked_layers() const {
    require(x.dim() == 2, "modulated_mlp: x must have 2 dimensions");
    check_tensor(x, "x");
    const size_t count = weights.size();
    require(count > 0 && settings.activations.size() == count && settings.omegas.size() == count &&
                settings.skips.size() == count && (biases.empty() || biases.size() == count),
            "modulated_mlp: weights, biases and settings must be of one length, and not empty");
    std::vector<Layer> found;
    for (size_t l = 0; l < count; ++l) {
      const int own = l > 0 ? found.back().out : 0;
      found.push_back(checked_layer(l, own, own + (l == 0 || settings.skips[l - 1] ? x.size(1) : 0)));
    }
    check_modulation(found);
    const auto usable = [&](const Tensor& t) {
      return t.scalar_type() == number_type() || t.scalar_type() == weights[0].scalar_type();
    };
    require(usable(x) && (!modulation || usable(*modulation)),
            "modulated_mlp: x and modulation must be in the dtype of hidden values, or of the weights");
    if (frequencies) check_tensor(*frequencies, "frequencies");
    require(!frequencies || frequencies->scalar_type() == number_type(),
            "modulated_mlp: frequencies must be in the dtype of hidden values");
    return found;
  }

  Layer checked_layer(size_t l, int own, int64_t in) const {
    const Tensor& weight = weights[l];
    check_tensor(weight, "weights");
    require(weight.dim() == 2 && weight.size(1) == in && weight.size(0) > 0 && in > 0, "modulated_mlp: weights[", l,
            "] must have shape [out, ", in, "]");
    require(weight.scalar_type() == weights[0].scalar_type(), "modulated_mlp: weights must have one dtype");
    Layer layer{};
    layer.weight = weight.const_data_ptr();
    layer.in = int(in), layer.own = own, layer.out = int(weight.size(0));
    layer.omega = settings.omegas[l], layer.activation = int(settings.activations[l]);
    layer.modulated = l + 1 < weights.size() || !settings.output_layer;
    require(layer.activation >= 0 && layer.activation < math::kActivations, "modulated_mlp: activations");
    require(
        layer.activation != int(math::Activation::kResidualSine) || (frequencies && frequencies->numel() == layer.out),
        "modulated_mlp: frequencies must have one number per channel");
    if (biases.empty()) return layer;
    check_tensor(biases[l], "biases");
    require(biases[l].scalar_type() == weight.scalar_type() && biases[l].numel() == layer.out,
            "modulated_mlp: dtype or size of biases");
    layer.bias = biases[l].const_data_ptr();
    return layer;
  }

  void check_modulation(const std::vector<Layer>& found) const {
    if (!modulation) return;
    check_tensor(*modulation, "modulation");
    const int64_t hidden = int64_t(found.size()) - settings.output_layer, dims = modulation->dim();
    require((dims == 3 || dims == 4) && modulation->size(1) == hidden && modulation->size(2) == 2,
            "modulated_mlp: modulation must have shape [groups, hidden, 2] or [groups, hidden, 2, width]");
    for (int64_t l = 0; dims == 4 && l < hidden; ++l) {
      require(modulation->size(3) == found[l].out, "modulated_mlp: modulation of another width");
    }
    const int64_t groups = modulation->size(0);
    require(groups > 0 ? points() % groups == 0 : points() == 0,
            "modulated_mlp: modulation must divide the points into equal groups");
  }
};

}  // namespace camk::cuda

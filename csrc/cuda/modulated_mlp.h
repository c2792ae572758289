// SPDX-License-Identifier: MIT
// What the kernels of the modulated MLP are told, and their launchers. No torch and no CUDA syntax: the glue to PyTorch
// includes it too.
//
// A block takes a tile of points through all layers. What it keeps of a point is a row of scratch memory: the columns
// are those of `Layer` and `NetworkJob`. The forward pass has a row per point of a tile; derivatives have one per point
// of a launch, because the sums over points that the gradients of the weights are come afterwards, by kernels of their
// own.
#pragma once
#include "cuda/storage.h"

namespace camk::cuda {

inline constexpr int kTileRows = 64;
// Layers whose records travel as kernel arguments, of which 4 KB are certain to exist; more are written to memory
// first.
inline constexpr int kLayersInArguments = 24;

// What a launch computes: the value; gradients; gradients of <cotangents, gradients>, for which the forward pass
// carries the tangents along the cotangents.
enum class Order : int { kValue, kGradients, kSecond };

struct Layer {
  const void *weight, *bias;                  // [out, in], [out] or null
  const void *weight_tangent, *bias_tangent;  // or null
  void *weight_gradient, *bias_gradient;      // or null
  double omega;
  int64_t sums;  // where its gradient, [out, in + 1] with the bias behind, lies in the sums over points
  int in, out;
  int own;         // the inputs that come from the layer before; the others are x
  int activation;  // math::Activation
  bool modulated;  // a hidden layer
  // Columns of a row. n: W h + b, then normalised, in the end the gradient of the former; its tangent behind.
  int n, dn;
  int dz;         // tangent of W h + b
  int deviation;  // one over it; behind, the mean of n dz
  int y, dy;      // what the layer gives
};

// One launch. C: what hidden values are, and x, modulation where they are not stored as weights. Null pointers stand
// for what is not there.
template <class C>
struct NetworkJob {
  int64_t points, before;  // of this launch, and of those before it
  int64_t group;           // so many points share a row of the modulation
  int layers, hidden, features, outputs;
  int widest;    // outputs of a layer
  int channels;  // of the modulation: 1 or the width
  Storage weights, coordinates, modulated;
  int terms, sum_terms;  // of products with weights, of sums over points: see TensorSums
  bool point_norm;
  bool accumulate;  // the sums hold those of earlier launches
  C eps;
  const void* x;           // [all points, features]
  const void* modulation;  // [all points / group, hidden, 2, channels]
  const C* frequencies;    // [width]
  void* y;                 // [all points, outputs]; or its tangent
  const void* g;           // [all points, outputs] gradient of y
  const void *x_tangent, *modulation_tangent;
  void* gx;              // [all points, features]
  C* modulation_points;  // [points, hidden, 2, channels] gradient of each point's modulation
  C* rows;               // [points or block tiles * kTileRows, stride]
  int64_t stride;
  int g_row, dg_row, gx_row;  // columns: gradients of y, dy and x
  C* sums;                    // [splits, weight_sums]
  int64_t weight_sums;        // of all layers
  int64_t most_sums;          // of a layer
  int64_t sum_tiles;          // of 64 x 64, of all layers
  int splits;
  // Of the kernels for narrow layers in float32 (modulated_mlp_fused.cuh).
  const void* packed;   // the weights in the order of their use
  const float* biases;  // [layers, columns of a block]
  bool skips;           // x follows other values
  bool whole_words;     // x can be loaded in fours
  int x_row;            // column of x as float32; negative: it can be read where it is
  const Layer* more;    // all records, where they are too many for the arguments
  Layer layer[kLayersInArguments];
};

// The modulation's values per point.
template <class C>
int64_t modulation_values(const NetworkJob<C>& job) {
  return int64_t(job.hidden) * 2 * job.channels;
}

// Blocks of the forward pass when its rows are in global memory; 0: they fit into shared memory.
template <class C>
int forward_blocks(const NetworkJob<C>& job);

template <class C>
cudaError_t launch_forward(const NetworkJob<C>& job, cudaStream_t stream);

// Kernels of their own for float32 and up to 24 layers of up to 256 columns, where the device has enough shared memory.
bool is_fused(const NetworkJob<float>& job);
// `back`: for gradients too, of x where they are wanted.
int64_t packed_bytes(const NetworkJob<float>& job, bool back);
cudaError_t launch_pack(NetworkJob<float>& job, void* to, bool back, cudaStream_t stream);
cudaError_t launch_fused_forward(const NetworkJob<float>& job, cudaStream_t stream);
// Of gradients: points of a launch, a multiple of the tiles; then what launch_backward and launch_weight_sums do.
int64_t fused_points_per_launch(const NetworkJob<float>& job);
int fused_splits(NetworkJob<float>& job, int64_t points);
cudaError_t launch_fused_gradients(const NetworkJob<float>& job, cudaStream_t stream);
cudaError_t launch_point_sums(const NetworkJob<float>& job, cudaStream_t stream);

// Gradients of the points, and what the sums over points need.
template <class C>
cudaError_t launch_backward(const NetworkJob<C>& job, Order order, cudaStream_t stream);

// How many partial sums over `points` points the gradients of the weights are made of.
template <class C>
int splits_for(const NetworkJob<C>& job, int64_t points);

// sums (+)= those over the points of the launch; always in the same order.
template <class C>
cudaError_t launch_weight_sums(const NetworkJob<C>& job, Order order, cudaStream_t stream);

// sums -> weight_gradient and bias_gradient of every layer.
template <class C>
cudaError_t launch_weight_gradients(const NetworkJob<C>& job, cudaStream_t stream);

// to [groups, modulation_values] (+)= modulation_points, over the points of each group.
template <class C>
cudaError_t launch_group_sums(const NetworkJob<C>& job, C* to, cudaStream_t stream);

template <class C>
cudaError_t launch_store(const C* from, void* to, Storage kind, int64_t count, cudaStream_t stream);

// Writes records from `first` on.
cudaError_t launch_set_layers(const Layer* from, Layer* to, int64_t count, cudaStream_t stream);

}  // namespace camk::cuda

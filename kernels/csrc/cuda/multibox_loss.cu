// Multibox loss on the GPU and its gradient: SmoothL1, softmax cross-entropy, hard-negative mining.
//
// Let x be the logits of an anchor, y its label and n = log sum_c exp(x_c); its cross-entropy is n - x_y. The loss
// takes an image's positives (y > 0) and the hardest of its other anchors, three for each positive:
//     class = sum (n - x_y) / num_positives,  d class / d x_c = (exp(x_c - n) - [c == y]) / num_positives
//     box = sum over positives of SmoothL1(deltas - target) / num_positives
//
// Forward:  1. normalise_rows, eight lanes for each anchor: computes n and n - x_y from one read of the logits.
//           2. choose_anchors, one block for each image: counts the positives, finds the key of the last chosen
//              negative by radix select, sums the losses, and sets n to +inf for anchors that are not in the loss.
// Backward: 3. write_gradients: one pass over the gradient of the logits in vectors of 16 bytes. An anchor with n =
//              +inf has gradient 0; only the logits of the others, a few in a hundred, are read again.
// Nothing but the gradient has the logits' size, and nothing is sorted. Memory for logits [B, A, C] of s bytes each:
// B A C s bytes are read forward and written backward, the least possible (181 MB each for 128 x 8732 x 81 of 16 bits),
// and 40 to 50 bytes for each anchor: n, its cross-entropy, its label, and the gradient of its deltas.
//
// Precision: 16-bit input is computed in float32. n - x_y is computed as log sum exp(x_c - max) + (max - x_y), which
// keeps small losses accurate. Ties: among equal cross-entropies the lower anchor is chosen first; NaN is the largest.
// Deterministic: the radix select is exact and every sum has a fixed order. A label that is not in 0 to C - 1 makes its
// anchor's loss and gradient NaN, is always in the loss, and is never used as an index.
#include "checks.h"
#include "constants.h"
#include "cuda/primitives.cuh"

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

namespace ssd_fast {
namespace {

constexpr int kThreadsPerImage = 1024;  // of choose_anchors
constexpr int kThreads = 256;  // of write_gradients

// rows: the logits of a tile, in shared or global memory. Lanes 8 j to 8 j + 7 of a warp reduce its row 4 i + j, and
// lane 8 j + i keeps the result, so that all lanes take their logarithms together. Lanes beyond the last row reduce
// that row again, which keeps the warp together, and write nothing.
template <typename scalar_t, typename T>
__device__ __forceinline__ void normalise_tile(
    const scalar_t* rows, const int* labels, int num_rows, int rows_per_warp, int num_classes, T* log_normalisers,
    T* class_losses) {
  const int place = threadIdx.x % kLanesPerRow, num_turns = rows_per_warp / kRowsAtOnce;
  const int first = threadIdx.x / kWarpSize * rows_per_warp + threadIdx.x % kWarpSize / kLanesPerRow;
  T max = 0, sum = 0;
  for (int turn = 0; turn < num_turns; ++turn) {
    const int row = min(first + turn * kRowsAtOnce, num_rows - 1);
    T row_max, row_sum;
    reduce_row(rows + row * num_classes, num_classes, row_max, row_sum);
    if (turn == place) {
      max = row_max;
      sum = row_sum;
    }
  }
  const int row = first + place * kRowsAtOnce;
  if (place < num_turns && row < num_rows) {
    const int label = labels[row];
    const bool known = label >= 0 && label < num_classes;
    const T log_sum = log(sum);
    log_normalisers[row] = known ? max + log_sum : kNaN<T>;
    class_losses[row] = known ? max - static_cast<T>(rows[row * num_classes + label]) + log_sum : kNaN<T>;
  }
}

template <typename scalar_t, typename T>
__global__ void __launch_bounds__(kThreadsPerTile) normalise_rows(
    const scalar_t* __restrict__ logits, const int* __restrict__ labels, int64_t num_rows, int rows_per_warp,
    bool staged, int num_classes, T* __restrict__ log_normalisers, T* __restrict__ class_losses) {
  extern __shared__ uint4 tile[];
  const int rows_per_tile = rows_per_warp * kWarpsPerTile;
  const int64_t first = int64_t{blockIdx.x} * rows_per_tile;
  const int size = static_cast<int>(min(int64_t{rows_per_tile}, num_rows - first));
  const scalar_t* rows = logits + first * num_classes;
  labels += first;
  log_normalisers += first;
  class_losses += first;
  if (staged) {
    stage(rows, size * num_classes, tile);
    __syncthreads();
    normalise_tile(
        reinterpret_cast<const scalar_t*>(tile), labels, size, rows_per_warp, num_classes, log_normalisers,
        class_losses);
  } else {
    normalise_tile(rows, labels, size, rows_per_warp, num_classes, log_normalisers, class_losses);
  }
}

// Sum of `value` over the block, returned in every thread.
template <typename T>
__device__ T sum_over_block(T value) {
  __shared__ T of_warps[kThreadsPerImage / kWarpSize];
#pragma unroll
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, lanes);
  }
  __syncthreads();  // threads may still be reading an earlier sum
  if (threadIdx.x % kWarpSize == 0) {
    of_warps[threadIdx.x / kWarpSize] = value;
  }
  __syncthreads();
  value = of_warps[threadIdx.x % kWarpSize];
#pragma unroll
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, lanes);
  }
  return value;
}

// Bits of a loss as an unsigned integer that grows with it; NaN has the largest.
__device__ __forceinline__ uint32_t ordered_bits(float loss) {
  const uint32_t bits = __float_as_uint(loss), sign = 1u << 31;
  return isnan(loss) ? ~0u : bits & sign ? ~bits : bits | sign;
}

__device__ __forceinline__ uint64_t ordered_bits(double loss) {
  const uint64_t bits = __double_as_longlong(loss), sign = uint64_t{1} << 63;
  return isnan(loss) ? ~uint64_t{0} : bits & sign ? ~bits : bits | sign;
}

// Unique keys of the background anchors, largest for the hardest: ordered bits above ~anchor. Positives have key 0.
template <typename T>
struct Hardness {
  using Key = std::conditional_t<std::is_same_v<T, double>, unsigned __int128, uint64_t>;
  const T* class_losses;
  const int* labels;

  __device__ Key operator()(int anchor) const {
    return labels[anchor] > 0
        ? 0
        : static_cast<Key>(ordered_bits(class_losses[anchor])) << 32 | ~static_cast<uint32_t>(anchor);
  }
};

template <typename T>
__device__ __forceinline__ T smooth_l1(T difference) {
  const T size = fabs(difference);
  return size < 1 ? T(0.5) * difference * difference : size - T(0.5);
}

template <typename T>
__device__ __forceinline__ T smooth_l1_slope(T difference) {  // NaN stays NaN
  return difference < -1 ? T(-1) : difference > 1 ? T(1) : difference;
}

template <typename scalar_t, typename T>
__global__ void __launch_bounds__(kThreadsPerImage, 1) choose_anchors(
    const scalar_t* __restrict__ deltas, const T* __restrict__ target_deltas, const int* __restrict__ labels,
    const T* __restrict__ class_losses, int num_anchors, T* __restrict__ log_normalisers, T* __restrict__ box,
    T* __restrict__ class_, int* __restrict__ num_positives) {
  const int64_t first = int64_t{blockIdx.x} * num_anchors;
  deltas += 4 * first;
  target_deltas += 4 * first;
  labels += first;
  class_losses += first;
  log_normalisers += first;

  int count = 0;
  T box_loss = 0, class_loss = 0;
  for (int anchor = threadIdx.x; anchor < num_anchors; anchor += kThreadsPerImage) {
    if (labels[anchor] > 0) {
      ++count;
      class_loss += class_losses[anchor];
      for (int64_t i = 4 * int64_t{anchor}; i < 4 * int64_t{anchor} + 4; ++i) {
        box_loss += smooth_l1(static_cast<T>(deltas[i]) - target_deltas[i]);
      }
    }
  }
  count = sum_over_block(count);
  const int num_hard = static_cast<int>(min(int64_t{kNegativesPerPositive} * count, int64_t{num_anchors - count}));
  const Hardness<T> hardness{class_losses, labels};
  using Key = typename Hardness<T>::Key;
  const Key bound = num_hard > 0 ? kth_largest<Key>(num_anchors, num_hard, hardness) : 0;
  for (int anchor = threadIdx.x; anchor < num_anchors; anchor += kThreadsPerImage) {
    if (labels[anchor] <= 0) {
      if (labels[anchor] < 0 || (num_hard > 0 && hardness(anchor) >= bound)) {
        class_loss += class_losses[anchor];
      } else {
        log_normalisers[anchor] = kInfinity<T>;
      }
    }
  }
  box_loss = sum_over_block(box_loss);
  class_loss = sum_over_block(class_loss);
  if (threadIdx.x == 0) {
    box[blockIdx.x] = box_loss / max(count, 1);
    class_[blockIdx.x] = class_loss / max(count, 1);
    num_positives[blockIdx.x] = count;
  }
}

template <typename scalar_t, int size>
struct alignas(size * sizeof(scalar_t)) Vector {
  scalar_t values[size];
};

// A block writes the gradients of kThreads anchors, whose logits fill whole vectors: first those of the deltas, with
// one thread for each anchor, then those of the logits, with one thread for each vector.
template <typename scalar_t, typename T>
__global__ void __launch_bounds__(kThreads) write_gradients(
    const T* __restrict__ grad_box, const T* __restrict__ grad_class, const scalar_t* __restrict__ deltas,
    const scalar_t* __restrict__ logits, const T* __restrict__ target_deltas, const int* __restrict__ labels,
    const T* __restrict__ log_normalisers, const int* __restrict__ num_positives, int64_t num_rows, int num_anchors,
    int num_classes, scalar_t* __restrict__ grad_deltas, scalar_t* __restrict__ grad_logits) {
  using BoxVector = Vector<scalar_t, 4>;
  constexpr int kVector = 16 / sizeof(scalar_t);
  __shared__ T normalisers[kThreads], scales[kThreads];
  __shared__ int row_labels[kThreads];
  const int64_t first = int64_t{blockIdx.x} * kThreads, own = first + threadIdx.x;
  normalisers[threadIdx.x] = kInfinity<T>;  // stays for rows beyond the last
  if (own < num_rows) {
    const int64_t image = own / num_anchors;
    const int label = labels[own], divisor = max(num_positives[image], 1);
    normalisers[threadIdx.x] = log_normalisers[own];
    scales[threadIdx.x] = grad_class[image] / divisor;
    row_labels[threadIdx.x] = label;
    BoxVector gradients = {};
    if (label > 0) {
      const T scale = grad_box[image] / divisor;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const T difference = static_cast<T>(deltas[4 * own + i]) - target_deltas[4 * own + i];
        gradients.values[i] = static_cast<scalar_t>(smooth_l1_slope(difference) * scale);
      }
    }
    reinterpret_cast<BoxVector*>(grad_deltas)[own] = gradients;
  }
  __syncthreads();

  logits += first * num_classes;
  grad_logits += first * num_classes;
  const int num_values = static_cast<int>(min(int64_t{kThreads}, num_rows - first)) * num_classes;
  constexpr int kStep = kThreads * kVector;
  const int row_step = kStep / num_classes, class_step = kStep % num_classes;
  int begin = threadIdx.x * kVector, begin_row = begin / num_classes, begin_class = begin % num_classes;
  while (begin < num_values) {
    bool in_loss = false;
    for (int row = begin_row, past = begin_class + kVector; past > 0; past -= num_classes, ++row) {
      in_loss |= normalisers[row] != kInfinity<T>;
    }
    Vector<scalar_t, kVector> gradients = {};
    if (in_loss) {
      int row = begin_row, c = begin_class;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const T normaliser = normalisers[row];
        if (normaliser != kInfinity<T>) {
          const T probability = exp(static_cast<T>(logits[begin + i]) - normaliser);
          // an infinite scale makes NaN of the label's own entry, as in plain PyTorch
          const T subtracted = c == row_labels[row] ? scales[row] : T(0);
          gradients.values[i] = static_cast<scalar_t>(probability * scales[row] - subtracted);
        }
        if (++c == num_classes) {
          c = 0;
          ++row;
        }
      }
    }
    if (begin + kVector <= num_values) {
      *reinterpret_cast<Vector<scalar_t, kVector>*>(grad_logits + begin) = gradients;
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (begin + i < num_values) {
          grad_logits[begin + i] = gradients.values[i];
        }
      }
    }
    begin += kStep;
    begin_row += row_step;
    begin_class += class_step;
    if (begin_class >= num_classes) {
      begin_class -= num_classes;
      ++begin_row;
    }
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> multibox_loss(
    const at::Tensor& deltas_in, const at::Tensor& logits_in, const at::Tensor& target_deltas_in,
    const at::Tensor& target_labels_in) {
  check_multibox_loss(deltas_in, logits_in, target_deltas_in, target_labels_in);
  const c10::cuda::CUDAGuard guard(deltas_in.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const at::ScalarType dtype = deltas_in.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor deltas = deltas_in.contiguous(), logits = logits_in.contiguous();
  const at::Tensor target_deltas = target_deltas_in.to(dtype).contiguous();
  const at::Tensor target_labels = as_int32(target_labels_in);
  const int64_t batch_size = logits.size(0), num_anchors = logits.size(1), num_classes = logits.size(2);
  const int64_t num_rows = batch_size * num_anchors;
  const auto options = logits.options().dtype(dtype);
  at::Tensor box = at::empty({batch_size}, options), class_ = at::empty({batch_size}, options);
  at::Tensor log_normalisers = at::empty({batch_size, num_anchors}, options);
  at::Tensor class_losses = at::empty({batch_size, num_anchors}, options);
  at::Tensor num_positives = at::empty({batch_size}, options.dtype(at::kInt));
  if (batch_size == 0) {
    return {box, class_, log_normalisers, num_positives};
  }

  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "multibox_loss", [&] {
    using T = Accumulate<scalar_t>;
    const int* labels_data = target_labels.const_data_ptr<int>();
    T* normalisers_data = log_normalisers.mutable_data_ptr<T>();
    T* losses_data = class_losses.mutable_data_ptr<T>();
    if (num_anchors > 0) {
      const Tiles tiles(num_rows, num_classes * sizeof(scalar_t));
      normalise_rows<<<tiles.count, kThreadsPerTile, tiles.shared_bytes, stream>>>(
          logits.const_data_ptr<scalar_t>(), labels_data, num_rows, tiles.rows_per_warp, tiles.staged, num_classes,
          normalisers_data, losses_data);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
    choose_anchors<<<batch_size, kThreadsPerImage, 0, stream>>>(
        deltas.const_data_ptr<scalar_t>(), target_deltas.const_data_ptr<T>(), labels_data, losses_data, num_anchors,
        normalisers_data, box.mutable_data_ptr<T>(), class_.mutable_data_ptr<T>(),
        num_positives.mutable_data_ptr<int>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {box, class_, log_normalisers, num_positives};
}

std::tuple<at::Tensor, at::Tensor> multibox_loss_backward(
    const at::Tensor& grad_box_in, const at::Tensor& grad_class_in, const at::Tensor& deltas_in,
    const at::Tensor& logits_in, const at::Tensor& target_deltas_in, const at::Tensor& target_labels_in,
    const at::Tensor& log_normalisers_in, const at::Tensor& num_positives_in) {
  check_multibox_loss_backward(
      grad_box_in, grad_class_in, deltas_in, logits_in, target_deltas_in, target_labels_in, log_normalisers_in,
      num_positives_in);
  const c10::cuda::CUDAGuard guard(deltas_in.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor deltas = deltas_in.contiguous(), logits = logits_in.contiguous();
  const at::Tensor target_deltas = target_deltas_in.to(grad_box_in.scalar_type()).contiguous();
  const at::Tensor target_labels = as_int32(target_labels_in);
  const at::Tensor log_normalisers = log_normalisers_in.contiguous(), num_positives = num_positives_in.contiguous();
  const at::Tensor grad_box = grad_box_in.contiguous(), grad_class = grad_class_in.contiguous();
  const int64_t num_anchors = logits.size(1), num_classes = logits.size(2), num_rows = logits.size(0) * num_anchors;
  at::Tensor grad_deltas = at::empty(deltas.sizes(), deltas.options());
  at::Tensor grad_logits = at::empty(logits.sizes(), logits.options());
  if (num_rows == 0) {
    return {grad_deltas, grad_logits};
  }

  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "multibox_loss_backward", [&] {
    using T = Accumulate<scalar_t>;
    write_gradients<<<(num_rows + kThreads - 1) / kThreads, kThreads, 0, stream>>>(
        grad_box.const_data_ptr<T>(), grad_class.const_data_ptr<T>(), deltas.const_data_ptr<scalar_t>(),
        logits.const_data_ptr<scalar_t>(), target_deltas.const_data_ptr<T>(), target_labels.const_data_ptr<int>(),
        log_normalisers.const_data_ptr<T>(), num_positives.const_data_ptr<int>(), num_rows, num_anchors, num_classes,
        grad_deltas.mutable_data_ptr<scalar_t>(), grad_logits.mutable_data_ptr<scalar_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {grad_deltas, grad_logits};
}

TORCH_LIBRARY_IMPL(ssd_fast, CUDA, m) {
  m.impl("multibox_loss", multibox_loss);
  m.impl("multibox_loss_backward", multibox_loss_backward);
}

}  // namespace
}  // namespace ssd_fast

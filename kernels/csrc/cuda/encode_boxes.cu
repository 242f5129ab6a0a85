// Targets of every anchor on the GPU: IoU, matching by the rules of kernels/reference.py, encoding of the deltas.
//
// Both kernels have a thread for each anchor of each image, in blocks of 256. So an image of many ground truths does not
// wait for one block, and a batch of few images fills the GPU. The ground truths of the image, any number of them, pass
// through shared memory in tiles of 256.
// 1. match_boxes. Every anchor computes its IoUs once and keeps the best one's ground truth in a register. The best
//    anchor of each ground truth is the maximum of 64-bit keys: the IoU's bits (IoUs are not negative, so their bits are
//    in order) above ~tie_rank. The maximum is taken within a warp by shuffles, which are skipped if no lane beats the
//    block's maximum so far, then in shared memory, and once for each block and ground truth in global memory.
// 2. write_targets. Every anchor checks if it is the best anchor of ground truths; the last of these takes it. Then it
//    writes its deltas and its label. Until then the label's place holds the owner.
// The matrix of IoUs never exists. Memory: 20 bytes are written for each anchor of each image, the least possible, and
// 4 are written and read before; the anchors are read from the L2 cache. The workspace has 8 bytes for each ground truth.
//
// Ties: among equal IoUs an anchor takes the first ground truth (strict comparison in ascending order), and a ground
// truth the anchor of lowest rank (by the keys). A ground truth that overlaps no anchor takes the anchor of rank 0, the
// first of equal zeros. Deterministic: a maximum does not depend on the order of its atomics.
//
// The host does not read values, so it cannot reject them. Instead, a ground truth that has no area, is not finite or
// has a label below 1 is left out; offsets are clamped to the number of boxes; tie_ranks must be a permutation.
#include "checks.h"
#include "constants.h"
#include "cuda/primitives.cuh"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace ssd_fast {
namespace {

constexpr int kThreads = 256;  // of a block: its anchors
constexpr int kTile = kThreads;  // ground truths in shared memory, loaded by a thread each

using Key = unsigned long long;  // the type that atomicMax takes
constexpr Key kLeftOut = 0xffffffff00000000ull;  // marks a ground truth that is left out: no anchor has rank ~0
constexpr int kNoOwner = -1;  // of an anchor; else the row of a ground truth

__device__ __forceinline__ unsigned rank_of(int anchor, const int* tie_ranks) {
  return tie_ranks ? tie_ranks[anchor] : anchor;
}

__device__ __forceinline__ int row_at(const int64_t* offsets, int image, int num_boxes) {
  const int64_t offset = offsets[image];
  return offset < 0 ? 0 : offset > num_boxes ? num_boxes : static_cast<int>(offset);
}

__device__ __forceinline__ bool is_usable(float4 box, int label) {
  return isfinite(box.x) && isfinite(box.y) && isfinite(box.z) && isfinite(box.w) && box.x < box.z && box.y < box.w &&
      label >= 1;
}

__device__ __forceinline__ float4 encode(float4 box, float4 anchor_cxcywh) {
  const float centre_x = __fmul_rn(0.5f, __fadd_rn(box.x, box.z)), centre_y = __fmul_rn(0.5f, __fadd_rn(box.y, box.w));
  const float width = __fsub_rn(box.z, box.x), height = __fsub_rn(box.w, box.y);
  return {
      __fdiv_rn(__fmul_rn(kInverseCentreVariance, __fsub_rn(centre_x, anchor_cxcywh.x)), anchor_cxcywh.z),
      __fdiv_rn(__fmul_rn(kInverseCentreVariance, __fsub_rn(centre_y, anchor_cxcywh.y)), anchor_cxcywh.w),
      __fmul_rn(kInverseSizeVariance, logf(__fdiv_rn(width, anchor_cxcywh.z))),
      __fmul_rn(kInverseSizeVariance, logf(__fdiv_rn(height, anchor_cxcywh.w)))};
}

// The place of a thread: its image, and its anchor there, which may lie beyond the last one.
struct Place {
  int image, anchor;

  __device__ explicit Place(int blocks_per_image)
      : image(blockIdx.x / blocks_per_image), anchor(blockIdx.x % blocks_per_image * kThreads + threadIdx.x) {
  }
};

// owners [B, A]: the ground truth with the best IoU above the threshold, or kNoOwner. best_keys [T]: of the best anchor
// of each ground truth, 0 if all its IoUs are 0; zero at the launch.
__global__ void __launch_bounds__(kThreads) match_boxes(
    const float* __restrict__ boxes_ltrb, const int* __restrict__ labels, const int64_t* __restrict__ offsets,
    const float* __restrict__ anchors_cxcywh, const int* __restrict__ tie_ranks, int num_boxes, int num_anchors,
    int blocks_per_image, float iou_threshold, int* __restrict__ owners, Key* best_keys) {
  __shared__ float4 boxes[kTile];
  __shared__ float areas[kTile];
  __shared__ Key keys[kTile];
  const Place own(blocks_per_image);
  const bool exists = own.anchor < num_anchors;  // all lanes of a warp take part in the shuffles
  const float4 anchor_box = exists ? cxcywh_to_ltrb(load_four(anchors_cxcywh + 4 * int64_t{own.anchor})) : float4{};
  const float anchor_area = area_of(anchor_box);
  const unsigned rank = exists ? rank_of(own.anchor, tie_ranks) : 0;
  const int end = row_at(offsets, own.image + 1, num_boxes);
  int owner = kNoOwner;
  float best_iou = iou_threshold;
  for (int first = row_at(offsets, own.image, num_boxes); first < end; first += kTile) {
    const int size = min(kTile, end - first);
    if (threadIdx.x < size) {
      const int row = first + threadIdx.x;
      const float4 box = load_four(boxes_ltrb + 4 * int64_t{row});
      boxes[threadIdx.x] = box;
      areas[threadIdx.x] = area_of(box);
      keys[threadIdx.x] = is_usable(box, labels[row]) ? 0 : kLeftOut;
    }
    __syncthreads();
    for (int i = 0; i < size; ++i) {
      const Key found = *static_cast<volatile Key*>(&keys[i]);
      if (found == kLeftOut) {
        continue;
      }
      const float iou = iou_of(boxes[i], areas[i], anchor_box, anchor_area);
      if (iou > best_iou) {
        best_iou = iou;
        owner = first + i;
      }
      Key key = iou > 0.0f ? Key{__float_as_uint(iou)} << 32 | ~rank : 0;
      if (__any_sync(kAllLanes, key > found)) {
#pragma unroll
        for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
          key = max(key, __shfl_xor_sync(kAllLanes, key, lanes));
        }
        if (threadIdx.x % kWarpSize == 0) {
          atomicMax(&keys[i], key);
        }
      }
    }
    __syncthreads();  // the keys are complete, and the next tile overwrites the boxes
    if (threadIdx.x < size && keys[threadIdx.x] != 0) {
      atomicMax(&best_keys[first + threadIdx.x], keys[threadIdx.x]);
    }
  }
  if (exists) {
    owners[int64_t{own.image} * num_anchors + own.anchor] = owner;
  }
}

// owners_then_labels [B, A]: holds the owners at the launch and the labels at the end.
__global__ void __launch_bounds__(kThreads) write_targets(
    const float* __restrict__ boxes_ltrb, const int* __restrict__ labels, const int64_t* __restrict__ offsets,
    const float* __restrict__ anchors_cxcywh, const int* __restrict__ tie_ranks, const Key* __restrict__ best_keys,
    int num_boxes, int num_anchors, int blocks_per_image, float4* __restrict__ deltas,
    int* __restrict__ owners_then_labels) {
  __shared__ unsigned best_ranks[kTile];
  const Place own(blocks_per_image);
  const bool exists = own.anchor < num_anchors;
  const int64_t place = int64_t{own.image} * num_anchors + own.anchor;
  const unsigned rank = exists ? rank_of(own.anchor, tie_ranks) : 0;
  const int end = row_at(offsets, own.image + 1, num_boxes);
  int owner = exists ? owners_then_labels[place] : kNoOwner;
  for (int first = row_at(offsets, own.image, num_boxes); first < end; first += kTile) {
    const int size = min(kTile, end - first);
    if (threadIdx.x < size) {
      const Key key = best_keys[first + threadIdx.x];
      best_ranks[threadIdx.x] = key == 0 ? 0 : ~static_cast<unsigned>(key);  // of equal zeros, rank 0 is the first
    }
    __syncthreads();
    for (int i = 0; i < size; ++i) {
      owner = rank == best_ranks[i] ? first + i : owner;
    }
    __syncthreads();  // the next tile overwrites the ranks
  }
  if (exists) {
    deltas[place] = owner == kNoOwner
        ? float4{}
        : encode(load_four(boxes_ltrb + 4 * int64_t{owner}), load_four(anchors_cxcywh + 4 * int64_t{own.anchor}));
    owners_then_labels[place] = owner == kNoOwner ? 0 : labels[owner];
  }
}

std::tuple<at::Tensor, at::Tensor> encode_boxes(
    const at::Tensor& boxes_in, const at::Tensor& labels_in, const at::Tensor& offsets_in, const at::Tensor& anchors_in,
    double iou_threshold, const std::optional<at::Tensor>& tie_ranks_in) {
  check_encode_boxes(boxes_in, labels_in, offsets_in, anchors_in, iou_threshold, tie_ranks_in);
  const c10::cuda::CUDAGuard guard(boxes_in.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor boxes = boxes_in.contiguous(), labels = as_int32(labels_in);
  const at::Tensor offsets = offsets_in.to(at::kLong).contiguous();
  const at::Tensor anchors = anchors_in.to(at::kFloat).contiguous();
  at::Tensor tie_ranks;
  if (tie_ranks_in.has_value()) {
    tie_ranks = as_int32(*tie_ranks_in);
  }
  const int64_t batch_size = offsets.size(0) - 1, num_anchors = anchors.size(0), num_boxes = boxes.size(0);
  at::Tensor deltas = at::empty({batch_size, num_anchors, 4}, boxes.options());
  at::Tensor target_labels = at::empty({batch_size, num_anchors}, labels.options());
  if (batch_size == 0) {
    return {deltas, target_labels};
  }
  const int64_t blocks_per_image = (num_anchors + kThreads - 1) / kThreads;
  const int64_t num_blocks = batch_size * blocks_per_image;
  const at::Tensor best_keys = at::zeros({num_boxes}, offsets.options());
  Key* keys_data = reinterpret_cast<Key*>(best_keys.mutable_data_ptr<int64_t>());
  const float* boxes_data = boxes.const_data_ptr<float>();
  const int* labels_data = labels.const_data_ptr<int>();
  const int64_t* offsets_data = offsets.const_data_ptr<int64_t>();
  const float* anchors_data = anchors.const_data_ptr<float>();
  const int* ranks_data = tie_ranks.defined() ? tie_ranks.const_data_ptr<int>() : nullptr;
  int* target_data = target_labels.mutable_data_ptr<int>();
  match_boxes<<<num_blocks, kThreads, 0, stream>>>(
      boxes_data, labels_data, offsets_data, anchors_data, ranks_data, num_boxes, num_anchors, blocks_per_image,
      static_cast<float>(iou_threshold), target_data, keys_data);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  write_targets<<<num_blocks, kThreads, 0, stream>>>(
      boxes_data, labels_data, offsets_data, anchors_data, ranks_data, keys_data, num_boxes, num_anchors,
      blocks_per_image, reinterpret_cast<float4*>(deltas.mutable_data_ptr<float>()), target_data);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {deltas, target_labels};
}

TORCH_LIBRARY_IMPL(ssd_fast, CUDA, m) {
  m.impl("encode_boxes", encode_boxes);
}

}  // namespace
}  // namespace ssd_fast

// Targets of every anchor on the GPU: IoU, matching by the rules of kernels/reference.py, encoding of the deltas.
//
// One launch serves the batch, with one block for each image; thread t handles the anchors t, t + 1024, … The ground
// truths, any number of them, are loaded into shared memory in tiles of 256. For each tile:
// 1. Every anchor computes its IoUs once and keeps the best one with its ground truth. The best anchor of each ground
//    truth is the maximum of 64-bit keys: the IoU's bits (IoUs are not negative, so their bits are in order) above
//    ~tie_rank. The maximum is taken within a warp by shuffles, which are skipped if no lane beats the block's maximum
//    so far, then in shared memory.
// 2. Every anchor checks if it is the best anchor of ground truths; the last of these takes it. After the last tile the
//    anchor writes its deltas and its label. Before that, the label's place holds the owner, so no workspace is needed;
//    each further tile recomputes the IoU with the owner, to the same bits.
// The matrix of IoUs never exists. Memory: 20 bytes are written for each anchor of each image, the least possible; the
// anchors are read from the L2 cache.
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
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace ssd_fast {
namespace {

constexpr int kThreads = 1024;
constexpr int kTile = 256;  // ground truths in shared memory

using Key = unsigned long long;  // the type that atomicMax takes
constexpr Key kLeftOut = 0xffffffff00000000ull;  // marks a ground truth that is left out: no anchor has rank ~0

// Owner of an anchor: kNoOwner, or the row of a ground truth. A row >= 0 owns the anchor by an IoU above the threshold;
// a row whose best anchor this is, is stored as forced(row), below kNoOwner.
constexpr int kNoOwner = -1;

__device__ __forceinline__ int forced(int row) {
  return kNoOwner - 1 - row;  // its own inverse
}

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

// owners_then_labels [B, A]: holds the owners between tiles and the labels at the end.
__global__ void __launch_bounds__(kThreads, 1) encode_images(
    const float* __restrict__ boxes_ltrb, const int* __restrict__ labels, const int64_t* __restrict__ offsets,
    const float* __restrict__ anchors_cxcywh, const int* __restrict__ tie_ranks, int num_boxes, int num_anchors,
    float iou_threshold, float4* __restrict__ deltas, int* __restrict__ owners_then_labels) {
  __shared__ float4 boxes[kTile];
  __shared__ float areas[kTile];
  __shared__ Key keys[kTile];  // of the best anchors; 0 if all IoUs are 0, a tie that rank 0 wins
  const int begin = row_at(offsets, blockIdx.x, num_boxes), end = row_at(offsets, blockIdx.x + 1, num_boxes);
  deltas += int64_t{blockIdx.x} * num_anchors;
  owners_then_labels += int64_t{blockIdx.x} * num_anchors;

  int first = begin;
  do {  // runs once even without ground truths
    const int size = max(0, min(kTile, end - first));
    if (threadIdx.x < size) {
      const int row = first + threadIdx.x;
      const float4 box = load_four(boxes_ltrb + 4 * int64_t{row});
      boxes[threadIdx.x] = box;
      areas[threadIdx.x] = area_of(box);
      keys[threadIdx.x] = is_usable(box, labels[row]) ? 0 : kLeftOut;
    }
    __syncthreads();

    for (int anchor = threadIdx.x; anchor - threadIdx.x % kWarpSize < num_anchors; anchor += kThreads) {
      const bool exists = anchor < num_anchors;  // all lanes of a warp take part in the shuffles
      const float4 anchor_box = exists ? cxcywh_to_ltrb(load_four(anchors_cxcywh + 4 * int64_t{anchor})) : float4{};
      const float anchor_area = area_of(anchor_box);
      const unsigned rank = exists ? rank_of(anchor, tie_ranks) : 0;
      int owner = exists && first > begin ? owners_then_labels[anchor] : kNoOwner;
      float best_iou = iou_threshold;
      if (owner > kNoOwner) {
        const float4 box = load_four(boxes_ltrb + 4 * int64_t{owner});
        best_iou = iou_of(box, area_of(box), anchor_box, anchor_area);
      }
      for (int i = 0; i < size; ++i) {
        const Key found = *static_cast<volatile Key*>(&keys[i]);
        if (found == kLeftOut) {
          continue;
        }
        const float iou = iou_of(boxes[i], areas[i], anchor_box, anchor_area);
        if (iou > best_iou && owner >= kNoOwner) {
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
      if (exists) {
        owners_then_labels[anchor] = owner;
      }
    }
    __syncthreads();

    const bool last = first + kTile >= end;
    for (int anchor = threadIdx.x; anchor < num_anchors; anchor += kThreads) {
      const unsigned rank = rank_of(anchor, tie_ranks);
      int owner = owners_then_labels[anchor];
      for (int i = 0; i < size; ++i) {
        const unsigned best_rank = keys[i] == 0 ? 0 : ~static_cast<unsigned>(keys[i]);
        owner = rank == best_rank ? forced(first + i) : owner;
      }
      if (last) {
        const int row = owner < kNoOwner ? forced(owner) : owner;
        deltas[anchor] = row == kNoOwner
            ? float4{}
            : encode(load_four(boxes_ltrb + 4 * int64_t{row}), load_four(anchors_cxcywh + 4 * int64_t{anchor}));
        owner = row == kNoOwner ? 0 : labels[row];
      }
      owners_then_labels[anchor] = owner;
    }
    __syncthreads();  // the next tile overwrites the keys
    first += kTile;
  } while (first < end);
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
  encode_images<<<batch_size, kThreads, 0, stream>>>(
      boxes.const_data_ptr<float>(), labels.const_data_ptr<int>(), offsets.const_data_ptr<int64_t>(),
      anchors.const_data_ptr<float>(), tie_ranks.defined() ? tie_ranks.const_data_ptr<int>() : nullptr, num_boxes,
      num_anchors, static_cast<float>(iou_threshold), reinterpret_cast<float4*>(deltas.mutable_data_ptr<float>()),
      target_labels.mutable_data_ptr<int>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {deltas, target_labels};
}

TORCH_LIBRARY_IMPL(ssd_fast, CUDA, m) {
  m.impl("encode_boxes", encode_boxes);
}

}  // namespace
}  // namespace ssd_fast

// Detections on the GPU: softmax, score threshold, box decoding, greedy non-maximum suppression per class, best of all.
//
// 1. find_candidates, eight lanes for each anchor. The sum of the softmax is at least exp(x_0), where 0 is the
//    background, so a class can have a probability above t only if x_c > x_0 + log t. In a trained network this
//    comparison, without an exponential, rules out nearly every anchor. Softmax and box are computed for the rest, and
//    every class above t appends a key to the list of its image and class.
// 2. suppress, one block for each image and class; it ends at once if the list is empty. It sorts the best
//    max_per_class keys, with their boxes in shared memory. From best to worst, each box that is still there drops all
//    later boxes that overlap it: at most max_per_class^2 / 2 pairs. The survivors are appended to the image's list.
// 3. write_detections, one block for each image: sorts the best max_detections of its list and writes them.
// A key is the score's bits (scores are not negative, so their bits are in order) above ~(anchor * C + class). Keys are
// unique and in the order of the result. Atomic counters fill the lists in any order; selection by rank and sorting
// make the result deterministic.
//
// Memory: the logits are read once, the least possible (181 MB for 128 x 8732 x 81 of 16 bits); nothing of their size
// is written. The workspace reserves B (C - 1) A keys of 8 bytes, room for every anchor in every class (179 MB for
// 32 x 8732 x 81), B (C - 1) max_per_class keys for the survivors, and 16 bytes for each anchor; the part that is not
// used is never touched. The host does not wait and no size depends on values, so a CUDA graph can capture the call.
//
// Ties: among equal scores the lower anchor comes first, then the lower class. An anchor with a logit, a delta or a box
// coordinate that is not finite gives no detection. Boxes and IoUs are computed as in kernels/reference.py, operation
// by operation.
#include "checks.h"
#include "constants.h"
#include "cuda/primitives.cuh"

#include <ATen/Dispatch_v2.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

namespace ssd_fast {
namespace {

constexpr int kThreadsPerClass = 128;  // of suppress
constexpr int kThreadsPerImage = 512;  // of write_detections
constexpr int kMostInSharedMemory = 1024;  // keys and boxes; longer lists are sorted in global memory

using Key = unsigned long long;

__device__ __forceinline__ Key key_of(float score, int anchor, int c, int num_classes) {
  return Key{__float_as_uint(score)} << 32 | ~static_cast<unsigned>(anchor * num_classes + c);
}

__device__ __forceinline__ float score_of(Key key) {
  return __uint_as_float(static_cast<unsigned>(key >> 32));
}

__device__ __forceinline__ int anchor_of(Key key, int num_classes) {
  return ~static_cast<unsigned>(key) / num_classes;
}

__device__ __forceinline__ int class_of(Key key, int num_classes) {
  return ~static_cast<unsigned>(key) % num_classes;
}

__device__ __forceinline__ bool all_finite(float4 values) {
  return isfinite(values.x) && isfinite(values.y) && isfinite(values.z) && isfinite(values.w);
}

__device__ __forceinline__ float4 decode(float4 deltas, float4 anchor_cxcywh) {
  return cxcywh_to_ltrb(
      {__fadd_rn(__fmul_rn(__fmul_rn(deltas.x, kCentreVariance), anchor_cxcywh.z), anchor_cxcywh.x),
       __fadd_rn(__fmul_rn(__fmul_rn(deltas.y, kCentreVariance), anchor_cxcywh.w), anchor_cxcywh.y),
       __fmul_rn(expf(__fmul_rn(deltas.z, kSizeVariance)), anchor_cxcywh.z),
       __fmul_rn(expf(__fmul_rn(deltas.w, kSizeVariance)), anchor_cxcywh.w)});
}

// lists [B, C - 1, A]: keys. sizes [B, C - 1]: of the lists; zero at the launch. boxes_ltrb [B, A]: of listed anchors.
struct Candidates {
  Key* lists;
  int* sizes;
  float4* boxes_ltrb;
};

// rows: the logits of a tile, in shared or global memory; its first row is row first_row of the batch.
template <typename scalar_t>
__device__ __forceinline__ void find_in_tile(
    const scalar_t* rows, const scalar_t* deltas, const float* anchors_cxcywh, int64_t first_row, int num_rows,
    int rows_per_warp, int num_anchors, int num_classes, float score_threshold, float log_threshold,
    const Candidates& candidates) {
  const int lane = threadIdx.x % kWarpSize, lane_of_row = lane % kLanesPerRow;
  const unsigned lanes_of_row = ((1u << kLanesPerRow) - 1) << (lane - lane_of_row);
  const int first = threadIdx.x / kWarpSize * rows_per_warp + lane / kLanesPerRow;
  for (int i = first; i < first + rows_per_warp; i += kRowsAtOnce) {
    const scalar_t* row = rows + min(i, num_rows - 1) * num_classes;
    float largest = -kInfinity<float>;  // logit of this lane, without the background
#pragma unroll 4
    for (int c = lane_of_row == 0 ? kLanesPerRow : lane_of_row; c < num_classes; c += kLanesPerRow) {
      largest = fmaxf(largest, static_cast<float>(row[c]));
    }
    const bool promising = i < num_rows && largest - static_cast<float>(row[0]) > log_threshold;
    const unsigned promising_lanes = __ballot_sync(kAllLanes, promising);
    if (promising_lanes == 0) {
      continue;
    }
    float max, sum;
    reduce_row(row, num_classes, max, sum);  // for all rows of the warp: its shuffles need all lanes
    bool finite = true;
    for (int c = lane_of_row; c < num_classes; c += kLanesPerRow) {
      finite = finite && isfinite(static_cast<float>(row[c]));
    }
    const unsigned finite_lanes = __ballot_sync(kAllLanes, finite);
    if ((promising_lanes & lanes_of_row) == 0 || (finite_lanes & lanes_of_row) != lanes_of_row) {
      continue;
    }
    const int64_t place = first_row + i, image = place / num_anchors;
    const int anchor = static_cast<int>(place - image * num_anchors);
    const float4 anchor_deltas = load_four(deltas + 4 * place);
    const float4 box = decode(anchor_deltas, load_four(anchors_cxcywh + 4 * int64_t{anchor}));
    if (!all_finite(anchor_deltas) || !all_finite(box)) {
      continue;
    }
    if (lane_of_row == 0) {
      candidates.boxes_ltrb[place] = box;
    }
    for (int c = lane_of_row == 0 ? kLanesPerRow : lane_of_row; c < num_classes; c += kLanesPerRow) {
      const float score = expf(static_cast<float>(row[c]) - max) / sum;
      if (score > score_threshold) {
        const int64_t list = image * (num_classes - 1) + c - 1;
        const int slot = atomicAdd(&candidates.sizes[list], 1);
        candidates.lists[list * num_anchors + slot] = key_of(score, anchor, c, num_classes);
      }
    }
  }
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreadsPerTile) find_candidates(
    const scalar_t* __restrict__ deltas, const scalar_t* __restrict__ logits, const float* __restrict__ anchors_cxcywh,
    int64_t num_rows, int rows_per_warp, bool staged, int num_anchors, int num_classes, float score_threshold,
    float log_threshold, Candidates candidates) {
  extern __shared__ uint4 tile[];
  const int rows_per_tile = rows_per_warp * kWarpsPerTile;
  const int64_t first = int64_t{blockIdx.x} * rows_per_tile;
  const int size = static_cast<int>(min(int64_t{rows_per_tile}, num_rows - first));
  const scalar_t* rows = logits + first * num_classes;
  if (staged) {
    stage(rows, size * num_classes, tile);
    __syncthreads();
    find_in_tile(
        reinterpret_cast<const scalar_t*>(tile), deltas, anchors_cxcywh, first, size, rows_per_warp, num_anchors,
        num_classes, score_threshold, log_threshold, candidates);
  } else {
    find_in_tile(
        rows, deltas, anchors_cxcywh, first, size, rows_per_warp, num_anchors, num_classes, score_threshold,
        log_threshold, candidates);
  }
}

// Bitonic sort of any number of keys by one block, largest first. Each merge begins by comparing its first half with
// its second half in reverse, so that all comparisons go the same way. A missing key then counts as the smallest and
// never moves, so no padding is stored.
__device__ void sort_descending(Key* keys, int size) {
  for (int run = 2; run / 2 < size; run *= 2) {
    for (int distance = run / 2; distance > 0; distance /= 2) {
      for (int i = threadIdx.x;; i += blockDim.x) {
        const int low = 2 * i - (i & (distance - 1));
        if (low >= size) {
          break;
        }
        const int high = distance == run / 2 ? low ^ (run - 1) : low + distance;
        if (high < size && keys[low] < keys[high]) {
          const Key smaller = keys[low];
          keys[low] = keys[high];
          keys[high] = smaller;
        }
      }
      __syncthreads();
    }
  }
}

// Sorts the `limit` largest keys of a list, or all if there are fewer, and returns where they are: in `shared`, which
// has room for `capacity` keys, or at the front of the list itself if that is not enough. Called by a whole block.
__device__ Key* sort_best(Key* list, int size, int limit, Key* shared, int capacity) {
  const int num_best = min(size, limit);
  if (num_best > capacity) {
    sort_descending(list, size);
    return list;
  }
  const Key bound = size > limit ? kth_largest<Key>(size, limit, [list](int i) { return list[i]; }) : 0;
  __shared__ int num_gathered;
  if (threadIdx.x == 0) {
    num_gathered = 0;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    if (list[i] >= bound) {
      shared[atomicAdd(&num_gathered, 1)] = list[i];
    }
  }
  __syncthreads();
  sort_descending(shared, num_best);
  return shared;
}

// Suppression within one class of one image. survivors [B, survivors_per_image]; survivor_counts [B], zero at the
// launch. Dynamic shared memory: `capacity` boxes and keys.
__global__ void __launch_bounds__(kThreadsPerClass, 8) suppress(
    Candidates candidates, float iou_threshold, int max_per_class, int capacity, int num_anchors, int num_classes,
    int64_t survivors_per_image, Key* survivors, int* survivor_counts) {
  extern __shared__ float4 shared_boxes[];
  const int list = blockIdx.x, image = list / (num_classes - 1), num_found = candidates.sizes[list];
  if (num_found == 0) {
    return;
  }
  const int size = min(num_found, max_per_class);
  Key* keys = sort_best(
      candidates.lists + int64_t{list} * num_anchors, num_found, max_per_class,
      reinterpret_cast<Key*>(shared_boxes + capacity), capacity);
  const float4* image_boxes = candidates.boxes_ltrb + int64_t{image} * num_anchors;
  const bool resident = size <= capacity;
  if (resident) {
    for (int i = threadIdx.x; i < size; i += kThreadsPerClass) {
      shared_boxes[i] = image_boxes[anchor_of(keys[i], num_classes)];
    }
    __syncthreads();
  }
  const auto box_at = [=](int i) { return resident ? shared_boxes[i] : image_boxes[anchor_of(keys[i], num_classes)]; };
  for (int kept = 0; kept < size; ++kept) {
    if (keys[kept] == 0) {  // dropped: real keys are never 0
      continue;
    }
    const float4 box = box_at(kept);
    const float area = area_of(box);
    for (int i = kept + 1 + threadIdx.x; i < size; i += kThreadsPerClass) {
      if (keys[i] != 0) {
        const float4 other = box_at(i);
        if (iou_of(box, area, other, area_of(other)) >= iou_threshold) {
          keys[i] = 0;
        }
      }
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < size; i += kThreadsPerClass) {
    if (keys[i] != 0) {
      survivors[image * survivors_per_image + atomicAdd(&survivor_counts[image], 1)] = keys[i];
    }
  }
}

// Results of one image. Dynamic shared memory: `capacity` keys.
__global__ void __launch_bounds__(kThreadsPerImage) write_detections(
    Key* survivors, const int* __restrict__ survivor_counts, int64_t survivors_per_image,
    const float4* __restrict__ all_boxes, int max_detections, int capacity, int num_anchors, int num_classes,
    float4* boxes_ltrb, float* scores, int* labels, int* counts) {
  extern __shared__ Key shared_keys[];
  const int image = blockIdx.x, count = min(survivor_counts[image], max_detections);
  const Key* keys =
      sort_best(survivors + image * survivors_per_image, survivor_counts[image], max_detections, shared_keys, capacity);
  for (int i = threadIdx.x; i < max_detections; i += kThreadsPerImage) {
    const int64_t place = int64_t{image} * max_detections + i;
    const bool found = i < count;
    boxes_ltrb[place] = found ? all_boxes[int64_t{image} * num_anchors + anchor_of(keys[i], num_classes)] : float4{};
    scores[place] = found ? score_of(keys[i]) : 0.0f;
    labels[place] = found ? class_of(keys[i], num_classes) : 0;
  }
  if (threadIdx.x == 0) {
    counts[image] = count;
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> decode_nms(
    const at::Tensor& deltas_in, const at::Tensor& logits_in, const at::Tensor& anchors_in, double score_threshold_in,
    double iou_threshold, int64_t max_per_class, int64_t max_detections) {
  check_decode_nms(deltas_in, logits_in, anchors_in, score_threshold_in, iou_threshold, max_per_class, max_detections);
  const c10::cuda::CUDAGuard guard(deltas_in.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor deltas = deltas_in.contiguous(), logits = logits_in.contiguous();
  const at::Tensor anchors = anchors_in.to(at::kFloat).contiguous();
  const int64_t batch_size = logits.size(0), num_anchors = logits.size(1), num_classes = logits.size(2);
  const int64_t num_rows = batch_size * num_anchors, num_lists = batch_size * (num_classes - 1);
  TORCH_CHECK_VALUE(
      num_anchors * num_classes <= std::numeric_limits<int>::max(), "logits has shape ", logits.sizes(),
      ": expected less than 2^31 logits for each image");
  const auto options = logits.options().dtype(at::kFloat);
  at::Tensor boxes_ltrb = at::empty({batch_size, max_detections, 4}, options);
  at::Tensor scores = at::empty({batch_size, max_detections}, options);
  at::Tensor labels = at::empty({batch_size, max_detections}, options.dtype(at::kInt));
  at::Tensor counts = at::empty({batch_size}, options.dtype(at::kInt));
  if (batch_size == 0) {
    return {boxes_ltrb, scores, labels, counts};
  }

  const int64_t limit = std::min(max_per_class, num_anchors);
  const int64_t survivors_per_image = (num_classes - 1) * limit;
  const at::Tensor lists = at::empty({num_lists, num_anchors}, options.dtype(at::kLong));
  const at::Tensor all_boxes = at::empty({num_rows, 4}, options);
  const at::Tensor survivors = at::empty({batch_size, survivors_per_image}, options.dtype(at::kLong));
  const at::Tensor sizes = at::zeros({num_lists + batch_size}, options.dtype(at::kInt));  // lists, then survivors
  const Candidates candidates{
      reinterpret_cast<Key*>(lists.mutable_data_ptr<int64_t>()), sizes.mutable_data_ptr<int>(),
      reinterpret_cast<float4*>(all_boxes.mutable_data_ptr<float>())};
  Key* survivors_data = reinterpret_cast<Key*>(survivors.mutable_data_ptr<int64_t>());
  int* survivor_counts = candidates.sizes + num_lists;

  if (num_anchors > 0) {
    const float score_threshold = static_cast<float>(score_threshold_in);
    const float log_threshold = std::log(score_threshold) - 1e-3f;  // the margin covers the rounding of the scores
    AT_DISPATCH_V2(logits.scalar_type(), "decode_nms", AT_WRAP([&] {
      const Tiles tiles(num_rows, num_classes * sizeof(scalar_t));
      find_candidates<<<tiles.count, kThreadsPerTile, tiles.shared_bytes, stream>>>(
          deltas.const_data_ptr<scalar_t>(), logits.const_data_ptr<scalar_t>(), anchors.const_data_ptr<float>(),
          num_rows, tiles.rows_per_warp, tiles.staged, num_anchors, num_classes, score_threshold, log_threshold,
          candidates);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }), at::kHalf, at::kBFloat16, at::kFloat);
    const int64_t capacity = std::min<int64_t>(limit, kMostInSharedMemory);
    suppress<<<num_lists, kThreadsPerClass, capacity * (sizeof(float4) + sizeof(Key)), stream>>>(
        candidates, static_cast<float>(iou_threshold), limit, capacity, num_anchors, num_classes, survivors_per_image,
        survivors_data, survivor_counts);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  const int64_t capacity = std::min<int64_t>({max_detections, survivors_per_image, kMostInSharedMemory});
  write_detections<<<batch_size, kThreadsPerImage, capacity * sizeof(Key), stream>>>(
      survivors_data, survivor_counts, survivors_per_image, candidates.boxes_ltrb, max_detections, capacity,
      num_anchors, num_classes, reinterpret_cast<float4*>(boxes_ltrb.mutable_data_ptr<float>()),
      scores.mutable_data_ptr<float>(), labels.mutable_data_ptr<int>(), counts.mutable_data_ptr<int>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {boxes_ltrb, scores, labels, counts};
}

TORCH_LIBRARY_IMPL(ssd_fast, CUDA, m) {
  m.impl("decode_nms", decode_nms);
}

}  // namespace
}  // namespace ssd_fast

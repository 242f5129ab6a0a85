// Detections on the GPU: softmax, score threshold, box decoding, greedy non-maximum suppression per class, best of all.
//
// 1. find_candidates, eight lanes for each anchor. The sum of the softmax is at least exp(x_0), where 0 is the
//    background, so a class can have a probability above t only if x_c > x_0 + log t. In a trained network this
//    comparison, without an exponential, rules out nearly every anchor. Softmax and box are computed for the rest, and
//    every class above t appends a key to the list of its image and class.
// 2. suppress, one block for each image and class; it ends at once if the list is empty. It sorts the best
//    max_per_class keys, with their boxes in shared memory, and takes them from best to worst in chunks of 32: the pairs
//    within a chunk are tested all at once, which gives a mask for each of its boxes; all threads then find from the
//    masks which boxes stay, and drop the later ones that overlap one of these. So there are two barriers a chunk, and
//    at most max_per_class^2 / 2 pairs. The survivors are appended to the image's list.
// 3. write_detections, one block for each image: sorts the best max_detections of its list and writes them.
// A key is the score's bits (scores are not negative, so their bits are in order) above ~(anchor * C + class). Keys are
// unique and in the order of the result. Atomic counters fill the lists in any order; selection by rank and sorting
// make the result deterministic.
//
// Memory: the logits are read once, the least possible (181 MB for 128 x 8732 x 81 of 16 bits); nothing of their size
// is written. The workspace holds, for each image, (C - 1) A keys of 8 bytes, room for every anchor in every class
// (5.6 MB for 8732 x 81), (C - 1) max_per_class keys for the survivors, and 16 bytes for each anchor; the part that is
// not used is never touched. It serves one part of the batch after the other, so that it stays below 250 MB unless an
// image needs more. The host does not wait and no size depends on values, so a CUDA graph can capture the call.
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
constexpr int64_t kMostListBytes = 250'000'000;  // of the workspace

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

// lists [B, C - 1, A]: keys. sizes [B, C]: of an image's lists, then of its survivors; zero at the launch.
// boxes_ltrb [B, A]: of listed anchors.
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
        const int slot = atomicAdd(&candidates.sizes[image * num_classes + c - 1], 1);
        candidates.lists[(image * (num_classes - 1) + c - 1) * num_anchors + slot] =
            key_of(score, anchor, c, num_classes);
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

// Suppression within one class of one image. survivors [B, (C - 1) max_per_class]. Dynamic shared memory: `capacity`
// boxes and keys.
__global__ void __launch_bounds__(kThreadsPerClass, 8) suppress(
    Candidates candidates, float iou_threshold, int max_per_class, int capacity, int num_anchors, int num_classes,
    Key* survivors) {
  extern __shared__ float4 shared_boxes[];
  const int list = blockIdx.x, image = list / (num_classes - 1), c = list % (num_classes - 1);
  int* sizes = candidates.sizes + int64_t{image} * num_classes;
  const int num_found = sizes[c];
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
  const auto overlap = [=](float4 better, float4 box) {
    return iou_of(better, area_of(better), box, area_of(box)) >= iou_threshold;
  };
  __shared__ unsigned overlapped[kWarpSize];  // by each box of a chunk: a mask of the chunk's later boxes
  const int lane = threadIdx.x % kWarpSize;
  for (int first = 0; first < size; first += kWarpSize) {
    const int own = first + lane;
    const bool present = own < size && keys[own] != 0;  // a dropped key is 0, which no other one is
    const unsigned all_present = __ballot_sync(kAllLanes, present);
    const float4 box = present ? box_at(own) : float4{};
    for (int i = threadIdx.x / kWarpSize; i < kWarpSize; i += kThreadsPerClass / kWarpSize) {
      const bool later = present && lane > i && all_present >> i & 1;
      const unsigned mask = __ballot_sync(kAllLanes, later && overlap(box_at(first + i), box));
      if (lane == 0) {
        overlapped[i] = mask;
      }
    }
    __syncthreads();
    unsigned kept = all_present;
    for (int i = 0; i < kWarpSize; ++i) {
      kept &= kept >> i & 1 ? ~overlapped[i] : ~0u;
    }
    if (threadIdx.x < kWarpSize && present && !(kept >> lane & 1)) {
      keys[own] = 0;
    }
    for (int i = first + kWarpSize + threadIdx.x; i < size; i += kThreadsPerClass) {
      if (keys[i] == 0) {
        continue;
      }
      const float4 later_box = box_at(i);
      for (unsigned left = kept; left != 0; left &= left - 1) {
        if (overlap(box_at(first + __ffs(left) - 1), later_box)) {
          keys[i] = 0;
          break;
        }
      }
    }
    __syncthreads();  // the next chunk reads the keys and overwrites the masks
  }
  for (int i = threadIdx.x; i < size; i += kThreadsPerClass) {
    if (keys[i] != 0) {
      const int slot = atomicAdd(&sizes[num_classes - 1], 1);
      survivors[int64_t{image} * (num_classes - 1) * max_per_class + slot] = keys[i];
    }
  }
}

// Results of one image. Dynamic shared memory: `capacity` keys.
__global__ void __launch_bounds__(kThreadsPerImage) write_detections(
    Candidates candidates, Key* survivors, int64_t survivors_per_image, int max_detections, int capacity,
    int num_anchors, int num_classes, float4* boxes_ltrb, float* scores, int* labels, int* counts) {
  extern __shared__ Key shared_keys[];
  const int image = blockIdx.x, num_found = candidates.sizes[int64_t{image} * num_classes + num_classes - 1];
  const int count = min(num_found, max_detections);
  const Key* keys =
      sort_best(survivors + image * survivors_per_image, num_found, max_detections, shared_keys, capacity);
  const float4* image_boxes = candidates.boxes_ltrb + int64_t{image} * num_anchors;
  for (int i = threadIdx.x; i < max_detections; i += kThreadsPerImage) {
    const int64_t place = int64_t{image} * max_detections + i;
    const bool found = i < count;
    boxes_ltrb[place] = found ? image_boxes[anchor_of(keys[i], num_classes)] : float4{};
    scores[place] = found ? score_of(keys[i]) : 0.0f;
    labels[place] = found ? class_of(keys[i], num_classes) : 0;
  }
  if (threadIdx.x == 0) {
    counts[image] = count;
  }
}

// lists [P, C - 1, A] and survivors [P, (C - 1) limit]: keys. boxes_ltrb [P, A, 4]. counters [B, C]: the sizes of the
// lists of an image, then that of its survivors; zero at first. P: images of a part.
struct Workspace {
  at::Tensor lists, survivors, boxes_ltrb, counters;
};

// [P, D, 4], [P, D], [P, D] and [P]
struct Detections {
  at::Tensor boxes_ltrb, scores, labels, counts;
};

// Fills the detections of a part of the batch. limit: of the keys that enter suppression, in a class. counters: its own.
void detect(
    const at::Tensor& deltas, const at::Tensor& logits, const at::Tensor& anchors, float score_threshold,
    float iou_threshold, int64_t limit, const Workspace& workspace, const at::Tensor& counters,
    const Detections& detections, cudaStream_t stream) {
  const int64_t num_images = logits.size(0), num_anchors = logits.size(1), num_classes = logits.size(2);
  const int64_t num_rows = num_images * num_anchors, survivors_per_image = (num_classes - 1) * limit;
  const int64_t max_detections = detections.scores.size(1);
  const Candidates candidates{
      reinterpret_cast<Key*>(workspace.lists.mutable_data_ptr<int64_t>()), counters.mutable_data_ptr<int>(),
      reinterpret_cast<float4*>(workspace.boxes_ltrb.mutable_data_ptr<float>())};
  Key* survivors = reinterpret_cast<Key*>(workspace.survivors.mutable_data_ptr<int64_t>());
  if (num_anchors > 0) {
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
    suppress<<<num_images*(num_classes - 1), kThreadsPerClass, capacity * (sizeof(float4) + sizeof(Key)), stream>>>(
        candidates, iou_threshold, limit, capacity, num_anchors, num_classes, survivors);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  const int64_t capacity = std::min<int64_t>({max_detections, survivors_per_image, kMostInSharedMemory});
  write_detections<<<num_images, kThreadsPerImage, capacity * sizeof(Key), stream>>>(
      candidates, survivors, survivors_per_image, max_detections, capacity, num_anchors, num_classes,
      reinterpret_cast<float4*>(detections.boxes_ltrb.mutable_data_ptr<float>()),
      detections.scores.mutable_data_ptr<float>(), detections.labels.mutable_data_ptr<int>(),
      detections.counts.mutable_data_ptr<int>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
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

  const int64_t limit = std::min(max_per_class, num_anchors), num_lists = num_classes - 1;  // of an image
  const int64_t list_bytes = num_lists * num_anchors * sizeof(Key);
  const int64_t part = std::clamp<int64_t>(kMostListBytes / std::max<int64_t>(list_bytes, 1), 1, batch_size);
  const Workspace workspace{
      at::empty({part, num_lists, num_anchors}, options.dtype(at::kLong)),
      at::empty({part, num_lists * limit}, options.dtype(at::kLong)), at::empty({part, num_anchors, 4}, options),
      at::zeros({batch_size, num_lists + 1}, options.dtype(at::kInt))};
  for (int64_t first = 0; first < batch_size; first += part) {
    const int64_t size = std::min(part, batch_size - first);
    const auto of_part = [=](const at::Tensor& tensor) { return tensor.narrow(0, first, size); };
    const Detections detections{of_part(boxes_ltrb), of_part(scores), of_part(labels), of_part(counts)};
    detect(
        of_part(deltas), of_part(logits), anchors, static_cast<float>(score_threshold_in),
        static_cast<float>(iou_threshold), limit, workspace, of_part(workspace.counters), detections, stream);
  }
  return {boxes_ltrb, scores, labels, counts};
}

TORCH_LIBRARY_IMPL(ssd_fast, CUDA, m) {
  m.impl("decode_nms", decode_nms);
}

}  // namespace
}  // namespace ssd_fast

// Targets of every anchor on the CPU (Liu et al. 2016, section 2.2): matching by IoU, then the regression targets
//   ((cx, cy) - (anchor cx, cy)) / anchor size / 0.1  and  log(size / anchor size) / 0.2.
//
// Threads share the images. For each image, a loop over ground truths compares each with the anchors in vectors of 16.
// Each IoU is used at once: an anchor keeps its best ground truth, and the ground truth its best anchor. The matrix of
// IoUs never exists. Anchors are in the order of their tie ranks, in which 16 neighbours usually lie close together. If
// a ground truth misses the rectangle around all 16, their IoUs are 0 and are not computed.
// Memory: 20 bytes are read (from cache) for each pair of a ground truth and a nearby anchor; 20 bytes are written for
// each anchor of each image.
//
// Ties: among equal IoUs an anchor keeps the first ground truth, and a ground truth the anchor of lowest rank. If
// several ground truths share a best anchor, the last one takes it. The result is deterministic and does not depend on
// the number of threads. IoUs are computed as in the plain version, operation by operation, so ties fall alike.
#include "checks.h"
#include "constants.h"
#include "cpu/simd.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

namespace ssd_fast {

// Anchors in the order of their tie ranks, in columns of whole vectors, padded with empty boxes.
struct Anchors {
  std::vector<int32_t> rows;  // by tie rank, the row of the anchor in the argument
  std::vector<float> left, top, right, bottom, area;
  std::vector<std::array<float, 4>> bounds;  // ltrb around the anchors of each vector

  Anchors(const at::Tensor& anchors_cxcywh, const std::optional<at::Tensor>& tie_ranks);

  int64_t num_vectors() const {
    return static_cast<int64_t>(bounds.size());
  }
};

Anchors::Anchors(const at::Tensor& anchors_cxcywh, const std::optional<at::Tensor>& tie_ranks)
    : rows(anchors_cxcywh.size(0), -1), bounds((rows.size() + kLanes - 1) / kLanes) {
  const int64_t count = rows.size();
  const float* cxcywh = anchors_cxcywh.const_data_ptr<float>();
  for (int64_t row = 0; row < count; ++row) {
    const int64_t rank = tie_ranks.has_value() ? tie_ranks->const_data_ptr<int64_t>()[row] : row;
    TORCH_CHECK_VALUE(
        rank >= 0 && rank < count && rows[rank] < 0, "tie_ranks[", row, "] = ", rank,
        ": expected a permutation of 0 to ", count - 1);
    rows[rank] = static_cast<int32_t>(row);
  }
  for (auto* column : {&left, &top, &right, &bottom, &area}) {
    column->assign(num_vectors() * kLanes, 0.0f);
  }
  std::fill(bounds.begin(), bounds.end(), std::array<float, 4>{kInfinity, kInfinity, -kInfinity, -kInfinity});
  for (int64_t i = 0; i < count; ++i) {
    const float* anchor = cxcywh + 4 * rows[i];
    left[i] = anchor[0] - 0.5f * anchor[2];
    top[i] = anchor[1] - 0.5f * anchor[3];
    right[i] = anchor[0] + 0.5f * anchor[2];
    bottom[i] = anchor[1] + 0.5f * anchor[3];
    area[i] = (right[i] - left[i]) * (bottom[i] - top[i]);
    auto& bound = bounds[i / kLanes];
    bound = {
        std::min(bound[0], left[i]), std::min(bound[1], top[i]), std::max(bound[2], right[i]),
        std::max(bound[3], bottom[i])};
  }
}

// Matches one ground truth (ltrb) with all anchors and returns the place of the anchor that overlaps it best.
// number: of the ground truth in its image. best_ious, owners: of every anchor so far; updated here.
SSD_FAST_CLONES int64_t match(
    const Anchors& anchors, const float* box, int32_t number, float* best_ious, int32_t* owners) {
  const Floats zero = {};
  const Ints none = {};
  const float left = box[0], top = box[1], right = box[2], bottom = box[3];
  const float area = (right - left) * (bottom - top);
  Floats lane_ious = zero;  // the best IoU of each lane; lane_vectors: the vector in which it was found
  Ints lane_vectors = none;
  const int32_t num_vectors = static_cast<int32_t>(anchors.num_vectors());
  for (int32_t v = 0; v < num_vectors; ++v) {
    const auto& bound = anchors.bounds[v];
    if (bound[0] >= right || bound[2] <= left || bound[1] >= bottom || bound[3] <= top) {
      continue;
    }
    const int64_t i = v * kLanes;
    const Floats width = smaller(load(&anchors.right[i]), zero + right) - larger(load(&anchors.left[i]), zero + left);
    const Floats height = smaller(load(&anchors.bottom[i]), zero + bottom) - larger(load(&anchors.top[i]), zero + top);
    const Floats intersection = larger(width, zero) * larger(height, zero);
    const Floats union_ = area + load(&anchors.area[i]) - intersection;  // positive, like the ground truth's area
    const Floats iou = intersection / union_;

    Ints owner;
    std::memcpy(&owner, owners + i, sizeof owner);
    const Floats best = load(best_ious + i);
    owner = iou > best ? none + number : owner;
    std::memcpy(owners + i, &owner, sizeof owner);
    store(best_ious + i, larger(iou, best));

    lane_vectors = iou > lane_ious ? none + v : lane_vectors;
    lane_ious = larger(iou, lane_ious);
  }
  const float best_iou = largest(lane_ious);
  if (best_iou == 0.0f) {
    return 0;
  }
  int64_t place = num_vectors * kLanes;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (lane_ious[lane] == best_iou) {
      place = std::min(place, lane_vectors[lane] * kLanes + lane);
    }
  }
  return place;
}

namespace {

void check_ground_truths(
    const float* boxes, const int64_t* labels, int64_t num_boxes, const int64_t* offsets, int64_t batch_size) {
  bool partition = offsets[0] == 0 && offsets[batch_size] == num_boxes;
  for (int64_t image = 0; image < batch_size; ++image) {
    partition = partition && offsets[image] <= offsets[image + 1];
  }
  TORCH_CHECK_VALUE(
      partition, "offsets = ", at::IntArrayRef(offsets, batch_size + 1), ": expected an ascending list from 0 to ",
      num_boxes, " (boxes)");
  for (int64_t row = 0; row < num_boxes; ++row) {
    const float* box = boxes + 4 * row;
    const bool finite = std::all_of(box, box + 4, [](float value) { return std::isfinite(value); });
    TORCH_CHECK_VALUE(
        finite && box[0] < box[2] && box[1] < box[3], "boxes_ltrb[", row, "] = [", box[0], ", ", box[1], ", ", box[2],
        ", ", box[3], "]: expected finite left < right, top < bottom");
    TORCH_CHECK_VALUE(
        labels[row] >= 1 && labels[row] <= std::numeric_limits<int32_t>::max(), "labels[", row, "] = ", labels[row],
        ": expected 1 to ", std::numeric_limits<int32_t>::max());
  }
}

void encode(const float* box, const float* anchor, float* deltas) {
  for (int axis = 0; axis < 2; ++axis) {
    const float low = box[axis], high = box[2 + axis], size = anchor[2 + axis];
    deltas[axis] = kInverseCentreVariance * (0.5f * (low + high) - anchor[axis]) / size;
    deltas[2 + axis] = kInverseSizeVariance * std::log((high - low) / size);
  }
}

std::tuple<at::Tensor, at::Tensor> encode_boxes(
    const at::Tensor& boxes_in, const at::Tensor& labels_in, const at::Tensor& offsets_in, const at::Tensor& anchors_in,
    double iou_threshold, const std::optional<at::Tensor>& tie_ranks_in) {
  check_encode_boxes(boxes_in, labels_in, offsets_in, anchors_in, iou_threshold, tie_ranks_in);
  const at::Tensor boxes = boxes_in.contiguous(), labels = labels_in.to(at::kLong).contiguous();
  const at::Tensor offsets = offsets_in.to(at::kLong).contiguous();
  const at::Tensor anchors_cxcywh = anchors_in.to(at::kFloat).contiguous();
  std::optional<at::Tensor> tie_ranks;
  if (tie_ranks_in.has_value()) {
    tie_ranks = tie_ranks_in->to(at::kLong).contiguous();
  }
  const int64_t batch_size = offsets.size(0) - 1, num_anchors = anchors_cxcywh.size(0);
  const float* boxes_data = boxes.const_data_ptr<float>();
  const int64_t* labels_data = labels.const_data_ptr<int64_t>();
  const int64_t* offsets_data = offsets.const_data_ptr<int64_t>();
  const float* anchors_data = anchors_cxcywh.const_data_ptr<float>();
  check_ground_truths(boxes_data, labels_data, boxes.size(0), offsets_data, batch_size);

  at::Tensor deltas = at::empty({batch_size, num_anchors, 4}, boxes.options());
  at::Tensor target_labels = at::empty({batch_size, num_anchors}, boxes.options().dtype(at::kInt));
  float* deltas_data = deltas.mutable_data_ptr<float>();
  int32_t* target_data = target_labels.mutable_data_ptr<int32_t>();
  const Anchors anchors(anchors_cxcywh, tie_ranks);
  at::parallel_for(0, batch_size, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> best_ious(anchors.num_vectors() * kLanes);
    std::vector<int32_t> owners(best_ious.size());
    std::vector<int64_t> best_places;
    for (int64_t image = begin; image < end; ++image) {
      const int64_t first = offsets_data[image], num_boxes = offsets_data[image + 1] - first;
      float* image_deltas = deltas_data + image * num_anchors * 4;
      int32_t* image_labels = target_data + image * num_anchors;
      std::fill_n(image_deltas, num_anchors * 4, 0.0f);
      std::fill_n(image_labels, num_anchors, 0);
      std::fill(best_ious.begin(), best_ious.end(), static_cast<float>(iou_threshold));
      std::fill(owners.begin(), owners.end(), -1);
      best_places.resize(num_boxes);
      for (int64_t g = 0; g < num_boxes; ++g) {
        best_places[g] =
            match(anchors, boxes_data + 4 * (first + g), static_cast<int32_t>(g), best_ious.data(), owners.data());
      }
      for (int64_t g = 0; g < num_boxes; ++g) {
        owners[best_places[g]] = static_cast<int32_t>(g);
      }
      for (int64_t place = 0; num_boxes > 0 && place < num_anchors; ++place) {
        if (owners[place] >= 0) {
          const int64_t owner = first + owners[place], anchor = anchors.rows[place];
          encode(boxes_data + 4 * owner, anchors_data + 4 * anchor, image_deltas + 4 * anchor);
          image_labels[anchor] = static_cast<int32_t>(labels_data[owner]);
        }
      }
    }
  });
  return {deltas, target_labels};
}

TORCH_LIBRARY_IMPL(ssd_fast, CPU, m) {
  m.impl("encode_boxes", encode_boxes);
}

}  // namespace
}  // namespace ssd_fast

// Detections on the CPU: softmax, score threshold, box decoding, greedy non-maximum suppression per class, best of all.
//
// 1. Threads share the anchors. A class is a candidate if its probability exp(x_c) / sum_k exp(x_k) is above t. The sum
//    is at least exp(x_0), where 0 is the background, so a candidate must have x_c > x_0 + log t. In a trained network
//    this comparison, without an exponential, rules out nearly every anchor. Softmax and box are computed for the rest.
// 2. Threads share the images: a counting sort of the candidates by class, the best max_per_class of each class by
//    nth_element, suppression within the class, then the best max_detections of all classes. Suppression compares a
//    kept box with all that follow it, 16 at a time: at most max_per_class^2 / 2 pairs for each class.
// Memory: the logits are read once and nothing of their size is written; each candidate takes 12 bytes.
//
// Order of candidates: score, then lower anchor, then lower class. An anchor with a logit, a delta or a box coordinate
// that is not finite gives no candidate. The result is deterministic and does not depend on the number of threads. IoUs
// and boxes are computed as in the plain version, operation by operation.
#include "checks.h"
#include "constants.h"
#include "cpu/simd.h"

#include <ATen/Dispatch_v2.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>
#include <vector>

namespace ssd_fast {

constexpr int64_t kAnchorsPerTask = 1024;

using Box = std::array<float, 4>;  // ltrb

struct Candidate {
  float score;
  int32_t anchor;
  int32_t class_;

  bool operator<(const Candidate& other) const {  // better first
    return std::make_tuple(-score, anchor, class_) < std::make_tuple(-other.score, other.anchor, other.class_);
  }
};

// Boxes of a class in columns, best first. dropped: 1 for a box that suppression dropped, else 0.
struct Columns {
  std::vector<float> left, top, right, bottom, area, dropped;

  void resize(int64_t size) {  // to whole vectors, padded with empty boxes
    const int64_t padded = (size + kLanes - 1) / kLanes * kLanes;
    for (auto* column : {&left, &top, &right, &bottom, &area, &dropped}) {
      column->assign(padded, 0.0f);
    }
  }
};

// Finds the rows in which some logit is above the first one + log_threshold. Returns the number written to `rows`.
SSD_FAST_CLONES int64_t find_promising_rows(
    const float* logits, int64_t num_rows, int64_t num_classes, float log_threshold, int32_t* rows) {
  int64_t found = 0;
  for (int64_t row = 0; row < num_rows; ++row) {
    const float* x = logits + row * num_classes;
    float best = x[1];
    int64_t c = 1;
    if (num_classes > kLanes) {
      Floats maxima = load(x + 1);
      for (c += kLanes; c + kLanes <= num_classes; c += kLanes) {
        maxima = larger(load(x + c), maxima);
      }
      if (c < num_classes) {
        maxima = larger(load(x + num_classes - kLanes), maxima);
      }
      best = largest(maxima);
    } else {
      for (; c < num_classes; ++c) {
        best = std::max(best, x[c]);
      }
    }
    rows[found] = static_cast<int32_t>(row);
    found += !(best <= x[0] + log_threshold);  // NaN passes; the exact rule decides later
  }
  return found;
}

// Writes the probabilities of all classes of an anchor to `scores`, which has room for whole vectors. Returns false if
// a logit is not finite.
SSD_FAST_CLONES bool softmax(const float* logits, int64_t num_classes, float* scores) {
  const Floats zero = {};
  const int64_t padded = (num_classes + kLanes - 1) / kLanes * kLanes;
  std::copy(logits, logits + num_classes, scores);
  std::fill(scores + num_classes, scores + padded, logits[0]);
  Floats maxima = load(scores), differences = zero;
  for (int64_t c = 0; c < padded; c += kLanes) {
    const Floats x = load(scores + c);
    maxima = larger(x, maxima);
    differences += x - x;  // NaN unless finite
  }
  if (sum(differences) != 0.0f) {
    return false;
  }
  std::fill(scores + num_classes, scores + padded, -kInfinity);
  const float max = largest(maxima);
  Floats sums = zero;
  for (int64_t c = 0; c < padded; c += kLanes) {
    const Floats exponentials = exp_nonpositive(load(scores + c) - max);
    sums += exponentials;
    store(scores + c, exponentials);
  }
  const float divisor = sum(sums);
  for (int64_t c = 0; c < padded; c += kLanes) {
    store(scores + c, load(scores + c) / divisor);
  }
  return true;
}

// Drops the boxes after `kept` that overlap it by iou_threshold or more.
SSD_FAST_CLONES void drop_overlapping(Columns& boxes, int64_t kept, int64_t size, float iou_threshold) {
  const Floats zero = {};
  const float left = boxes.left[kept], top = boxes.top[kept], right = boxes.right[kept], bottom = boxes.bottom[kept];
  const float area = boxes.area[kept];
  for (int64_t i = (kept + 1) / kLanes * kLanes; i < size; i += kLanes) {
    const Floats width = smaller(load(&boxes.right[i]), zero + right) - larger(load(&boxes.left[i]), zero + left);
    const Floats height = smaller(load(&boxes.bottom[i]), zero + bottom) - larger(load(&boxes.top[i]), zero + top);
    const Floats intersection = larger(width, zero) * larger(height, zero);
    const Floats union_ = area + load(&boxes.area[i]) - intersection;
    const Floats iou = union_ > zero ? intersection / union_ : zero;
    store(&boxes.dropped[i], iou >= iou_threshold ? zero + 1.0f : load(&boxes.dropped[i]));
  }
}

namespace {

// Corners of the box that the deltas describe relative to an anchor (cxcywh).
template <typename scalar_t>
Box decode(const scalar_t* deltas, const float* anchor) {
  std::array<float, 2> centre, size;
  for (int axis = 0; axis < 2; ++axis) {
    const float offset = static_cast<float>(deltas[axis]), log_ratio = static_cast<float>(deltas[2 + axis]);
    centre[axis] = offset * kCentreVariance * anchor[2 + axis] + anchor[axis];
    size[axis] = std::exp(log_ratio * kSizeVariance) * anchor[2 + axis];
  }
  return {
      centre[0] - 0.5f * size[0], centre[1] - 0.5f * size[1], centre[0] + 0.5f * size[0], centre[1] + 0.5f * size[1]};
}

// Appends the candidates of num_anchors anchors of an image, from anchor `first` on, in order of anchor, then class.
// The pointers are to the image's first anchor.
template <typename scalar_t>
void find_candidates(
    const scalar_t* deltas, const scalar_t* logits, const float* anchors, int64_t first, int64_t num_anchors,
    int64_t num_classes, float score_threshold, std::vector<Candidate>& candidates) {
  // The margin of 1e-3 keeps rounding in the sum and in log from losing a candidate. The exact rule follows.
  const float log_threshold = std::log(score_threshold) - 1e-3f;
  std::vector<int32_t> promising(num_anchors);
  std::vector<float> scores(num_classes + kLanes), wide(std::is_same_v<scalar_t, float> ? 0 : num_classes);
  int64_t num_promising = 0;
  if constexpr (std::is_same_v<scalar_t, float>) {
    num_promising =
        find_promising_rows(logits + first * num_classes, num_anchors, num_classes, log_threshold, promising.data());
  } else {
    for (int32_t row = 0; row < num_anchors; ++row) {
      std::copy_n(logits + (first + row) * num_classes, num_classes, wide.begin());
      int32_t ignored;
      promising[num_promising] = row;
      num_promising += find_promising_rows(wide.data(), 1, num_classes, log_threshold, &ignored);
    }
  }
  for (int64_t i = 0; i < num_promising; ++i) {
    const int64_t anchor = first + promising[i];
    const float* row;
    if constexpr (std::is_same_v<scalar_t, float>) {
      row = logits + anchor * num_classes;
    } else {
      std::copy_n(logits + anchor * num_classes, num_classes, wide.begin());
      row = wide.data();
    }
    if (!softmax(row, num_classes, scores.data())) {
      continue;
    }
    const Box box = decode(deltas + 4 * anchor, anchors + 4 * anchor);
    const bool finite = std::all_of(box.begin(), box.end(), [](float value) { return std::isfinite(value); }) &&
        std::all_of(deltas + 4 * anchor, deltas + 4 * anchor + 4, [](float value) { return std::isfinite(value); });
    for (int64_t c = 1; finite && c < num_classes; ++c) {
      if (scores[c] > score_threshold) {
        candidates.push_back({scores[c], static_cast<int32_t>(anchor), static_cast<int32_t>(c)});
      }
    }
  }
}

// Appends the candidates of one class that survive suppression to `kept`. Reorders the candidates. box_of returns an
// anchor's box.
template <typename BoxOf>
void suppress(
    Candidate* begin, Candidate* end, const BoxOf& box_of, float iou_threshold, int64_t max_per_class, Columns& columns,
    std::vector<Candidate>& kept) {
  if (end - begin > max_per_class) {
    std::nth_element(begin, begin + max_per_class, end);
    end = begin + max_per_class;
  }
  std::sort(begin, end);
  const int64_t size = end - begin;
  columns.resize(size);
  for (int64_t i = 0; i < size; ++i) {
    const Box box = box_of(begin[i].anchor);
    columns.left[i] = box[0];
    columns.top[i] = box[1];
    columns.right[i] = box[2];
    columns.bottom[i] = box[3];
    columns.area[i] = (box[2] - box[0]) * (box[3] - box[1]);
  }
  for (int64_t i = 0; i < size; ++i) {
    if (columns.dropped[i] == 0.0f) {
      kept.push_back(begin[i]);
      drop_overlapping(columns, i, size, iou_threshold);
    }
  }
}

// The image's detections, best first, from all its candidates.
template <typename BoxOf>
std::vector<Candidate> choose(
    const std::vector<Candidate>& candidates, int64_t num_classes, const BoxOf& box_of, float iou_threshold,
    int64_t max_per_class, int64_t max_detections) {
  std::vector<int64_t> ends(num_classes, 0);
  for (const Candidate& candidate : candidates) {
    ++ends[candidate.class_];
  }
  int64_t total = 0;
  for (int64_t& end : ends) {  // becomes the class's begin; filling by_class moves it to its end
    total += std::exchange(end, total);
  }
  std::vector<Candidate> by_class(candidates.size()), kept;
  for (const Candidate& candidate : candidates) {
    by_class[ends[candidate.class_]++] = candidate;
  }
  Columns columns;
  for (int64_t c = 1; c < num_classes; ++c) {
    if (ends[c - 1] < ends[c]) {
      suppress(
          by_class.data() + ends[c - 1], by_class.data() + ends[c], box_of, iou_threshold, max_per_class, columns,
          kept);
    }
  }
  const auto end = kept.begin() + std::min<int64_t>(kept.size(), max_detections);
  std::partial_sort(kept.begin(), end, kept.end());
  kept.erase(end, kept.end());
  return kept;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> decode_nms(
    const at::Tensor& deltas_in, const at::Tensor& logits_in, const at::Tensor& anchors_in, double score_threshold,
    double iou_threshold, int64_t max_per_class, int64_t max_detections) {
  check_decode_nms(deltas_in, logits_in, anchors_in, score_threshold, iou_threshold, max_per_class, max_detections);
  const at::Tensor deltas = deltas_in.contiguous(), logits = logits_in.contiguous();
  const at::Tensor anchors = anchors_in.to(at::kFloat).contiguous();
  const int64_t batch_size = logits.size(0), num_anchors = logits.size(1), num_classes = logits.size(2);
  const auto options = logits.options().dtype(at::kFloat);
  at::Tensor boxes = at::zeros({batch_size, max_detections, 4}, options);
  at::Tensor scores = at::zeros({batch_size, max_detections}, options);
  at::Tensor labels = at::zeros({batch_size, max_detections}, options.dtype(at::kInt));
  at::Tensor counts = at::zeros({batch_size}, options.dtype(at::kInt));

  const int64_t tasks_per_image = (num_anchors + kAnchorsPerTask - 1) / kAnchorsPerTask;
  std::vector<std::vector<Candidate>> found(batch_size * tasks_per_image);
  AT_DISPATCH_V2(logits.scalar_type(), "decode_nms", AT_WRAP([&] {
    const scalar_t* logits_data = logits.const_data_ptr<scalar_t>();
    const scalar_t* deltas_data = deltas.const_data_ptr<scalar_t>();
    const float* anchors_data = anchors.const_data_ptr<float>();
    float* boxes_data = boxes.mutable_data_ptr<float>();
    float* scores_data = scores.mutable_data_ptr<float>();
    int32_t* labels_data = labels.mutable_data_ptr<int32_t>();
    int32_t* counts_data = counts.mutable_data_ptr<int32_t>();
    at::parallel_for(0, batch_size * tasks_per_image, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = task / tasks_per_image, first = task % tasks_per_image * kAnchorsPerTask;
        find_candidates(
            deltas_data + image * num_anchors * 4, logits_data + image * num_anchors * num_classes, anchors_data,
            first, std::min(kAnchorsPerTask, num_anchors - first), num_classes, score_threshold, found[task]);
      }
    });
    at::parallel_for(0, batch_size, 1, [&](int64_t begin, int64_t end) {
      for (int64_t image = begin; image < end; ++image) {
        std::vector<Candidate> candidates;
        for (int64_t task = image * tasks_per_image; task < (image + 1) * tasks_per_image; ++task) {
          candidates.insert(candidates.end(), found[task].begin(), found[task].end());
          found[task] = {};
        }
        const auto box_of = [&](int64_t anchor) {
          return decode(deltas_data + 4 * (image * num_anchors + anchor), anchors_data + 4 * anchor);
        };
        const auto kept = choose(candidates, num_classes, box_of, iou_threshold, max_per_class, max_detections);
        int64_t row = image * max_detections;
        for (const Candidate& detection : kept) {
          const Box box = box_of(detection.anchor);
          std::copy(box.begin(), box.end(), boxes_data + 4 * row);
          scores_data[row] = detection.score;
          labels_data[row++] = detection.class_;
        }
        counts_data[image] = kept.size();
      }
    });
  }), at::kHalf, at::kBFloat16, at::kFloat);
  return {boxes, scores, labels, counts};
}

TORCH_LIBRARY_IMPL(ssd_fast, CPU, m) {
  m.impl("decode_nms", decode_nms);
}

}  // namespace
}  // namespace ssd_fast

// Checks of the operators' arguments, the same for every device. A failed check is a ValueError in Python. The checks
// read shapes, types and devices but never values, so the host never waits for a device.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/clamp.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <initializer_list>
#include <limits>
#include <optional>
#include <string>

namespace ssd_fast {

constexpr int64_t kAny = -1;  // a size that may be anything
constexpr int64_t kMostDetections = std::numeric_limits<int32_t>::max();  // of an image; they are counted in int32

inline void check_shape(const at::Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
  bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
  std::string expected;
  int64_t axis = 0;
  for (const int64_t size : shape) {
    fits = fits && (size == kAny || tensor.size(axis) == size);
    expected += (axis++ ? ", " : "") + (size == kAny ? std::string("any") : std::to_string(size));
  }
  TORCH_CHECK_VALUE(fits, name, " has shape ", tensor.sizes(), ": expected [", expected, "]");
}

inline void check_dtype(
    const at::Tensor& tensor, const char* name, std::initializer_list<at::ScalarType> allowed, const char* expected) {
  bool fits = false;
  for (const at::ScalarType dtype : allowed) {
    fits = fits || tensor.scalar_type() == dtype;
  }
  TORCH_CHECK_VALUE(fits, name, " is torch.", c10::getDtypeNames(tensor.scalar_type()).first, ": expected ", expected);
}

inline void check_integer(const at::Tensor& tensor, const char* name) {
  check_dtype(tensor, name, {at::kInt, at::kLong}, "int32 or int64");
}

// Labels or ranks as int32. What does not fit becomes the nearest number that does, instead of wrapping into the range
// that is expected of it.
inline at::Tensor as_int32(const at::Tensor& values) {
  using limits = std::numeric_limits<int32_t>;
  const bool fits = values.scalar_type() == at::kInt;
  return (fits ? values : values.clamp(int64_t{limits::min()}, int64_t{limits::max()}).to(at::kInt)).contiguous();
}

inline void check_floating_point(const at::Tensor& tensor, const char* name) {
  check_dtype(
      tensor, name, {at::kHalf, at::kBFloat16, at::kFloat, at::kDouble}, "float16, bfloat16, float32 or float64");
}

inline void check_device(const at::Tensor& tensor, const char* name, const at::Tensor& other) {
  TORCH_CHECK_VALUE(
      tensor.device() == other.device(), name, " is on ", tensor.device(), ": expected ", other.device(),
      ", like the others");
}

inline void check_fraction(double value, const char* name) {
  TORCH_CHECK_VALUE(value >= 0 && value <= 1, name, " = ", value, ": expected 0 to 1");
}

// The network's output: deltas [B, A, 4] and logits [B, A, C] of one floating-point type.
inline void check_predictions(const at::Tensor& deltas, const at::Tensor& logits) {
  check_shape(deltas, "deltas", {kAny, kAny, 4});
  check_shape(logits, "logits", {deltas.size(0), deltas.size(1), kAny});
  check_device(logits, "logits", deltas);
  TORCH_CHECK_VALUE(
      logits.size(2) >= 2, "logits has shape ", logits.sizes(),
      ": expected at least 2 classes, background and another");
  check_floating_point(deltas, "deltas");
  check_floating_point(logits, "logits");
  TORCH_CHECK_VALUE(
      deltas.scalar_type() == logits.scalar_type(), "logits is torch.", c10::getDtypeNames(logits.scalar_type()).first,
      ": expected torch.", c10::getDtypeNames(deltas.scalar_type()).first, ", like deltas");
}

inline void check_multibox_loss(
    const at::Tensor& deltas, const at::Tensor& logits, const at::Tensor& target_deltas,
    const at::Tensor& target_labels) {
  check_predictions(deltas, logits);
  check_shape(target_deltas, "target_deltas", {deltas.size(0), deltas.size(1), 4});
  check_floating_point(target_deltas, "target_deltas");
  check_device(target_deltas, "target_deltas", deltas);
  check_shape(target_labels, "target_labels", {deltas.size(0), deltas.size(1)});
  check_integer(target_labels, "target_labels");
  check_device(target_labels, "target_labels", deltas);
}

inline void check_multibox_loss_backward(
    const at::Tensor& grad_box, const at::Tensor& grad_class, const at::Tensor& deltas, const at::Tensor& logits,
    const at::Tensor& target_deltas, const at::Tensor& target_labels, const at::Tensor& log_normalisers,
    const at::Tensor& num_positives) {
  check_multibox_loss(deltas, logits, target_deltas, target_labels);
  const at::ScalarType dtype = deltas.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const char* expected = dtype == at::kDouble ? "float64" : "float32";
  check_shape(grad_box, "grad_box", {deltas.size(0)});
  check_dtype(grad_box, "grad_box", {dtype}, expected);
  check_device(grad_box, "grad_box", deltas);
  check_shape(grad_class, "grad_class", {deltas.size(0)});
  check_dtype(grad_class, "grad_class", {dtype}, expected);
  check_device(grad_class, "grad_class", deltas);
  check_shape(log_normalisers, "log_normalisers", {deltas.size(0), deltas.size(1)});
  check_dtype(log_normalisers, "log_normalisers", {dtype}, expected);
  check_device(log_normalisers, "log_normalisers", deltas);
  check_shape(num_positives, "num_positives", {deltas.size(0)});
  check_dtype(num_positives, "num_positives", {at::kInt}, "int32");
  check_device(num_positives, "num_positives", deltas);
}

inline void check_decode_nms(
    const at::Tensor& deltas, const at::Tensor& logits, const at::Tensor& anchors_cxcywh, double score_threshold,
    double iou_threshold, int64_t max_per_class, int64_t max_detections) {
  check_predictions(deltas, logits);
  check_dtype(deltas, "deltas", {at::kHalf, at::kBFloat16, at::kFloat}, "float16, bfloat16 or float32");
  check_shape(anchors_cxcywh, "anchors_cxcywh", {deltas.size(1), 4});
  check_floating_point(anchors_cxcywh, "anchors_cxcywh");
  check_device(anchors_cxcywh, "anchors_cxcywh", deltas);
  check_fraction(score_threshold, "score_threshold");
  check_fraction(iou_threshold, "iou_threshold");
  TORCH_CHECK_VALUE(max_per_class >= 1, "max_per_class = ", max_per_class, ": expected at least 1");
  TORCH_CHECK_VALUE(
      max_detections >= 1 && max_detections <= kMostDetections, "max_detections = ", max_detections, ": expected 1 to ",
      kMostDetections);
}

inline void check_encode_boxes(
    const at::Tensor& boxes_ltrb, const at::Tensor& labels, const at::Tensor& offsets, const at::Tensor& anchors_cxcywh,
    double iou_threshold, const std::optional<at::Tensor>& tie_ranks) {
  check_shape(boxes_ltrb, "boxes_ltrb", {kAny, 4});
  check_dtype(boxes_ltrb, "boxes_ltrb", {at::kFloat}, "float32");
  check_shape(labels, "labels", {boxes_ltrb.size(0)});
  check_integer(labels, "labels");
  check_device(labels, "labels", boxes_ltrb);
  check_shape(offsets, "offsets", {kAny});
  check_integer(offsets, "offsets");
  check_device(offsets, "offsets", boxes_ltrb);
  TORCH_CHECK_VALUE(offsets.size(0) >= 1, "offsets has shape [0]: expected one entry more than there are images");
  check_shape(anchors_cxcywh, "anchors_cxcywh", {kAny, 4});
  check_floating_point(anchors_cxcywh, "anchors_cxcywh");
  check_device(anchors_cxcywh, "anchors_cxcywh", boxes_ltrb);
  TORCH_CHECK_VALUE(anchors_cxcywh.size(0) >= 1, "anchors_cxcywh has 0 rows: expected at least one anchor");
  check_fraction(iou_threshold, "iou_threshold");
  if (tie_ranks.has_value()) {
    check_shape(*tie_ranks, "tie_ranks", {anchors_cxcywh.size(0)});
    check_integer(*tie_ranks, "tie_ranks");
    check_device(*tie_ranks, "tie_ranks", boxes_ltrb);
  }
}

}  // namespace ssd_fast

// Schemas of the operators. Each implementation registers itself (cpu/*.cpp, cuda/*.cu). Fake implementations and
// autograd are in ops.py, which also documents the arguments.
#include <torch/library.h>

#include <string>

#ifndef SSD_FAST_CUDA_BUILD
#error "build with setup.py, which defines SSD_FAST_CUDA_BUILD: the GPUs of this build, or why there are none"
#endif

namespace {

std::string cuda_build() {
  return SSD_FAST_CUDA_BUILD;
}

}  // namespace

TORCH_LIBRARY(ssd_fast, m) {
  m.def("cuda_build() -> str", cuda_build);
  m.def(
      "encode_boxes(Tensor boxes_ltrb, Tensor labels, Tensor offsets, Tensor anchors_cxcywh, float iou_threshold, "
      "Tensor? tie_ranks) -> (Tensor, Tensor)");
  m.def(
      "multibox_loss(Tensor deltas, Tensor logits, Tensor target_deltas, Tensor target_labels) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "multibox_loss_backward(Tensor grad_box, Tensor grad_class, Tensor deltas, Tensor logits, "
      "Tensor target_deltas, Tensor target_labels, Tensor log_normalisers, Tensor num_positives) "
      "-> (Tensor, Tensor)");
  m.def(
      "decode_nms(Tensor deltas, Tensor logits, Tensor anchors_cxcywh, float score_threshold, float iou_threshold, "
      "int max_per_class, int max_detections) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "resize_normalise(Tensor[] images, int size, Tensor matrices, Tensor mirrored, Tensor low, Tensor high) "
      "-> Tensor");
}

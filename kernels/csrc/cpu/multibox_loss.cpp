// Multibox loss on the CPU (Liu et al. 2016, eq. 1): SmoothL1 over the positive anchors, and cross-entropy over these
// and over the hardest background anchors, three for each positive. Both are divided by the image's number of
// positives.
//
//   cross-entropy of an anchor = log sum_c exp(x_c) - x_label = (max - x_label) + log sum_c exp(x_c - max)
//   its gradient               = softmax(x) - onehot(label) = exp(x_c - log_normaliser) - onehot(label)
//
// Forward: 1. Threads share the anchors: one pass over the logits gives each log-normaliser and cross-entropy.
//          2. Threads share the images: count positives and sum their box loss; find the cross-entropy of the last
//             chosen negative with a histogram instead of a sort; sum in the order of anchors, in float64. The
//             log-normaliser of an anchor that is not in the loss becomes +inf, which tells the backward pass to skip
//             it.
// Backward: one pass over the anchors. Only for anchors in the loss are logits read again and their gradients written.
//           The rest of the gradient, nearly all of it, is memory that the operating system hands out as zeros.
// Memory: the logits are read once. Besides the gradients there is one float for each anchor, and three during the
// forward pass. Nothing but the gradient has the size [B, A, C].
//
// Ties: among equal cross-entropies the lower anchor comes first; NaN counts as the hardest. The result is
// deterministic and does not depend on the number of threads.
#ifdef __GNUC__
#pragma GCC optimize("fp-contract=fast")  // no test asks for equal bits here, and exp is a third faster
#endif

#include "checks.h"
#include "constants.h"
#include "cpu/simd.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <tuple>
#include <type_traits>
#include <vector>

namespace ssd_fast {

constexpr int64_t kAnchorsPerTask = 512;

// Log-normalisers and cross-entropies of `num_rows` anchors. Both are NaN for a label that is out of range.
SSD_FAST_CLONES void classify_rows(
    const float* logits, const int32_t* labels, int64_t num_rows, int64_t num_classes, float* log_normalisers,
    float* class_losses) {
  float padded[kLanes], row_maxima[kLanes], row_sums[kLanes], log_sums[kLanes];
  std::fill(padded, padded + kLanes, -kInfinity);
  std::fill(row_sums, row_sums + kLanes, 1.0f);
  for (int64_t first = 0; first < num_rows; first += kLanes) {
    const int64_t rows = std::min(kLanes, num_rows - first);
    for (int64_t row = 0; row < rows; ++row) {
      const float* x = logits + (first + row) * num_classes;
      int64_t size = num_classes;
      if (size < kLanes) {
        x = std::copy(x, x + size, padded) - size;
        size = kLanes;
      }
      Floats maxima = load(x);
      for (int64_t c = kLanes; c < size; c += kLanes) {
        maxima = larger(load(x + std::min(c, size - kLanes)), maxima);
      }
      const float max = largest(maxima);
      Floats sums = {};
      int64_t c = 0;
      for (; c + kLanes <= size; c += kLanes) {
        sums += exp_nonpositive(load(x + c) - max);
      }
      if (c < size) {
        sums += exp_nonpositive(load_rest(x, size, -kInfinity) - max);
      }
      row_maxima[row] = max;
      row_sums[row] = sum(sums);
    }
    store(log_sums, log_from_one(load(row_sums)));
    for (int64_t row = 0; row < rows; ++row) {
      const int32_t label = labels[first + row];
      const bool known = label >= 0 && label < num_classes;
      const float max = row_maxima[row], log_sum = log_sums[row];
      log_normalisers[first + row] = known ? max + log_sum : NAN;
      class_losses[first + row] = known ? (max - logits[(first + row) * num_classes + label]) + log_sum : NAN;
    }
  }
}

void classify_rows(
    const double* logits, const int32_t* labels, int64_t num_rows, int64_t num_classes, double* log_normalisers,
    double* class_losses) {
  for (int64_t row = 0; row < num_rows; ++row) {
    const double* x = logits + row * num_classes;
    const double max = *std::max_element(x, x + num_classes);
    double sum = 0;
    for (int64_t c = 0; c < num_classes; ++c) {
      sum += std::exp(x[c] - max);
    }
    const int32_t label = labels[row];
    const bool known = label >= 0 && label < num_classes;
    log_normalisers[row] = known ? max + std::log(sum) : NAN;
    class_losses[row] = known ? (max - x[label]) + std::log(sum) : NAN;
  }
}

template <typename scalar_t>  // 16-bit
void classify_rows(
    const scalar_t* logits, const int32_t* labels, int64_t num_rows, int64_t num_classes, float* log_normalisers,
    float* class_losses) {
  std::vector<float> row_logits(num_classes);
  for (int64_t row = 0; row < num_rows; ++row) {
    std::copy_n(logits + row * num_classes, num_classes, row_logits.begin());
    classify_rows(row_logits.data(), labels + row, 1, num_classes, log_normalisers + row, class_losses + row);
  }
}

// Gradient of an anchor's cross-entropy, times scale. For a label that is out of range the log-normaliser is NaN.
SSD_FAST_CLONES void class_gradient(
    const float* logits, int32_t label, int64_t num_classes, float log_normaliser, float scale, float* gradient) {
  float padded[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= num_classes; c += kLanes) {
    store(gradient + c, scale * exp_nonpositive(load(logits + c) - log_normaliser));
  }
  if (c < num_classes) {
    std::copy(logits + c, logits + num_classes, padded);
    store(padded, scale * exp_nonpositive(load(padded) - log_normaliser));
    std::copy(padded, padded + num_classes - c, gradient + c);
  }
  if (label >= 0 && label < num_classes) {
    gradient[label] -= scale;
  }
}

void class_gradient(
    const double* logits, int32_t label, int64_t num_classes, double log_normaliser, double scale, double* gradient) {
  for (int64_t c = 0; c < num_classes; ++c) {
    gradient[c] = scale * std::exp(logits[c] - log_normaliser) - (c == label ? scale : 0);
  }
}

template <typename scalar_t>  // 16-bit
void class_gradient(
    const scalar_t* logits, int32_t label, int64_t num_classes, float log_normaliser, float scale, scalar_t* gradient) {
  std::vector<float> row_logits(logits, logits + num_classes), row_gradient(num_classes);
  class_gradient(row_logits.data(), label, num_classes, log_normaliser, scale, row_gradient.data());
  std::copy_n(row_gradient.begin(), num_classes, gradient);
}

namespace {

// A tensor of zeros whose pages are allocated at their first access, so that parts that stay zero are never written.
at::Tensor zeros_on_demand(at::IntArrayRef sizes, const at::TensorOptions& options) {
  constexpr size_t kWorthwhile = 1 << 20;
  const size_t size = c10::multiply_integers(sizes) * options.dtype().itemsize();
  if (size >= kWorthwhile) {
    void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data != MAP_FAILED) {
      return at::from_blob(data, sizes, [size](void* mapped) { munmap(mapped, size); }, options);
    }
  }
  return at::zeros(sizes, options);
}

template <typename scalar_t>
using Accumulate = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

template <typename T>
T smooth_l1(T difference) {
  const T size = std::abs(difference);
  return size < 1 ? T(0.5) * difference * difference : size - T(0.5);
}

// An integer that grows with a cross-entropy, which is never negative. NaN has the largest key.
template <typename T>
using Key = std::conditional_t<std::is_same_v<T, double>, uint64_t, uint32_t>;

template <typename T>
Key<T> hardness(T class_loss) {
  Key<T> key;
  std::memcpy(&key, &class_loss, sizeof key);
  return std::isnan(class_loss) ? std::numeric_limits<Key<T>>::max() : key;
}

// The n-th largest key, 1 <= n <= keys.size(). A histogram of the leading 12 bits leaves few keys to choose from.
template <typename K>
K nth_largest(const std::vector<K>& keys, int64_t n, std::vector<K>& bin_keys) {
  constexpr int kShift = 8 * sizeof(K) - 12;
  std::array<int32_t, 1 << 12> counts{};
  for (const K key : keys) {
    ++counts[key >> kShift];
  }
  K bin = counts.size() - 1;
  for (; counts[bin] < n; --bin) {
    n -= counts[bin];
  }
  bin_keys.clear();
  std::copy_if(keys.begin(), keys.end(), std::back_inserter(bin_keys), [bin](K key) { return key >> kShift == bin; });
  std::nth_element(bin_keys.begin(), bin_keys.begin() + (n - 1), bin_keys.end(), std::greater<K>());
  return bin_keys[n - 1];
}

// One image's losses and number of positives. Sets the log-normaliser of anchors that are not in the loss to +inf.
template <typename scalar_t, typename T>
std::tuple<T, T, int64_t> sum_image(
    const scalar_t* deltas, const T* target_deltas, const int32_t* labels, const T* class_losses, int64_t num_anchors,
    T* log_normalisers, std::vector<Key<T>>& negatives, std::vector<Key<T>>& scratch) {
  double box = 0, class_ = 0;
  int64_t num_positives = 0;
  negatives.clear();
  for (int64_t anchor = 0; anchor < num_anchors; ++anchor) {
    if (labels[anchor] <= 0) {
      negatives.push_back(hardness(class_losses[anchor]));
      continue;
    }
    ++num_positives;
    class_ += class_losses[anchor];
    for (int64_t i = 4 * anchor; i < 4 * anchor + 4; ++i) {
      box += smooth_l1(static_cast<T>(deltas[i]) - target_deltas[i]);
    }
  }
  const int64_t num_hard = std::min<int64_t>(kNegativesPerPositive * num_positives, negatives.size());
  Key<T> limit = 0;      // key of the last chosen negative
  int64_t num_ties = 0;  // number of chosen negatives with this key
  if (num_hard > 0) {
    limit = nth_largest(negatives, num_hard, scratch);
    num_ties =
        num_hard - std::count_if(negatives.begin(), negatives.end(), [limit](Key<T> key) { return key > limit; });
  }
  for (int64_t anchor = 0; anchor < num_anchors; ++anchor) {
    if (labels[anchor] > 0) {
      continue;
    }
    const Key<T> key = hardness(class_losses[anchor]);
    const bool tied = key == limit && num_ties > 0;
    if (labels[anchor] < 0 || (num_hard > 0 && (key > limit || tied))) {
      class_ += class_losses[anchor];
      num_ties -= tied;
    } else {
      log_normalisers[anchor] = std::numeric_limits<T>::infinity();
    }
  }
  const double divisor = std::max<int64_t>(num_positives, 1);
  return {static_cast<T>(box / divisor), static_cast<T>(class_ / divisor), num_positives};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> multibox_loss(
    const at::Tensor& deltas_in, const at::Tensor& logits_in, const at::Tensor& target_deltas_in,
    const at::Tensor& target_labels_in) {
  check_multibox_loss(deltas_in, logits_in, target_deltas_in, target_labels_in);
  const at::ScalarType dtype = deltas_in.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor deltas = deltas_in.contiguous(), logits = logits_in.contiguous();
  const at::Tensor target_deltas = target_deltas_in.to(dtype).contiguous();
  const at::Tensor target_labels = as_int32(target_labels_in);
  const int64_t batch_size = logits.size(0), num_anchors = logits.size(1), num_classes = logits.size(2);
  const auto options = logits.options().dtype(dtype);
  at::Tensor box = at::empty({batch_size}, options), class_ = at::empty({batch_size}, options);
  at::Tensor log_normalisers = at::empty({batch_size, num_anchors}, options);
  at::Tensor class_losses = at::empty({batch_size, num_anchors}, options);
  at::Tensor num_positives = at::empty({batch_size}, options.dtype(at::kInt));

  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "multibox_loss", [&] {
    using T = Accumulate<scalar_t>;
    const scalar_t* logits_data = logits.const_data_ptr<scalar_t>();
    const scalar_t* deltas_data = deltas.const_data_ptr<scalar_t>();
    const int32_t* labels_data = target_labels.const_data_ptr<int32_t>();
    const T* target_data = target_deltas.const_data_ptr<T>();
    T* normalisers_data = log_normalisers.mutable_data_ptr<T>();
    T* losses_data = class_losses.mutable_data_ptr<T>();
    T* box_data = box.mutable_data_ptr<T>();
    T* class_data = class_.mutable_data_ptr<T>();
    int32_t* positives_data = num_positives.mutable_data_ptr<int32_t>();
    at::parallel_for(0, batch_size * num_anchors, kAnchorsPerTask, [&](int64_t begin, int64_t end) {
      classify_rows(
          logits_data + begin * num_classes, labels_data + begin, end - begin, num_classes, normalisers_data + begin,
          losses_data + begin);
    });
    at::parallel_for(0, batch_size, 1, [&](int64_t begin, int64_t end) {
      std::vector<Key<T>> negatives, scratch;
      negatives.reserve(num_anchors);
      for (int64_t image = begin; image < end; ++image) {
        const int64_t first = image * num_anchors;
        std::tie(box_data[image], class_data[image], positives_data[image]) = sum_image(
            deltas_data + 4 * first, target_data + 4 * first, labels_data + first, losses_data + first, num_anchors,
            normalisers_data + first, negatives, scratch);
      }
    });
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
  const at::Tensor deltas = deltas_in.contiguous(), logits = logits_in.contiguous();
  const at::Tensor target_deltas = target_deltas_in.to(grad_box_in.scalar_type()).contiguous();
  const at::Tensor target_labels = as_int32(target_labels_in);
  const at::Tensor log_normalisers = log_normalisers_in.contiguous(), num_positives = num_positives_in.contiguous();
  const at::Tensor grad_box = grad_box_in.contiguous(), grad_class = grad_class_in.contiguous();
  const int64_t batch_size = logits.size(0), num_anchors = logits.size(1), num_classes = logits.size(2);
  at::Tensor grad_deltas = at::empty(deltas.sizes(), deltas.options());
  at::Tensor grad_logits = zeros_on_demand(logits.sizes(), logits.options());  // nearly all of it stays zero

  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "multibox_loss_backward", [&] {
    using T = Accumulate<scalar_t>;
    const scalar_t* logits_data = logits.const_data_ptr<scalar_t>();
    const scalar_t* deltas_data = deltas.const_data_ptr<scalar_t>();
    const int32_t* labels_data = target_labels.const_data_ptr<int32_t>();
    const T* target_data = target_deltas.const_data_ptr<T>();
    const T* normalisers_data = log_normalisers.const_data_ptr<T>();
    const T* grad_box_data = grad_box.const_data_ptr<T>();
    const T* grad_class_data = grad_class.const_data_ptr<T>();
    const int32_t* positives_data = num_positives.const_data_ptr<int32_t>();
    scalar_t* grad_deltas_data = grad_deltas.mutable_data_ptr<scalar_t>();
    scalar_t* grad_logits_data = grad_logits.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, batch_size * num_anchors, kAnchorsPerTask, [&](int64_t begin, int64_t end) {
      for (int64_t anchor = begin; anchor < end; ++anchor) {
        const int64_t image = anchor / num_anchors;
        const int32_t label = labels_data[anchor];
        const T divisor = std::max(positives_data[image], 1);
        for (int64_t i = 4 * anchor; i < 4 * anchor + 4; ++i) {
          T slope = 0;
          if (label > 0) {
            const T difference = static_cast<T>(deltas_data[i]) - target_data[i];
            slope = (difference < -1 ? T(-1) : difference > 1 ? T(1) : difference) * (grad_box_data[image] / divisor);
          }
          grad_deltas_data[i] = static_cast<scalar_t>(slope);
        }
        const T log_normaliser = normalisers_data[anchor];
        if (log_normaliser != std::numeric_limits<T>::infinity()) {
          class_gradient(
              logits_data + anchor * num_classes, label, num_classes, log_normaliser, grad_class_data[image] / divisor,
              grad_logits_data + anchor * num_classes);
        }
      }
    });
  });
  return {grad_deltas, grad_logits};
}

TORCH_LIBRARY_IMPL(ssd_fast, CPU, m) {
  m.impl("multibox_loss", multibox_loss);
  m.impl("multibox_loss_backward", multibox_loss_backward);
}

}  // namespace
}  // namespace ssd_fast

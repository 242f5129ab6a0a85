// The network's input from decoded images on the CPU: resize, colours, normalisation and mirroring in one pass.
//
// Threads share the images. PyTorch's antialiased resize of 8-bit images leaves three planes in cache; a row of them
// becomes a row of pixels by a 3 x 4 matrix, which holds colours and normalisation together, and is clamped to the
// interval that black and white have then. Memory: the decoded image is read once, 12 bytes are written for each pixel.
#include "checks.h"
#include "cpu/simd.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_upsample_bilinear2d_aa.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

namespace ssd_fast {
namespace {

// One channel of a row: a weighted sum of the three planes, clamped. weights: of the planes, then the constant.
SSD_FAST_CLONES void mix(
    const uint8_t* red, const uint8_t* green, const uint8_t* blue, const float* weights, float low, float high,
    int64_t size, float* channel) {
  const float of_red = weights[0], of_green = weights[1], of_blue = weights[2], constant = weights[3];
  for (int64_t x = 0; x < size; ++x) {
    const float value = of_red * red[x] + of_green * green[x] + of_blue * blue[x] + constant;
    const float raised = value > low ? value : low;
    channel[x] = raised < high ? raised : high;
  }
}

void interleave(const float* channels, int64_t size, bool mirrored, float* pixels) {
  const float *red = channels, *green = channels + size, *blue = channels + 2 * size;
  const int64_t step = mirrored ? -3 : 3;
  float* pixel = mirrored ? pixels + 3 * (size - 1) : pixels;
  for (int64_t x = 0; x < size; ++x, pixel += step) {
    pixel[0] = red[x];
    pixel[1] = green[x];
    pixel[2] = blue[x];
  }
}

}  // namespace

at::Tensor resize_normalise(
    at::TensorList images, int64_t size, const at::Tensor& matrices_in, const at::Tensor& mirrored_in,
    const at::Tensor& low_in, const at::Tensor& high_in) {
  const int64_t batch_size = static_cast<int64_t>(images.size());
  TORCH_CHECK_VALUE(size >= 1, "size = ", size, ": expected at least 1");
  for (const at::Tensor& image : images) {
    check_shape(image, "images", {kAny, kAny, 3});
    check_dtype(image, "images", {at::kByte}, "uint8");
    TORCH_CHECK_VALUE(image.numel() > 0, "images has shape ", image.sizes(), ": expected at least a pixel");
  }
  check_shape(matrices_in, "matrices", {batch_size, 3, 4});
  check_shape(mirrored_in, "mirrored", {batch_size});
  check_dtype(mirrored_in, "mirrored", {at::kBool}, "bool");
  for (const auto& [tensor, name] : {std::pair(&low_in, "low"), std::pair(&high_in, "high")}) {
    check_shape(*tensor, name, {3});
    check_dtype(*tensor, name, {at::kFloat}, "float32");
  }
  check_dtype(matrices_in, "matrices", {at::kFloat}, "float32");
  const at::Tensor matrices = matrices_in.contiguous(), mirrored = mirrored_in.contiguous();
  const at::Tensor low = low_in.contiguous(), high = high_in.contiguous();
  const float* matrices_data = matrices.const_data_ptr<float>();
  const float *low_data = low.const_data_ptr<float>(), *high_data = high.const_data_ptr<float>();
  const bool* mirrored_data = mirrored.const_data_ptr<bool>();
  at::Tensor pixels = at::empty({batch_size, size, size, 3}, matrices.options());
  float* pixels_data = pixels.mutable_data_ptr<float>();
  at::parallel_for(0, batch_size, 1, [&](int64_t begin, int64_t end) {
    const at::NoGradGuard guard;
    std::vector<float> channels(3 * size);
    for (int64_t b = begin; b < end; ++b) {
      const at::Tensor planes =
          at::_upsample_bilinear2d_aa(images[b].permute({2, 0, 1}).unsqueeze(0), {size, size}, false).contiguous();
      const uint8_t* red = planes.const_data_ptr<uint8_t>();
      const float* matrix = matrices_data + 12 * b;
      for (int64_t y = 0; y < size; ++y, red += size) {
        for (int64_t c = 0; c < 3; ++c) {
          mix(red, red + size * size, red + 2 * size * size, matrix + 4 * c, low_data[c], high_data[c], size,
              channels.data() + c * size);
        }
        interleave(channels.data(), size, mirrored_data[b], pixels_data + ((b * size + y) * size) * 3);
      }
    }
  });
  return pixels;
}

TORCH_LIBRARY_IMPL(ssd_fast, CPU, m) {
  m.impl("resize_normalise", resize_normalise);
}

}  // namespace ssd_fast

// What the host code of the operators needs of PyTorch's CUDA library.
#pragma once

#include <c10/core/Device.h>
#include <cuda_runtime.h>

#define C10_CUDA_KERNEL_LAUNCH_CHECK()  // a launch that fails throws

namespace c10::cuda {

struct CUDAGuard {
  explicit CUDAGuard(c10::Device) {
  }
};

struct CUDAStream {
  operator cudaStream_t() const {
    return nullptr;
  }
};

inline CUDAStream getCurrentCUDAStream() {
  return {};
}

}  // namespace c10::cuda

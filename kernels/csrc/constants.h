// Constants of the detector's rules, for the CPU and CUDA sources. kernels/constants.py owns the values; setup.py
// passes them to the compiler.
#pragma once

#if !defined(SSD_FAST_CENTRE_VARIANCE) || !defined(SSD_FAST_SIZE_VARIANCE) || !defined(SSD_FAST_NEGATIVES_PER_POSITIVE)
#error "build with setup.py, which defines the constants of kernels/constants.py as macros"
#endif

namespace ssd_fast {

constexpr float kCentreVariance = static_cast<float>(SSD_FAST_CENTRE_VARIANCE);
constexpr float kSizeVariance = static_cast<float>(SSD_FAST_SIZE_VARIANCE);
constexpr float kInverseCentreVariance = static_cast<float>(1 / SSD_FAST_CENTRE_VARIANCE);
constexpr float kInverseSizeVariance = static_cast<float>(1 / SSD_FAST_SIZE_VARIANCE);
constexpr int kNegativesPerPositive = SSD_FAST_NEGATIVES_PER_POSITIVE;

}  // namespace ssd_fast

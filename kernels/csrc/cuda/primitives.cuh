// Device functions that several operators share: overlap of boxes, softmax of rows, the k-th largest key.
// Blocks consist of whole warps. All threads of a block call a function together unless its comment says otherwise.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace ssd_fast {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarpSize = 32;

template <typename scalar_t>
using Accumulate = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// These are constants because device code may not call the library's constexpr functions.
template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();
template <typename T>
constexpr T kLowest = std::numeric_limits<T>::lowest();
template <typename T>
constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();

// ---- Boxes. Every operation is rounded on its own, in the order of kernels/reference.py. A contraction of a product
// and a sum would change last bits, and with them ties. Coordinates: x, y, z, w = left, top, right, bottom.

// Four consecutive values, aligned like scalar_t only.
template <typename scalar_t>
__device__ __forceinline__ float4 load_four(const scalar_t* values) {
  return {
      static_cast<float>(values[0]), static_cast<float>(values[1]), static_cast<float>(values[2]),
      static_cast<float>(values[3])};
}

__device__ __forceinline__ float4 cxcywh_to_ltrb(float4 box) {
  const float half_width = __fmul_rn(0.5f, box.z), half_height = __fmul_rn(0.5f, box.w);
  return {
      __fsub_rn(box.x, half_width), __fsub_rn(box.y, half_height), __fadd_rn(box.x, half_width),
      __fadd_rn(box.y, half_height)};
}

__device__ __forceinline__ float area_of(float4 box) {
  return __fmul_rn(__fsub_rn(box.z, box.x), __fsub_rn(box.w, box.y));
}

// Intersection over union: never negative, never NaN. Boxes that do not meet, by far the most, cost no division.
__device__ __forceinline__ float iou_of(float4 a, float area_a, float4 b, float area_b) {
  const float width = __fsub_rn(fminf(a.z, b.z), fmaxf(a.x, b.x));
  const float height = __fsub_rn(fminf(a.w, b.w), fmaxf(a.y, b.y));
  if (!(width > 0.0f && height > 0.0f)) {
    return 0.0f;
  }
  const float intersection = __fmul_rn(width, height);
  const float union_area = __fsub_rn(__fadd_rn(area_a, area_b), intersection);
  return union_area > 0.0f ? __fdiv_rn(intersection, union_area) : 0.0f;
}

// ---- Rows of logits. A row of 81 16-bit logits can start at any even address. So a block first copies a tile of whole
// rows to shared memory in vectors of 16 bytes, then reads the rows value by value. Eight lanes share a row, so that a
// warp reads 4 x 8 neighbours at a time (no bank conflict for 81 16-bit classes). Every warp has an equal share of the
// tile, at most one row for each of its lanes.

constexpr int kThreadsPerTile = 128;
constexpr int kWarpsPerTile = kThreadsPerTile / kWarpSize;
constexpr int kLanesPerRow = 8;
constexpr int kRowsAtOnce = kWarpSize / kLanesPerRow;  // in a warp
constexpr int kValuesPerLane = 12;                     // in registers at a time: 96 classes in one go
constexpr int kTileBytes = 12 * 1024;                  // any GPU has room for five or more tiles

// The division of rows into tiles. Rows too long for shared memory are read from global memory instead of staged.
struct Tiles {
  int rows_per_warp;
  bool staged;
  int64_t count, shared_bytes;

  Tiles(int64_t num_rows, int64_t row_bytes) {
    const int64_t fitting = kTileBytes / (row_bytes * kWarpsPerTile) / kRowsAtOnce * kRowsAtOnce;
    staged = fitting > 0;
    rows_per_warp = staged ? static_cast<int>(std::min<int64_t>(fitting, kWarpSize)) : kWarpSize;
    const int64_t rows_per_tile = rows_per_warp * kWarpsPerTile;
    count = (num_rows + rows_per_tile - 1) / rows_per_tile;
    shared_bytes = staged ? rows_per_tile * row_bytes : 0;
  }
};

// Copies `count` values to shared memory; the caller synchronises.
template <typename scalar_t>
__device__ __forceinline__ void stage(const scalar_t* __restrict__ values, int count, uint4* tile) {
  constexpr int kPerVector = sizeof(uint4) / sizeof(scalar_t);
  constexpr int kInFlight = 4;
  const bool aligned = reinterpret_cast<uintptr_t>(values) % sizeof(uint4) == 0;
  const int num_vectors = aligned ? count / kPerVector : 0;
  for (int first = threadIdx.x; first < num_vectors; first += kInFlight * kThreadsPerTile) {
    uint4 vectors[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i * kThreadsPerTile < num_vectors) {
        vectors[i] = reinterpret_cast<const uint4*>(values)[first + i * kThreadsPerTile];
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i * kThreadsPerTile < num_vectors) {
        tile[first + i * kThreadsPerTile] = vectors[i];
      }
    }
  }
  for (int i = num_vectors * kPerVector + threadIdx.x; i < count; i += kThreadsPerTile) {
    reinterpret_cast<scalar_t*>(tile)[i] = values[i];
  }
}

// exp(x) for x <= 0, in two instructions instead of eight; 0 if the result is below 2^-126. The relative error is
// 2^-22 + |x| 2^-24. In a sum of at least 1, to which x adds exp(x), that stays at the size of float32 rounding.
__device__ __forceinline__ float fast_exp(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.4426950408889634f));
  return result;
}

__device__ __forceinline__ double fast_exp(double x) {
  return exp(x);
}

// Maximum of a row and sum of exp(value - maximum), returned in all lanes of the row; all lanes of a warp call it
// together. The sum is NaN if a value is NaN or +inf. The order of summation depends only on the number of classes.
template <typename scalar_t, typename T>
__device__ __forceinline__ void reduce_row(const scalar_t* row, int num_classes, T& max, T& sum) {
  max = kLowest<T>;  // with -inf, a lane without values would compute -inf - -inf = NaN
  sum = 0;
  for (int first = threadIdx.x % kLanesPerRow; first < num_classes; first += kLanesPerRow * kValuesPerLane) {
    const int num_left = num_classes - first;
    T values[kValuesPerLane], new_max = max;
#pragma unroll
    for (int i = 0; i < kValuesPerLane; ++i) {
      values[i] = i * kLanesPerRow < num_left ? static_cast<T>(row[first + i * kLanesPerRow]) : -kInfinity<T>;
      new_max = fmax(new_max, values[i]);
    }
    sum *= fast_exp(max - new_max);
    max = new_max;
#pragma unroll
    for (int i = 0; i < kValuesPerLane; ++i) {
      sum += fast_exp(values[i] - max);
    }
  }
  T row_max = max;
#pragma unroll
  for (int lanes = kLanesPerRow / 2; lanes > 0; lanes /= 2) {
    row_max = fmax(row_max, __shfl_xor_sync(kAllLanes, row_max, lanes));
  }
  sum *= fast_exp(max - row_max);
  max = row_max;
#pragma unroll
  for (int lanes = kLanesPerRow / 2; lanes > 0; lanes /= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, lanes);
  }
}

// ---- Selection: radix select over the bytes of the keys, from the top, until the bin of the k-th key holds no keys
// beyond it. Nothing is sorted and only 256 counters are written, so the result does not depend on the order in which
// threads run.

// The greatest bound that k keys reach or exceed. key_at(i), 0 <= i < count, returns unique unsigned keys, or 0 for no
// key; at least k >= 1 of them are not 0.
template <typename Key, typename KeyAt>
__device__ Key kth_largest(int count, int k, KeyAt key_at) {
  constexpr int kBins = 256;
  __shared__ int bins[kBins];
  __shared__ int bin_of_kth, size_of_bin, num_from_bin;
  Key prefix = 0, mask = 0;
  for (int shift = 8 * sizeof(Key) - 8; shift >= 0; shift -= 8) {
    for (int bin = threadIdx.x; bin < kBins; bin += blockDim.x) {
      bins[bin] = 0;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      const Key key = key_at(i);
      if (key != 0 && (key & mask) == prefix) {
        atomicAdd(&bins[static_cast<unsigned>(key >> shift) % kBins], 1);
      }
    }
    __syncthreads();
    if (threadIdx.x < kWarpSize) {
      constexpr int kBinsPerLane = kBins / kWarpSize;
      const int lane = threadIdx.x, top = kBins - 1 - kBinsPerLane * lane;
      int own = 0;
      for (int i = 0; i < kBinsPerLane; ++i) {
        own += bins[top - i];
      }
      int through = own;  // number of keys in this lane's bins and above
      for (int lanes = 1; lanes < kWarpSize; lanes *= 2) {
        const int before = __shfl_up_sync(kAllLanes, through, lanes);
        through += lane >= lanes ? before : 0;
      }
      int above = through - own;
      if (above < k && k <= through) {
        int bin = top;
        while (above + bins[bin] < k) {
          above += bins[bin--];
        }
        bin_of_kth = bin;
        size_of_bin = bins[bin];
        num_from_bin = k - above;
      }
    }
    __syncthreads();
    prefix |= static_cast<Key>(bin_of_kth) << shift;
    mask |= static_cast<Key>(kBins - 1) << shift;
    k = num_from_bin;
    if (size_of_bin == k) {
      break;
    }
  }
  return prefix;
}

}  // namespace ssd_fast

// CUDA on the CPU: what device code needs of the language, once translate.py has rewritten what C++ has no words for.
//
// Every CUDA thread is a fiber. A block runs on one thread of the system, which switches fibers where they wait for each
// other. Only what the kernels of this project use is here: anything else does not compile.
#pragma once

#include <math.h>
#include <stdint.h>

#include <cmath>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

using cudaStream_t = void*;

extern uint3 threadIdx, blockIdx;  // of the fiber that runs
extern dim3 blockDim, gridDim;

namespace emulation {

// A line of a source.
struct Site {
  const char* file;
  int line;
};

// Storage of one __shared__ variable: fresh in every block, of exactly its size, and filled with garbage.
struct SharedVariable {
  const char* name;
  size_t size;
  unsigned long block = 0;  // serial number of the block that has it
  void* storage = nullptr;

  constexpr SharedVariable(const char* name, size_t size) : name(name), size(size) {
  }
  void* get();
};

void* dynamic_shared_memory();

// max_threads: of __launch_bounds__; 0 for none.
void run_blocks(
    const char* name, int max_threads, int64_t num_blocks, int64_t num_threads, int64_t shared_bytes,
    const std::function<void()>& thread);

// kernel<<<num_blocks, num_threads, shared_bytes, stream>>>(arguments)
struct Launch {
  const char* name;
  int max_threads;
  int64_t num_blocks, num_threads, shared_bytes = 0;
  cudaStream_t stream = nullptr;

  template <typename Kernel, typename... Arguments>
  void operator()(Kernel kernel, const Arguments&... arguments) const {
    const std::function<void()> thread = [&] { kernel(arguments...); };
    run_blocks(name, max_threads, num_blocks, num_threads, shared_bytes, thread);
  }
};

enum class Collective { shuffle_xor, shuffle_up, shuffle_down, shuffle, any, all, ballot, sync };

// A value of any type that lanes exchange.
struct Bits {
  uint64_t words[2];
};

template <typename T>
Bits to_bits(T value) {
  static_assert(sizeof(T) <= sizeof(Bits));
  Bits bits{};
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T from_bits(Bits bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// Waits until all lanes of the mask make the same call, and returns what CUDA returns to this one.
Bits collective(Collective kind, unsigned mask, Bits value, int parameter, Site site);

void sync_threads(Site site);

// Records an access that is one indivisible step. Other threads may run before it.
void before_atomic(void* address, size_t size, void* caller);

template <typename T, typename Update>
[[gnu::noinline, gnu::no_sanitize_thread]] T atomic(T* address, Update update) {
  before_atomic(address, sizeof(T), __builtin_return_address(0));
  T before;
  std::memcpy(&before, address, sizeof(T));
  const T after = update(before);
  std::memcpy(address, &after, sizeof(T));
  return before;
}

float ex2_approx_ftz(float x);

// The compiler cannot contract across it.
inline float rounded(float value) {
  asm("" : "+x"(value));
  return value;
}

}  // namespace emulation

#define CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CALLER) {
  emulation::sync_threads({file, line});
}

inline void __syncwarp(unsigned mask = 0xffffffffu, CALLER) {
  emulation::collective(emulation::Collective::sync, mask, {}, 0, {file, line});
}

#define SHUFFLE(name, kind)                                                                                            \
  template <typename T>                                                                                                \
  inline T name(unsigned mask, T value, int parameter, CALLER) {                                                       \
    return emulation::from_bits<T>(                                                                                    \
        emulation::collective(emulation::Collective::kind, mask, emulation::to_bits(value), parameter, {file, line})); \
  }
SHUFFLE(__shfl_xor_sync, shuffle_xor)
SHUFFLE(__shfl_up_sync, shuffle_up)
SHUFFLE(__shfl_down_sync, shuffle_down)
SHUFFLE(__shfl_sync, shuffle)
#undef SHUFFLE

#define VOTE(name, kind, T)                                                                                        \
  inline T name(unsigned mask, int predicate, CALLER) {                                                            \
    return emulation::from_bits<T>(                                                                                \
        emulation::collective(emulation::Collective::kind, mask, emulation::to_bits(predicate), 0, {file, line})); \
  }
VOTE(__any_sync, any, int)
VOTE(__all_sync, all, int)
VOTE(__ballot_sync, ballot, unsigned)
#undef VOTE
#undef CALLER

#define ATOMICS(T)                                                                     \
  inline T atomicAdd(T* address, T value) {                                            \
    return emulation::atomic(address, [=](T x) { return static_cast<T>(x + value); }); \
  }                                                                                    \
  inline T atomicMax(T* address, T value) {                                            \
    return emulation::atomic(address, [=](T x) { return x < value ? value : x; });     \
  }                                                                                    \
  inline T atomicMin(T* address, T value) {                                            \
    return emulation::atomic(address, [=](T x) { return value < x ? value : x; });     \
  }                                                                                    \
  inline T atomicOr(T* address, T value) {                                             \
    return emulation::atomic(address, [=](T x) { return static_cast<T>(x | value); }); \
  }
ATOMICS(int)
ATOMICS(unsigned)
ATOMICS(unsigned long long)
#undef ATOMICS

inline float __fadd_rn(float a, float b) {
  return emulation::rounded(a + b);
}
inline float __fsub_rn(float a, float b) {
  return emulation::rounded(a - b);
}
inline float __fmul_rn(float a, float b) {
  return emulation::rounded(a * b);
}
inline float __fdiv_rn(float a, float b) {
  return emulation::rounded(a / b);
}
inline unsigned __float_as_uint(float x) {
  return emulation::from_bits<unsigned>(emulation::to_bits(x));
}
inline float __uint_as_float(unsigned x) {
  return emulation::from_bits<float>(emulation::to_bits(x));
}
inline long long __double_as_longlong(double x) {
  return emulation::from_bits<long long>(emulation::to_bits(x));
}
inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __clz(int x) {
  return x ? __builtin_clz(x) : 32;
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}

// min and max as CUDA has them: of one type, or of a signed and an unsigned one, whose result is unsigned.
#define MIN_MAX(A, B, R)                                  \
  inline R min(A a, B b) {                                \
    return static_cast<R>(b) < static_cast<R>(a) ? b : a; \
  }                                                       \
  inline R max(A a, B b) {                                \
    return static_cast<R>(a) < static_cast<R>(b) ? b : a; \
  }
MIN_MAX(int, int, int)
MIN_MAX(unsigned, unsigned, unsigned)
MIN_MAX(int, unsigned, unsigned)
MIN_MAX(unsigned, int, unsigned)
MIN_MAX(long, long, long)
MIN_MAX(unsigned long, unsigned long, unsigned long)
MIN_MAX(long, unsigned long, unsigned long)
MIN_MAX(unsigned long, long, unsigned long)
MIN_MAX(long long, long long, long long)
MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
MIN_MAX(long long, unsigned long long, unsigned long long)
MIN_MAX(unsigned long long, long long, unsigned long long)
#undef MIN_MAX

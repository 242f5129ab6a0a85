// What the two halves of the runtime know of each other: threads.cpp runs fibers, memory.cpp watches what they touch.
#pragma once

#include <cuda_runtime.h>

#include <memory>
#include <string>

namespace emulation {

constexpr int kWarpSize = 32, kMostThreads = 1024;

// ---- threads.cpp

// The place of the access or call that is being looked at. epoch counts the block's barriers, warp_epoch the thread's
// __syncwarp.
struct Position {
  uint32_t launch, block, epoch, warp_epoch;
  uint16_t thread;
};

Position position();
bool is_on_stack(uintptr_t address);  // of the fiber that runs; false outside a kernel
bool is_in_kernel();
void maybe_pause(int one_in);  // lets other threads run, under a random schedule only

// ---- memory.cpp

enum class Access : uint8_t { plain, atomic, is_volatile };

// Looks at an access of the running thread; return_address tells its line.
void record_access(uintptr_t address, size_t size, bool reads, bool writes, Access kind, uintptr_t return_address);

// Shared memory of a block. Bounds are exact; what is in it at first is garbage.
class SharedMemory {
 public:
  SharedMemory(size_t size, const std::string& name);
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  char* begin() const {
    return begin_;
  }

 private:
  struct Region* region_;
  std::unique_ptr<char[]> memory_;
  char* begin_;
};

// File and line of an instruction, then those of the calls that it was inlined into; empty outside the kernels.
std::string lines_at(uintptr_t instruction);

// Races and bad accesses since the last call, one line each; empty if there were none.
std::string take_findings(const char* kernel);

// Counters of a kernel, over all its launches. Accesses: of threads, to shared and global memory. Bytes of global memory
// count at each access; unique ones, once a launch.
struct Counters {
  uint64_t launches = 0, threads = 0, barriers = 0, collectives = 0, atomics = 0, accesses = 0;
  uint64_t global_read = 0, global_written = 0, unique_read = 0, unique_written = 0;
};

Counters& counters();  // of the kernel that runs

}  // namespace emulation

// What threads touch: races by happens-before, accesses out of bounds or misaligned, reads of memory never written.
//
// Device code is compiled with -fsanitize=thread, whose calls end here; the sanitizer itself is not linked. Shared memory
// and all tensors have a shadow cell for every two bytes: the last write and two reads since. Two accesses conflict if no
// barrier lies between them (lanes of a warp are threads like others: only __syncwarp orders them, not shuffles), and
// always if they are of different blocks. So what is found does not depend on the order in which threads ran.
//
// EMULATION_POISON: magic (default), zero or ff: what fresh memory holds. Reads of it are found with magic only.
#include "emulation.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>
#include <tuple>
#include <vector>

namespace emulation {
namespace {

constexpr size_t kRedZone = 256, kAlignment = 64;
constexpr uint16_t kMagic = 0xffdb;  // NaN in every floating-point type that repeats it
constexpr size_t kMostFindings = 16;

void poison(void* memory, size_t size) {
  const char* kind = std::getenv("EMULATION_POISON");
  const std::string chosen = kind && *kind ? kind : "magic";
  TORCH_CHECK(
      chosen == "magic" || chosen == "zero" || chosen == "ff", "EMULATION_POISON=", chosen,
      ": expected magic, zero or ff");
  if (chosen != "magic") {
    std::memset(memory, chosen == "zero" ? 0 : 0xff, size);
    return;
  }
  std::fill_n(static_cast<uint16_t*>(memory), size / 2, kMagic);
  if (size % 2) {
    static_cast<unsigned char*>(memory)[size - 1] = kMagic & 0xff;
  }
}

struct Event {
  Position at{};
  uint32_t return_address = 0;  // offset in this library
  Access kind{};
  bool is_set = false;
};

struct Cell {
  Event write, reads[2];
  uint32_t read_in = 0, written_in = 0;  // launches, so that bytes count once
};

}  // namespace

// Memory with bounds.
struct Region {
  uintptr_t begin;
  size_t size;
  std::string name;
  bool is_shared;
  Cell* cells = nullptr;
  size_t num_cells = 0;

  ~Region() {
    if (cells) {
      munmap(cells, num_cells * sizeof(Cell));
    }
  }

  Cell* cell_of(uintptr_t address) {
    if (!cells) {  // pages of the shadow exist once they are touched
      num_cells = size / 2 + 2;
      void* memory = mmap(
          nullptr, num_cells * sizeof(Cell), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
          0);
      TORCH_CHECK(memory != MAP_FAILED, "emulation: no memory for the shadow of ", size, " bytes");
      cells = static_cast<Cell*>(memory);
    }
    return cells + (address - begin) / 2;
  }
};

namespace {

std::mutex regions_mutex;
std::map<uintptr_t, Region*> regions;  // by where their red zones begin
Region* recent[8];
unsigned next_recent = 0;

Region* add_region(const void* begin, size_t size, const std::string& name, bool is_shared) {
  auto* region = new Region{reinterpret_cast<uintptr_t>(begin), size, name, is_shared};
  const std::lock_guard<std::mutex> lock(regions_mutex);
  regions[region->begin - kRedZone] = region;
  return region;
}

void remove_region(Region* region) {
  const std::lock_guard<std::mutex> lock(regions_mutex);
  regions.erase(region->begin - kRedZone);
  std::replace(std::begin(recent), std::end(recent), region, static_cast<Region*>(nullptr));
  delete region;
}

// The region whose memory or red zones hold the address.
Region* find_region(uintptr_t address) {
  for (Region* region : recent) {
    if (region && address - region->begin < region->size) {
      return region;
    }
  }
  const auto above = regions.upper_bound(address);
  if (above == regions.begin()) {
    return nullptr;
  }
  Region* region = std::prev(above)->second;
  if (address >= region->begin + region->size + kRedZone) {
    return nullptr;
  }
  return recent[next_recent++ % std::size(recent)] = region;
}

// ---- Findings

struct Race {
  std::string place;
  Event earlier, later;
  bool earlier_writes, later_writes;
};

struct BadAccess {
  std::string what;
  Event event;
  bool writes;
};

std::vector<Race> races;
std::vector<BadAccess> bad_accesses;
std::set<std::tuple<uint32_t, uint32_t>> seen;  // lines that are reported already

uintptr_t library_begin(const char** path = nullptr) {
  static const Dl_info info = [] {
    Dl_info found{};
    dladdr(reinterpret_cast<void*>(&find_region), &found);
    return found;
  }();
  if (path) {
    *path = info.dli_fname;
  }
  return reinterpret_cast<uintptr_t>(info.dli_fbase);
}

// File and line of an access, then those of the calls that it was inlined into.
std::string lines_of(uint32_t return_address) {
  const char* path;
  library_begin(&path);
  char command[4096], line[1024];
  std::snprintf(command, sizeof command, "addr2line -Cie '%s' 0x%x 2>/dev/null", path, return_address - 1);
  std::string text;
  if (FILE* pipe = popen(command, "r")) {
    while (std::fgets(line, sizeof line, pipe)) {
      const std::string whole = line, name = whole.substr(whole.rfind('/') + 1);
      if (name.rfind("cuda_runtime.h", 0) != 0 && name.find(".cu") != std::string::npos) {
        text += (text.empty() ? "" : " < ") + name.substr(0, name.find_first_of(" \n"));
      }
    }
    pclose(pipe);
  }
  return text;
}

std::string text_of(const Event& event, bool writes) {
  const std::string kind = event.kind == Access::atomic
      ? "atomic"
      : std::string(event.kind == Access::is_volatile ? "volatile " : "") + (writes ? "write" : "read");
  return kind + " by block " + std::to_string(event.at.block) + " thread " + std::to_string(event.at.thread) + " at " +
      lines_of(event.return_address);
}

void report_bad_access(const std::string& what, const Event& event, bool writes) {
  if (bad_accesses.size() < kMostFindings && seen.insert({event.return_address, 0}).second) {
    bad_accesses.push_back({what, event, writes});
  }
}

// ---- Rules

bool is_unordered(const Event& earlier, const Event& later) {
  if (!earlier.is_set || earlier.at.launch != later.at.launch) {
    return false;
  }
  if (earlier.at.block != later.at.block) {
    return true;
  }
  if (earlier.at.thread == later.at.thread || earlier.at.epoch != later.at.epoch) {
    return false;
  }
  return earlier.at.thread / kWarpSize != later.at.thread / kWarpSize || earlier.at.warp_epoch == later.at.warp_epoch;
}

// Volatile accesses of up to eight bytes are one step on a GPU: they and atomics do not race with each other.
void check_order(
    const Region& region, uintptr_t address, const Event& earlier, bool earlier_writes, const Event& later,
    bool later_writes) {
  if (!is_unordered(earlier, later) || (earlier.kind != Access::plain && later.kind != Access::plain)) {
    return;
  }
  if (races.size() < kMostFindings && seen.insert({earlier.return_address, later.return_address}).second) {
    const std::string place = region.name + ", offset " + std::to_string(address - region.begin);
    races.push_back({place, earlier, later, earlier_writes, later_writes});
  }
}

void keep_read(Cell& cell, const Event& event) {
  Event& first = cell.reads[0];
  const bool is_same = first.is_set && first.at.launch == event.at.launch && first.at.block == event.at.block &&
      first.at.thread == event.at.thread;
  if (!is_same && is_unordered(first, event)) {
    cell.reads[1] = event;
    return;
  }
  const bool was_plain = is_same && first.at.epoch == event.at.epoch && first.kind == Access::plain;
  first = event;
  first.kind = was_plain ? Access::plain : event.kind;
}

void count(const Region& region, size_t size, bool reads, bool writes, Access kind) {
  Counters& sums = counters();
  sums.atomics += kind == Access::atomic;
  ++sums.accesses;
  if (!region.is_shared) {
    sums.global_read += reads ? size : 0;
    sums.global_written += writes ? size : 0;
  }
}

}  // namespace

void record_access(uintptr_t address, size_t size, bool reads, bool writes, Access kind, uintptr_t return_address) {
  Region* region = find_region(address);
  if (!region) {
    return;
  }
  const Event event{position(), static_cast<uint32_t>(return_address - library_begin()), kind, true};
  if (address < region->begin || address + size > region->begin + region->size) {
    const auto offset = static_cast<int64_t>(address - region->begin);
    return report_bad_access(
        std::string("OUT OF BOUNDS: ") + (writes ? "write" : "read") + " of " + std::to_string(size) +
            " bytes at offset " + std::to_string(offset) + " of " + region->name + ", which has " +
            std::to_string(region->size),
        event, writes);
  }
  if (size <= 16 && (size & (size - 1)) == 0 && address % size != 0) {
    report_bad_access("MISALIGNED: access of " + std::to_string(size) + " bytes in " + region->name, event, writes);
  }
  count(*region, size, reads, writes, kind);
  bool is_fresh = reads && size >= 2;
  const uintptr_t end = region->begin + region->size;
  for (uintptr_t at = address & ~uintptr_t{1}; at < address + size; at += 2) {
    Cell& cell = *region->cell_of(at);
    if (reads) {
      is_fresh = is_fresh && !cell.write.is_set && at + 1 < end && *reinterpret_cast<const uint16_t*>(at) == kMagic;
      if (!region->is_shared && cell.read_in != event.at.launch) {
        cell.read_in = event.at.launch;
        counters().unique_read += 2;
      }
    }
    check_order(*region, address, cell.write, true, event, writes);
    if (!writes) {
      keep_read(cell, event);
      continue;
    }
    for (const Event& earlier : cell.reads) {
      check_order(*region, address, earlier, false, event, true);
    }
    cell.write = event;
    if (!region->is_shared && cell.written_in != event.at.launch) {
      cell.written_in = event.at.launch;
      counters().unique_written += 2;
    }
  }
  if (is_fresh && kind != Access::atomic) {
    report_bad_access(
        "NEVER WRITTEN: read of " + region->name + ", offset " + std::to_string(address - region->begin), event, false);
  }
}

std::string take_findings(const char* kernel) {
  std::map<std::string, std::string> texts;  // one for each set of lines: bytes that lie side by side say the same
  for (const BadAccess& bad : bad_accesses) {
    const std::string lines = lines_of(bad.event.return_address);
    texts.insert({lines, "\n" + bad.what + "\n  in " + kernel + ": " + text_of(bad.event, bad.writes)});
  }
  for (const Race& race : races) {
    const std::string lines = lines_of(race.earlier.return_address) + lines_of(race.later.return_address);
    texts.insert(
        {lines,
         "\nRACE in " + race.place + "\n  in " + kernel + ": " + text_of(race.earlier, race.earlier_writes) +
             "\n  against " + text_of(race.later, race.later_writes)});
  }
  bad_accesses.clear();
  races.clear();
  seen.clear();
  std::string text;
  for (const auto& [lines, finding] : texts) {
    text += finding;
  }
  return text;
}

std::string lines_at(uintptr_t instruction) {
  return lines_of(static_cast<uint32_t>(instruction + 1 - library_begin()));
}

void before_atomic(void* address, size_t size, void* caller) {
  maybe_pause(4);
  record_access(
      reinterpret_cast<uintptr_t>(address), size, true, true, Access::atomic, reinterpret_cast<uintptr_t>(caller));
}

SharedMemory::SharedMemory(size_t size, const std::string& name) : memory_(new char[size + 2 * kRedZone + kAlignment]) {
  const auto start = reinterpret_cast<uintptr_t>(memory_.get()) + kRedZone;
  begin_ = memory_.get() + kRedZone + (kAlignment - start % kAlignment) % kAlignment;
  poison(begin_, size);
  region_ = add_region(begin_, size, name, true);
}

SharedMemory::~SharedMemory() {
  remove_region(region_);
}

// ---- Tensors: all memory of PyTorch's CPU tensors has bounds, and is filled with garbage

namespace {

struct Allocation {
  void* memory;
  Region* region;
};

void release(void* context) {
  auto* allocation = static_cast<Allocation*>(context);
  remove_region(allocation->region);
  std::free(allocation->memory);
  delete allocation;
}

void release_nothing(void*) {
}

struct WatchedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    if (size == 0) {
      return {nullptr, nullptr, &release_nothing, c10::Device(c10::kCPU)};
    }
    void* memory = nullptr;
    const bool is_possible = size < size_t{1} << 40;
    TORCH_CHECK(
        is_possible && posix_memalign(&memory, kAlignment, size + 2 * kRedZone) == 0,
        "emulation: out of memory: ", size, " bytes");
    poison(memory, size + 2 * kRedZone);
    char* data = static_cast<char*>(memory) + kRedZone;
    Region* region = add_region(data, size, "a tensor of " + std::to_string(size) + " bytes", false);
    return {data, new Allocation{memory, region}, &release, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return nullptr;
  }
  void copy_data(void* to, const void* from, size_t size) const override {
    default_copy_data(to, from, size);
  }
};

WatchedAllocator watched_allocator;
const bool is_installed = (c10::SetCPUAllocator(&watched_allocator, 200), true);

void look_at(void* address, size_t size, bool writes, Access kind, void* return_address) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  if (is_in_kernel() && !is_on_stack(at)) {
    maybe_pause(16);
    record_access(at, size, !writes, writes, kind, reinterpret_cast<uintptr_t>(return_address));
  }
}

}  // namespace
}  // namespace emulation

// ---- What code calls that is compiled with -fsanitize=thread

#define HOOK(name, size, writes, kind)                                                               \
  extern "C" void name(void* address) {                                                              \
    emulation::look_at(address, size, writes, emulation::Access::kind, __builtin_return_address(0)); \
  }
#define HOOKS(size)                                                    \
  HOOK(__tsan_read##size, size, false, plain)                          \
  HOOK(__tsan_write##size, size, true, plain)                          \
  HOOK(__tsan_unaligned_read##size, size, false, plain)                \
  HOOK(__tsan_unaligned_write##size, size, true, plain)                \
  HOOK(__tsan_volatile_read##size, size, false, is_volatile)           \
  HOOK(__tsan_volatile_write##size, size, true, is_volatile)           \
  HOOK(__tsan_unaligned_volatile_read##size, size, false, is_volatile) \
  HOOK(__tsan_unaligned_volatile_write##size, size, true, is_volatile)
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)

extern "C" {
void __tsan_read_range(void* address, size_t size) {
  emulation::look_at(address, size, false, emulation::Access::plain, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t size) {
  emulation::look_at(address, size, true, emulation::Access::plain, __builtin_return_address(0));
}
void __tsan_init() {
}
void __tsan_func_entry(void*) {
}
void __tsan_func_exit() {
}
void __tsan_vptr_update(void**, void*) {
}
void __tsan_vptr_read(void**) {
}
}

// Atomics of the host code, such as reference counts.
#define HOST_ATOMICS(bits, T)                                                                        \
  extern "C" T __tsan_atomic##bits##_load(const volatile T* p, int) {                                \
    return __atomic_load_n(p, 5);                                                                    \
  }                                                                                                  \
  extern "C" void __tsan_atomic##bits##_store(volatile T* p, T v, int) {                             \
    __atomic_store_n(p, v, 5);                                                                       \
  }                                                                                                  \
  extern "C" T __tsan_atomic##bits##_exchange(volatile T* p, T v, int) {                             \
    return __atomic_exchange_n(p, v, 5);                                                             \
  }                                                                                                  \
  extern "C" T __tsan_atomic##bits##_fetch_add(volatile T* p, T v, int) {                            \
    return __atomic_fetch_add(p, v, 5);                                                              \
  }                                                                                                  \
  extern "C" T __tsan_atomic##bits##_fetch_sub(volatile T* p, T v, int) {                            \
    return __atomic_fetch_sub(p, v, 5);                                                              \
  }                                                                                                  \
  extern "C" int __tsan_atomic##bits##_compare_exchange_strong(volatile T* p, T* e, T v, int, int) { \
    return __atomic_compare_exchange_n(p, e, v, false, 5, 5);                                        \
  }                                                                                                  \
  extern "C" int __tsan_atomic##bits##_compare_exchange_weak(volatile T* p, T* e, T v, int, int) {   \
    return __atomic_compare_exchange_n(p, e, v, true, 5, 5);                                         \
  }
HOST_ATOMICS(8, uint8_t)
HOST_ATOMICS(16, uint16_t)
HOST_ATOMICS(32, uint32_t)
HOST_ATOMICS(64, uint64_t)
extern "C" void __tsan_atomic_thread_fence(int) {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

// Fibers, the order in which they run, barriers and collectives.
//
// EMULATION_SCHEDULE: forward (default), reverse, fifo or random:SEED: which of the ready threads runs next. With random,
//     threads are also interrupted before accesses.
// EMULATION_BLOCKS: forward (default) or reverse.
#include "emulation.h"

#include <c10/util/Exception.h>
#include <torch/library.h>

#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// Stores the registers that a call must keep, and continues where another fiber stored its own.
extern "C" void switch_stack(void** save, void* load);
asm(R"(
.text
.globl switch_stack
.type switch_stack,@function
switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size switch_stack,.-switch_stack
)");

namespace emulation {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr int64_t kMostSharedBytes = 48 * 1024;
constexpr int kWords = kMostThreads / 64;

enum class State : uint8_t { ready, at_barrier, at_collective, done };
enum class Schedule { forward, reverse, fifo, random };

struct Thread {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  State state = State::done;
  Collective kind{};
  unsigned mask = 0;
  Bits value{}, result{};
  int parameter = 0;
  Site site{};
  uint32_t warp_epoch = 0;
};

// The state of the launch; there is one at a time.
std::mutex launch_mutex;
Thread threads[kMostThreads];
uint64_t ready[kWords];  // a bit for each thread
int waiting_lanes[kMostThreads / kWarpSize];  // in collectives
int num_threads = 0, num_done = 0, num_at_barrier = 0, current = 0;
void* scheduler_stack_pointer = nullptr;
const std::function<void()>* body = nullptr;
bool in_kernel = false;
std::string failure;  // ends the launch
uint32_t launch_serial = 0, block_index = 0, block_epoch = 0;
unsigned long block_serial = 0;
std::vector<std::unique_ptr<SharedMemory>> shared_memory;
char* dynamic_storage = nullptr;
int64_t num_shared_bytes = 0;
Schedule schedule = Schedule::forward;
uint64_t random_state = 1;
int last_run = 0;

std::map<std::string, Counters> counters_of_kernels;
Counters* own_counters = nullptr;

void fail(const std::string& why) {
  if (failure.empty()) {
    failure = why;
  }
}

std::string text_of(Site site) {
  const std::string file = site.file;
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
}

bool are_same(Site a, Site b) {
  return a.line == b.line && std::strcmp(a.file, b.file) == 0;
}

uint64_t next_random() {  // xorshift*
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state * 0x2545f4914f6cdd1dull;
}

void switch_to_scheduler() {
  switch_stack(&threads[current].stack_pointer, scheduler_stack_pointer);
}

void set_ready(int thread) {
  threads[thread].state = State::ready;
  ready[thread / 64] |= uint64_t{1} << thread % 64;
}

void fiber_main() {
  (*body)();
  threads[current].state = State::done;
  ++num_done;
  switch_to_scheduler();
  std::abort();
}

// An access that the processor refuses, after what the hooks have seen of it: ends the launch, so that both are reported.
void on_fault(int number, siginfo_t*, void* context) {
  if (!in_kernel) {
    signal(number, SIG_DFL);
    return;  // to the same instruction, which then ends the process
  }
  in_kernel = false;
  const auto place = static_cast<uintptr_t>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
  fail(
      "CRASH: an access that is misaligned or leads nowhere, by block " + std::to_string(block_index) + " thread " +
      std::to_string(current) + " at " + lines_at(place));
  switch_to_scheduler();
}

// Catches faults while it lives.
class FaultHandler {
 public:
  FaultHandler() {
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;  // the fiber never returns from the handler
    sigaction(SIGSEGV, &action, &segv_);
    sigaction(SIGBUS, &action, &bus_);
  }
  ~FaultHandler() {
    sigaction(SIGSEGV, &segv_, nullptr);
    sigaction(SIGBUS, &bus_, nullptr);
  }
  FaultHandler(const FaultHandler&) = delete;
  FaultHandler& operator=(const FaultHandler&) = delete;

 private:
  struct sigaction segv_, bus_;
};

int first_ready_from(int start) {  // cyclic; -1 for none
  for (int i = 0, word = start / 64; i <= kWords; ++i, word = (word + 1) % kWords) {
    const uint64_t bits = i == 0 ? ready[word] & ~uint64_t{0} << start % 64 : ready[word];
    if (bits) {
      return word * 64 + __builtin_ctzll(bits);
    }
  }
  return -1;
}

int last_ready() {
  for (int word = kWords - 1; word >= 0; --word) {
    if (ready[word]) {
      return word * 64 + 63 - __builtin_clzll(ready[word]);
    }
  }
  return -1;
}

int choose() {
  switch (schedule) {
    case Schedule::forward:
      return first_ready_from(0);
    case Schedule::reverse:
      return last_ready();
    case Schedule::fifo:
      return first_ready_from((last_run + 1) % kMostThreads);
    default:
      return first_ready_from(static_cast<int>(next_random() % num_threads));
  }
}

// Groups of threads and where each waits.
std::string where_threads_are() {
  static const char* const kNames[] = {"shfl_xor", "shfl_up", "shfl_down", "shfl", "any", "all", "ballot", "syncwarp"};
  std::map<std::string, std::vector<int>> groups;
  for (int i = 0; i < num_threads; ++i) {
    const Thread& thread = threads[i];
    std::string what = "ended";
    if (thread.state == State::at_barrier) {
      what = "at __syncthreads " + text_of(thread.site);
    } else if (thread.state == State::at_collective) {
      char mask[16];
      std::snprintf(mask, sizeof mask, "%08x", thread.mask);
      what =
          std::string("at ") + kNames[static_cast<int>(thread.kind)] + " of lanes " + mask + " " + text_of(thread.site);
    }
    groups[what].push_back(i);
  }
  std::string text;
  for (const auto& [what, members] : groups) {
    text +=
        "\n  " + std::to_string(members.size()) + " threads, the first is " + std::to_string(members[0]) + ", " + what;
  }
  return text;
}

void release_barrier() {
  for (int i = 1; i < num_threads; ++i) {
    if (!are_same(threads[i].site, threads[0].site)) {
      return fail("DIVERGENCE: threads of one block meet at different barriers:" + where_threads_are());
    }
  }
  ++own_counters->barriers;
  ++block_epoch;
  num_at_barrier = 0;
  for (int i = 0; i < num_threads; ++i) {
    set_ready(i);
  }
}

void make_fiber(int number) {
  Thread& thread = threads[number];
  if (!thread.stack) {
    void* memory =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    TORCH_CHECK(memory != MAP_FAILED, "emulation: no memory for the stack of a thread");
    thread.stack = static_cast<char*>(memory);
  }
  // staggered, so that the stacks do not compete for the same lines of the cache
  void** top = reinterpret_cast<void**>(thread.stack + kStackBytes - number * 5 % 61 * 64);
  *--top = nullptr;  // keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(&fiber_main);  // where switch_stack returns to
  for (int i = 0; i < 6; ++i) {
    *--top = nullptr;  // its registers
  }
  thread.stack_pointer = top;
  thread.warp_epoch = 0;
  set_ready(number);
}

void run_block() {
  std::fill(std::begin(ready), std::end(ready), 0);
  std::fill(std::begin(waiting_lanes), std::end(waiting_lanes), 0);
  num_done = num_at_barrier = 0;
  block_epoch = 0;
  ++block_serial;
  last_run = num_threads - 1;
  for (int i = 0; i < num_threads; ++i) {
    make_fiber(i);
  }
  while (num_done < num_threads && failure.empty()) {
    const int next = choose();
    if (next < 0) {
      fail("DIVERGENCE: threads wait for others that do not come:" + where_threads_are());
      break;
    }
    ready[next / 64] &= ~(uint64_t{1} << next % 64);
    last_run = current = next;
    threadIdx = {static_cast<unsigned>(next), 0, 0};
    switch_stack(&scheduler_stack_pointer, threads[next].stack_pointer);
    if (num_at_barrier == num_threads) {
      release_barrier();
    }
  }
  shared_memory.clear();
  dynamic_storage = nullptr;
}

const char* environment(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value && *value ? value : otherwise;
}

void read_schedule() {
  const std::string order = environment("EMULATION_SCHEDULE", "forward");
  if (order.rfind("random:", 0) == 0) {
    schedule = Schedule::random;
    random_state = 0x9e3779b97f4a7c15ull * (std::strtoull(order.c_str() + 7, nullptr, 10) * 2 + 1) + launch_serial;
    return;
  }
  const std::map<std::string, Schedule> known{
      {"forward", Schedule::forward}, {"reverse", Schedule::reverse}, {"fifo", Schedule::fifo}};
  TORCH_CHECK(known.count(order), "EMULATION_SCHEDULE=", order, ": expected forward, reverse, fifo or random:SEED");
  schedule = known.at(order);
}

// Whether all lanes of the mask have made the call that this thread makes.
bool is_complete(unsigned mask, Collective kind, Site site) {
  const int first = current - current % kWarpSize;
  if (waiting_lanes[current / kWarpSize] < __builtin_popcount(mask)) {
    return false;
  }
  for (int i = 0; i < kWarpSize; ++i) {
    const Thread& other = threads[first + i];
    if (mask >> i & 1 &&
        !(first + i < num_threads && other.state == State::at_collective && other.kind == kind && other.mask == mask &&
          are_same(other.site, site))) {
      return false;
    }
  }
  return true;
}

// The lane whose value a lane gets.
int source_of(int lane, Collective kind, int parameter) {
  switch (kind) {
    case Collective::shuffle_xor:
      return lane ^ parameter;
    case Collective::shuffle_up:
      return lane < parameter ? lane : lane - parameter;
    case Collective::shuffle_down:
      return lane + parameter >= kWarpSize ? lane : lane + parameter;
    default:
      return parameter % kWarpSize;
  }
}

// Gives every lane of a complete collective its result and lets it go on.
void complete(unsigned mask, Collective kind, Site site) {
  const int first = current - current % kWarpSize;
  waiting_lanes[current / kWarpSize] -= __builtin_popcount(mask);
  unsigned votes = 0;
  for (int i = 0; i < kWarpSize; ++i) {
    votes |= (mask >> i & 1 && static_cast<unsigned>(threads[first + i].value.words[0]) ? 1u : 0u) << i;
  }
  for (int i = 0; i < kWarpSize; ++i) {
    if (!(mask >> i & 1)) {
      continue;
    }
    Thread& lane = threads[first + i];
    lane.result = {};
    if (kind == Collective::any || kind == Collective::all) {
      lane.result.words[0] = kind == Collective::any ? votes != 0 : votes == mask;
    } else if (kind == Collective::ballot) {
      lane.result.words[0] = votes;
    } else if (kind == Collective::sync) {
      ++lane.warp_epoch;
    } else {
      const int source = source_of(i, kind, lane.parameter);
      if (source < 0 || source >= kWarpSize || !(mask >> source & 1)) {
        fail("DIVERGENCE: a shuffle reads a lane that takes no part: " + text_of(site));
      } else {
        lane.result = threads[first + source].value;
      }
    }
    set_ready(first + i);
  }
}

}  // namespace

Position position() {
  return {launch_serial, block_index, block_epoch, threads[current].warp_epoch, static_cast<uint16_t>(current)};
}

bool is_on_stack(uintptr_t address) {
  return address - reinterpret_cast<uintptr_t>(threads[current].stack) < kStackBytes;
}

bool is_in_kernel() {
  return in_kernel;
}

void maybe_pause(int one_in) {
  if (schedule == Schedule::random && next_random() % one_in == 0) {
    set_ready(current);
    switch_to_scheduler();
  }
}

Counters& counters() {
  return *own_counters;
}

void* SharedVariable::get() {
  if (block != block_serial) {
    block = block_serial;
    in_kernel = false;  // the allocation is not the kernel's
    shared_memory.push_back(std::make_unique<SharedMemory>(size, std::string("shared ") + name));
    in_kernel = true;
    storage = shared_memory.back()->begin();
    num_shared_bytes += static_cast<int64_t>(size);
    if (num_shared_bytes > kMostSharedBytes) {
      fail("BAD LAUNCH: " + std::to_string(num_shared_bytes) + " bytes of shared memory: expected at most 48 KiB");
    }
  }
  return storage;
}

void* dynamic_shared_memory() {
  return dynamic_storage;
}

void sync_threads(Site site) {
  threads[current].site = site;
  threads[current].state = State::at_barrier;
  ++num_at_barrier;
  switch_to_scheduler();
}

Bits collective(Collective kind, unsigned mask, Bits value, int parameter, Site site) {
  Thread& self = threads[current];
  ++own_counters->collectives;
  if (!(mask >> current % kWarpSize & 1)) {
    fail("DIVERGENCE: a lane makes a call whose mask leaves it out: " + text_of(site));
  }
  self.kind = kind;
  self.mask = mask;
  self.value = value;
  self.parameter = parameter;
  self.site = site;
  self.state = State::at_collective;
  ++waiting_lanes[current / kWarpSize];
  if (is_complete(mask, kind, site)) {
    complete(mask, kind, site);
  }
  switch_to_scheduler();
  return threads[current].result;
}

void run_blocks(
    const char* name, int max_threads, int64_t num_blocks, int64_t block_size, int64_t shared_bytes,
    const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  const int64_t most_threads = max_threads ? max_threads : kMostThreads;
  TORCH_CHECK(num_blocks >= 1 && num_blocks < int64_t{1} << 31, "BAD LAUNCH: ", name, " of ", num_blocks, " blocks");
  TORCH_CHECK(
      block_size >= 1 && block_size <= most_threads, "BAD LAUNCH: ", name, ": blocks of ", block_size,
      " threads: expected 1 to ", most_threads);
  TORCH_CHECK(
      shared_bytes >= 0 && shared_bytes <= kMostSharedBytes, "BAD LAUNCH: ", name, ": ", shared_bytes,
      " bytes of dynamic shared memory: expected at most 48 KiB");
  const std::string order = environment("EMULATION_BLOCKS", "forward");
  TORCH_CHECK(order == "forward" || order == "reverse", "EMULATION_BLOCKS=", order, ": expected forward or reverse");
  ++launch_serial;
  read_schedule();
  own_counters = &counters_of_kernels[name];
  ++own_counters->launches;
  own_counters->threads += num_blocks * block_size;
  body = &thread;
  num_threads = static_cast<int>(block_size);
  blockDim = {static_cast<unsigned>(block_size), 1, 1};
  gridDim = {static_cast<unsigned>(num_blocks), 1, 1};
  failure.clear();
  const FaultHandler handler;
  for (int64_t i = 0; i < num_blocks && failure.empty(); ++i) {
    block_index = static_cast<uint32_t>(order == "reverse" ? num_blocks - 1 - i : i);
    blockIdx = {block_index, 0, 0};
    shared_memory.push_back(std::make_unique<SharedMemory>(shared_bytes, "dynamic shared memory"));
    dynamic_storage = shared_memory.back()->begin();
    num_shared_bytes = shared_bytes;
    in_kernel = true;
    run_block();
    in_kernel = false;
  }
  const std::string found = take_findings(name) + (failure.empty() ? "" : "\n" + failure + "\n  in " + name);
  TORCH_CHECK(found.empty(), "emulation of CUDA found:", found);
}

float ex2_approx_ftz(float x) {
  const float result = ::exp2f(std::fabs(x) < 0x1p-126f ? 0.0f : x);
  return std::fabs(result) < 0x1p-126f ? 0.0f : result;
}

namespace {

// Name and counters of every kernel that has run, as Counters has them in order.
std::tuple<std::vector<std::string>, std::vector<std::vector<int64_t>>> count() {
  std::tuple<std::vector<std::string>, std::vector<std::vector<int64_t>>> result;
  for (const auto& [name, c] : counters_of_kernels) {
    std::get<0>(result).push_back(name);
    std::vector<int64_t> values;
    for (const uint64_t value :
         {c.launches, c.threads, c.barriers, c.collectives, c.atomics, c.accesses, c.global_read, c.global_written,
          c.unique_read, c.unique_written}) {
      values.push_back(static_cast<int64_t>(value));
    }
    std::get<1>(result).push_back(values);
  }
  return result;
}

void reset() {
  counters_of_kernels.clear();
}

}  // namespace
}  // namespace emulation

TORCH_LIBRARY_FRAGMENT(emulation, m) {
  m.def("count() -> (str[], int[][])", emulation::count);
  m.def("reset() -> ()", emulation::reset);
}

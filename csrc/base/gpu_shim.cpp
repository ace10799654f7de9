#include "base/gpu_shim.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

#include "base/gpu_status.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the callee-saved registers and the stack pointer, and continues on another stack: about 30
// times cheaper than swapcontext, which asks the kernel for the signal mask twice.
extern "C" void effinfer_shim_switch(void** save, void* load);
asm(R"(
.text
.type effinfer_shim_switch, @function
effinfer_shim_switch:
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
.size effinfer_shim_switch, .-effinfer_shim_switch
)");

namespace effinfer::gpu::shim {

Index thread_index, block_index, block_size, grid_size;
unsigned char* shared_memory;

namespace {

constexpr int kWarpSize = 32, kMaxThreads = 1024;
constexpr size_t kStackBytes = 128 * 1024, kGuardBytes = 4096;

enum class State { ready, at_block, at_warp, done };

struct Fiber {
  void* stack_pointer = nullptr;
  State state = State::done;
  Site site = {};
  unsigned exchanges = 0;  // parity picks the buffer, so that one wait per exchange is enough
  alignas(16) unsigned char given[2][kExchangeBytes];
};

// One launch at a time: CUDA's index variables are globals here.
std::mutex g_launch;
thread_local std::string t_error;
bool g_reverse = false;

std::vector<Fiber> g_fibers;
unsigned char* g_stacks = nullptr;
void* g_scheduler_stack_pointer;
int g_current, g_threads;
void (*g_body)(void*);
void* g_context;

unsigned char* stack_of(int fiber) {
  return g_stacks + static_cast<size_t>(fiber) * (kStackBytes + kGuardBytes) + kGuardBytes;
}

// Every stack has a guard page below it; untouched stacks cost address space only.
bool allocate_stacks() {
  if (g_stacks != nullptr) return true;
  const size_t bytes = (kStackBytes + kGuardBytes) * kMaxThreads;
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return false;
  g_stacks = static_cast<unsigned char*>(memory);
  for (int i = 0; i < kMaxThreads; ++i) mprotect(stack_of(i) - kGuardBytes, kGuardBytes, PROT_NONE);
  g_fibers.resize(kMaxThreads);
  return true;
}

#if defined(__SANITIZE_ADDRESS__)
const void* g_scheduler_stack;
size_t g_scheduler_stack_bytes;
void before_switch(void** fake_stack, const void* stack, size_t bytes) {
  __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
}
void after_switch_to_fiber() {
  __sanitizer_finish_switch_fiber(nullptr, &g_scheduler_stack, &g_scheduler_stack_bytes);
}
void after_switch_to_scheduler(void* fake_stack) {
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}
void forget_frames(int fiber) { ASAN_UNPOISON_MEMORY_REGION(stack_of(fiber), kStackBytes); }
#else
constexpr const void* g_scheduler_stack = nullptr;
constexpr size_t g_scheduler_stack_bytes = 0;
void before_switch(void**, const void*, size_t) {}
void after_switch_to_fiber() {}
void after_switch_to_scheduler(void*) {}
void forget_frames(int) {}
#endif

void to_scheduler() {
  Fiber& fiber = g_fibers[g_current];
  void* fake_stack = nullptr;
  before_switch(&fake_stack, g_scheduler_stack, g_scheduler_stack_bytes);
  effinfer_shim_switch(&fiber.stack_pointer, g_scheduler_stack_pointer);
  after_switch_to_fiber();
}

void fiber_main() {
  after_switch_to_fiber();
  g_body(g_context);
  g_fibers[g_current].state = State::done;
  to_scheduler();
  std::abort();  // a finished fiber is never resumed
}

void prepare(int i) {
  forget_frames(i);
  // As after a call of effinfer_shim_switch: six registers, then the address to return to. It
  // starts fiber_main with the stack aligned as a call would leave it.
  void** top = reinterpret_cast<void**>(stack_of(i) + kStackBytes);
  std::memset(top - 8, 0, 8 * sizeof(void*));
  top[-2] = reinterpret_cast<void*>(&fiber_main);
  Fiber& fiber = g_fibers[i];
  fiber.stack_pointer = top - 8;
  fiber.state = State::ready;
  fiber.exchanges = 0;
}

void resume(int i) {
  g_current = i;
  thread_index.x = static_cast<unsigned>(i);
  void* fake_stack = nullptr;
  before_switch(&fake_stack, stack_of(i), kStackBytes);
  effinfer_shim_switch(&g_scheduler_stack_pointer, g_fibers[i].stack_pointer);
  after_switch_to_scheduler(fake_stack);
}

void wait(State state, Site site) {
  Fiber& fiber = g_fibers[g_current];
  fiber.state = state;
  fiber.site = site;
  to_scheduler();
}

bool same_place(const Fiber& a, const Fiber& b) {
  return a.state == b.state && a.site.line == b.site.line &&
         std::strcmp(a.site.file, b.site.file) == 0;
}

// Lets threads [begin, end) go on when all that are alive wait at the same place in `state`.
bool release(int begin, int end, State state, bool exited_count) {
  const Fiber* first = nullptr;
  for (int i = begin; i < end; ++i) {
    const Fiber& fiber = g_fibers[i];
    if (fiber.state == State::done && !exited_count) continue;
    if (first == nullptr) first = &fiber;
    if (fiber.state != state || !same_place(fiber, *first)) return false;
  }
  if (first == nullptr) return false;
  for (int i = begin; i < end; ++i)
    if (g_fibers[i].state != State::done) g_fibers[i].state = State::ready;
  return true;
}

void run_warp(int begin, int end) {
  do {
    for (int k = begin; k < end; ++k) {
      const int i = g_reverse ? begin + end - 1 - k : k;
      if (g_fibers[i].state == State::ready) resume(i);
    }
    // A shuffle needs all 32 lanes: one that has exited would be read as garbage on a GPU.
  } while (release(begin, end, State::at_warp, true));
}

std::string place(int i) {
  const Fiber& fiber = g_fibers[i];
  std::string text = "thread " + std::to_string(i) + " ";
  if (fiber.state == State::done) return text + "has exited";
  text += fiber.state == State::at_block ? "waits for the block at " : "waits for its warp at ";
  return text + fiber.site.file + ":" + std::to_string(fiber.site.line);
}

int fail_deadlock() {
  int first = 0;
  while (g_fibers[first].state == State::done) ++first;
  int other = 0;
  while (other + 1 < g_threads && same_place(g_fibers[first], g_fibers[other])) ++other;
  t_error = "divergent barrier in block (" + std::to_string(block_index.x) + ", " +
            std::to_string(block_index.y) + ", " + std::to_string(block_index.z) +
            "): " + place(first) + ", " + place(other);
  return kLaunchFailure;
}

int run_block() {
  for (int i = 0; i < g_threads; ++i) prepare(i);
  const int warps = g_threads / kWarpSize;
  do {
    for (int k = 0; k < warps; ++k) {
      const int w = g_reverse ? warps - 1 - k : k;
      run_warp(w * kWarpSize, (w + 1) * kWarpSize);
    }
  } while (release(0, g_threads, State::at_block, false));
  for (int i = 0; i < g_threads; ++i)
    if (g_fibers[i].state != State::done) return fail_deadlock();
  return kSuccess;
}

}  // namespace

void wait_block(Site site) { wait(State::at_block, site); }
void wait_warp(Site site) { wait(State::at_warp, site); }

void exchange(const void* mine, size_t bytes, Site site) {
  Fiber& fiber = g_fibers[g_current];
  std::memcpy(fiber.given[++fiber.exchanges % 2], mine, bytes);
  wait(State::at_warp, site);
}

const void* exchanged(int lane) {
  const unsigned parity = g_fibers[g_current].exchanges % 2;
  return g_fibers[g_current / kWarpSize * kWarpSize + lane].given[parity];
}

const char* last_error() { return t_error.c_str(); }

void set_reverse(bool reverse) { g_reverse = reverse; }

int run(dim3 grid, int threads, size_t shared_bytes, void (*body)(void*), void* ctx) {
  constexpr size_t kSharedLimit = 99 * 1024;  // of the smallest target, sm_120
  if (threads <= 0 || threads > kMaxThreads || threads % kWarpSize != 0 ||
      shared_bytes > kSharedLimit || grid.y > 65535 || grid.z > 65535) {
    t_error = "launch of " + std::to_string(threads) + " threads with " +
              std::to_string(shared_bytes) + " bytes of shared memory: out of bounds";
    return kInvalidConfiguration;
  }
  const std::lock_guard lock(g_launch);
  if (!allocate_stacks()) {
    t_error = "no memory for the stacks";
    return kLaunchFailure;
  }
  // Exactly as large as asked for, so that AddressSanitizer sees an access beyond it.
  std::vector<unsigned char> shared(shared_bytes);
  shared_memory = shared.data();
  g_threads = threads;
  g_body = body;
  g_context = ctx;
  grid_size = {grid.x, grid.y, grid.z};
  block_size = {static_cast<unsigned>(threads), 1, 1};
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        block_index = {x, y, z};
        // NaN in every float: what a block has not written, it must not use.
        if (shared_bytes > 0) std::memset(shared.data(), 0xff, shared_bytes);
        if (const int status = run_block(); status != kSuccess) return status;
      }
  return kSuccess;
}

}  // namespace effinfer::gpu::shim

namespace effinfer::gpu {

const char* status_text(int) { return shim::last_error(); }
DeviceGuard::DeviceGuard(int) {}
DeviceGuard::~DeviceGuard() = default;

}  // namespace effinfer::gpu

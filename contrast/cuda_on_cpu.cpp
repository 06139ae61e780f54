// What CUDA C needs to run as C++ on a CPU: a block is as many threads, blocks run one by one.
// The kernel is compiled with -fsanitize=thread and without that sanitizer's library: the compiler then
// calls __tsan_read4(address) and its kin before every access of memory, and here they write a log.
#include <barrier>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <utility>
#include <vector>

#include "cuda_on_cpu.h"

thread_local Index3 threadIdx, blockIdx;
Index3 blockDim, gridDim;

namespace {
struct Access { int64_t block, thread, instruction, address, size, write; };
std::vector<Access> kept;
thread_local std::vector<Access>* log_of_thread = nullptr;
thread_local int64_t block_of_thread, thread_of_block;
std::barrier<>* waiting = nullptr;

void note(void* address, int64_t size, int64_t write, void* instruction) {
  if (log_of_thread)
    log_of_thread->push_back({block_of_thread, thread_of_block, (int64_t)instruction,
                              (int64_t)address, size, write});
}
}  // namespace

void __syncthreads() { waiting->arrive_and_wait(); }

#define SEEN(n)                                                                              \
  void __tsan_read##n(void* a) { note(a, n, 0, __builtin_return_address(0)); }               \
  void __tsan_write##n(void* a) { note(a, n, 1, __builtin_return_address(0)); }              \
  void __tsan_unaligned_read##n(void* a) { note(a, n, 0, __builtin_return_address(0)); }     \
  void __tsan_unaligned_write##n(void* a) { note(a, n, 1, __builtin_return_address(0)); }
extern "C" {
SEEN(1) SEEN(2) SEEN(4) SEEN(8) SEEN(16)
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

extern char __start_shared_memory[] __attribute__((weak));
extern char __stop_shared_memory[] __attribute__((weak));

// Runs `one` for every thread of every block; the number of accesses that were logged.
int64_t run(void (*one)(void**), void** arguments, const unsigned* grid, const unsigned* block) {
  kept.clear();
  gridDim = {grid[0], grid[1], grid[2]};
  blockDim = {block[0], block[1], block[2]};
  const unsigned threads = block[0] * block[1] * block[2];
  for (unsigned b = 0; b < grid[0] * grid[1] * grid[2]; ++b) {
    std::barrier<> all(threads);
    waiting = &all;
    std::vector<std::vector<Access>> logs(threads);
    std::vector<std::thread> running;
    for (unsigned t = 0; t < threads; ++t)
      running.emplace_back([&, t] {
        blockIdx = {b % grid[0], b / grid[0] % grid[1], b / grid[0] / grid[1]};
        threadIdx = {t % block[0], t / block[0] % block[1], t / block[0] / block[1]};
        block_of_thread = b, thread_of_block = t;
        log_of_thread = &logs[t];
        one(arguments);
        log_of_thread = nullptr;
        all.arrive_and_drop();
      });
    for (auto& thread : running) thread.join();
    for (auto& log : logs) kept.insert(kept.end(), log.begin(), log.end());
  }
  return (int64_t)kept.size();
}
const void* accesses() { return kept.data(); }
int64_t shared_begins() { return (int64_t)__start_shared_memory; }
int64_t shared_ends() { return (int64_t)__stop_shared_memory; }
}

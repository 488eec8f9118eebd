#include "threads.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <sched.h>
#include <thread>
#include <unistd.h>
#include <vector>

#if defined(__x86_64__)
#define PAUSE() __builtin_ia32_pause()
#else
#define PAUSE() std::this_thread::yield()
#endif

namespace {

struct Pool {
  std::mutex call; // one parallel_for at a time
  std::mutex mutex;
  std::condition_variable wake;
  std::vector<std::thread> workers;
  std::atomic<uint64_t> epoch{0};
  std::atomic<int64_t> next{0};
  std::atomic<int> busy{0};
  std::atomic<bool> quit{false};
  void (*fn)(void *, int64_t) = nullptr;
  void *ctx = nullptr;
  int64_t n = 0;
  int pid = 0;

  void work() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) fn(ctx, i);
  }
  void loop() {
    uint64_t seen = 0;
    for (;;) {
      for (int spin = 0; spin < 4000 && epoch.load(std::memory_order_acquire) == seen; ++spin) PAUSE();
      if (epoch.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex);
        wake.wait(lock, [&] { return epoch.load(std::memory_order_acquire) != seen; });
      }
      seen = epoch.load(std::memory_order_acquire);
      if (quit.load()) return;
      work();
      busy.fetch_sub(1, std::memory_order_release);
    }
  }
  void start(int n_workers) {
    pid = getpid();
    quit = false;
    epoch = 0;
    for (int i = 0; i < n_workers; ++i) workers.emplace_back([this] { loop(); });
  }
  void stop() {
    quit = true;
    publish();
    for (auto &w : workers) w.join();
    workers.clear();
  }
  void publish() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      epoch.fetch_add(1, std::memory_order_release);
    }
    wake.notify_all();
  }
};

int affinity_count() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
  return (int)std::thread::hardware_concurrency();
}

Pool *pool = new Pool; // never destroyed: workers may outlive static destruction
int wanted = 0;
thread_local bool inside = false;

} // namespace

int thread_count() { return wanted > 0 ? wanted : (wanted = affinity_count()); }

void set_thread_count(int n) {
  std::lock_guard<std::mutex> lock(pool->call);
  if (pool->pid == getpid()) pool->stop();
  pool->pid = 0;
  wanted = n;
}

void parallel_for(int64_t n, void (*fn)(void *, int64_t), void *ctx) {
  if (n <= 1 || inside || thread_count() == 1) {
    for (int64_t i = 0; i < n; ++i) fn(ctx, i);
    return;
  }
  if (pool->pid != 0 && pool->pid != getpid()) pool = new Pool; // after a fork the workers are gone
  std::lock_guard<std::mutex> call(pool->call);
  if (pool->pid == 0) pool->start(thread_count() - 1);
  Pool &p = *pool;
  p.fn = fn, p.ctx = ctx, p.n = n;
  p.next.store(0, std::memory_order_relaxed);
  p.busy.store((int)p.workers.size(), std::memory_order_relaxed);
  p.publish();
  inside = true;
  p.work();
  inside = false;
  // A worker may be waiting for this very core: give it up when the end is not in sight.
  for (int spin = 0; p.busy.load(std::memory_order_acquire) != 0; ++spin) spin < 2000 ? PAUSE() : (void)sched_yield();
}

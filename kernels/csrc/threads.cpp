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

constexpr int kSpins =
    40000; // about a millisecond: longer than what Python does between two steps of a model

// `ticket` holds (job number, tasks left): a thread claims a task by lowering it, and nothing can be claimed
// between jobs, when the fields change. The caller waits for claimed tasks only, never for a worker that has
// not come: on a busy machine it works alone.
struct Pool {
  std::mutex call; // one parallel_for at a time
  std::mutex mutex;
  std::condition_variable wake;
  std::vector<std::thread> workers;
  std::atomic<uint64_t> ticket{0};
  std::atomic<int64_t> done{0};
  std::atomic<bool> quit{false};
  std::atomic<void (*)(void *, int64_t)> fn{nullptr};
  std::atomic<void *> ctx{nullptr};
  std::atomic<int> sleepers{0};
  int pid = 0;

  bool idle() const { return (ticket.load(std::memory_order_seq_cst) & 0xffffffffu) == 0; }
  void work() {
    for (;;) {
      uint64_t seen = ticket.load(std::memory_order_acquire);
      const int64_t left = seen & 0xffffffffu;
      if (left == 0) return;
      const auto task = fn.load(std::memory_order_relaxed);
      void *const data = ctx.load(std::memory_order_relaxed);
      if (!ticket.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel)) continue;
      task(data, left - 1);
      done.fetch_add(1, std::memory_order_release);
    }
  }
  void loop() {
    for (;;) {
      for (int spin = 0; spin < kSpins && idle() && !quit; ++spin) PAUSE();
      if (idle() && !quit) {
        std::unique_lock<std::mutex> lock(mutex);
        sleepers.fetch_add(1);
        wake.wait(lock, [&] { return !idle() || quit; });
        sleepers.fetch_sub(1);
      }
      if (quit) return;
      work();
    }
  }
  void start(int n_workers) {
    pid = getpid();
    quit = false;
    for (int i = 0; i < n_workers; ++i) workers.emplace_back([this] { loop(); });
  }
  void stop() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      quit = true;
    }
    wake.notify_all();
    for (auto &w : workers) w.join();
    workers.clear();
  }
  void run(int64_t tasks, void (*f)(void *, int64_t), void *data) {
    fn.store(f, std::memory_order_relaxed), ctx.store(data, std::memory_order_relaxed);
    done.store(0, std::memory_order_relaxed);
    const uint64_t job = (ticket.load(std::memory_order_relaxed) >> 32) + 1;
    ticket.store(job << 32 | (uint64_t)tasks, std::memory_order_seq_cst);
    if (sleepers.load(std::memory_order_seq_cst)) {
      {
        std::lock_guard<std::mutex> lock(mutex);
      } // a worker on its way to sleep has seen the job, or sleeps already
      wake.notify_all();
    }
    work();
    // A worker may be waiting for this very core: give it up when the end is not in sight.
    for (int spin = 0; done.load(std::memory_order_acquire) != tasks; ++spin)
      spin < 2000 ? PAUSE() : (void)sched_yield();
  }
};

int affinity_count() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  return (int)std::thread::hardware_concurrency();
}

Pool *pool = new Pool; // never destroyed: workers may outlive static destruction
int wanted = 0;
thread_local bool inside = false;

} // namespace

int thread_count() {
  return wanted > 0 ? wanted : (wanted = affinity_count());
}

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
  inside = true;
  pool->run(n, fn, ctx);
  inside = false;
}

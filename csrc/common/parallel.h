// Runs a CpuKernel on the thread pool that XLA lends to a handler.

#ifndef JKA_COMMON_PARALLEL_H_
#define JKA_COMMON_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <thread>
#include <utility>

#include "common/cpu.h"
#include "xla/ffi/api/ffi.h"

namespace knn {

inline xla::ffi::Future Ready(xla::ffi::Error error = xla::ffi::Error::Success()) {
  xla::ffi::Promise promise;
  xla::ffi::Future future(promise);
  if (error.success()) {
    promise.SetAvailable();
  } else {
    promise.SetError(std::move(error));
  }
  return future;
}

template <class Args>
class Job {
 public:
  Job(const CpuKernel<Args>& kernel, const Args& args) : kernel_(kernel), args_(args) {
    for (int i = 0; i < kMaxPhases; ++i) {
      tasks_[i] = kernel.phases[i].run == nullptr ? 0 : kernel.phases[i].tasks(args);
    }
  }
  ~Job() { std::free(scratch_); }
  Job(const Job&) = delete;
  Job& operator=(const Job&) = delete;

  bool Allocate() {
    const int64_t bytes = kernel_.scratch_bytes == nullptr ? 0 : kernel_.scratch_bytes(args_);
    if (bytes > 0) scratch_ = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    return bytes == 0 || scratch_ != nullptr;
  }

  int64_t MostTasks() const { return *std::max_element(tasks_, tasks_ + kMaxPhases); }

  // Every worker runs this. A worker that finds a phase's tasks all taken waits for those still running on other
  // threads; it never waits for a worker that has not started, so this cannot deadlock however few threads there are.
  void Work() {
    for (int i = 0; i < kMaxPhases; ++i) {
      int64_t task;
      while ((task = next_[i].fetch_add(1, std::memory_order_relaxed)) < tasks_[i]) {
        kernel_.phases[i].run(args_, scratch_, task);
        done_[i].fetch_add(1, std::memory_order_release);
      }
      while (done_[i].load(std::memory_order_acquire) < tasks_[i]) std::this_thread::yield();
    }
  }

 private:
  const CpuKernel<Args> kernel_;
  const Args args_;
  void* scratch_ = nullptr;
  int64_t tasks_[kMaxPhases];
  std::atomic<int64_t> next_[kMaxPhases] = {};
  std::atomic<int64_t> done_[kMaxPhases] = {};
};

// All workers are scheduled before this returns: a handler's pool must not be used after the handler has returned.
template <class Args>
xla::ffi::Future Run(xla::ffi::ThreadPool& pool, const CpuKernel<Args>& kernel, const Args& args) {
  auto job = std::make_shared<Job<Args>>(kernel, args);
  if (!job->Allocate()) {
    return Ready(xla::ffi::Error(xla::ffi::ErrorCode::kResourceExhausted, "out of memory for scratch space"));
  }
  const int64_t workers = std::min(pool.num_threads(), job->MostTasks());
  if (workers <= 1) {
    job->Work();
    return Ready();
  }
  xla::ffi::CountDownPromise finished(workers);
  xla::ffi::Future future(finished);
  for (int64_t i = 0; i < workers; ++i) {
    pool.Schedule([job, finished]() mutable {
      job->Work();
      finished.CountDown();
    });
  }
  return future;
}

}  // namespace knn

#endif  // JKA_COMMON_PARALLEL_H_

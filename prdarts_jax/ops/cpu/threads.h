// Parts of a batch on the threads of XLA's own pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace prdarts {

namespace ffi = xla::ffi;

// The images of a part do not depend on the number of threads, so neither do the sums over parts.
constexpr int64_t kMaxParts = 32;
inline int64_t parts_of(int64_t batch) { return batch < kMaxParts ? batch : kMaxParts; }

// work(part) for every part. The caller takes parts too, and waits only for those that another thread has begun:
// kernels that run at the same time on all threads of the pool cannot wait for each other's queued work.
template <typename Work>
void for_parts(ffi::ThreadPool& pool, int64_t parts, Work work) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto shared = std::make_shared<Shared>();
  Work* todo = &work;  // touched only by a thread that holds a part, for which the caller waits
  auto take = [shared, todo, parts] {
    for (int64_t part; (part = shared->next.fetch_add(1)) < parts;) {
      (*todo)(part);
      shared->done.fetch_add(1, std::memory_order_release);
    }
  };
  int64_t helpers = std::min<int64_t>(pool.num_threads(), parts) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(std::function<void()>(take));
  take();
  for (int64_t turn = 0; shared->done.load(std::memory_order_acquire) < parts; ++turn) {
    if (turn > 4096) std::this_thread::yield();
  }
}

// The images [first, last) of a part.
struct Range {
  int64_t first, last;
};
inline Range images_of(int64_t part, int64_t parts, int64_t batch) {
  return {part * batch / parts, (part + 1) * batch / parts};
}

}  // namespace prdarts

// Backend hooks that are linked into every compiled CPU library: parallel loops on OpenMP and a pool of workspace blocks.
//
// TVM's code generator calls these hooks through four function pointers, which it defines as weak null pointers and
// leaves to libtvm_runtime to fill in. The strong definitions at the end of this file take their place, so that a
// library needs nothing but libtvm_ffi (and the OpenMP runtime) to load and run.
//
// They are hidden: TVM's loader overwrites the pointers of every library that exports them as soon as libtvm_runtime is
// in the process (`import tvm`), and the library would silently move from OpenMP to TVM's own thread pool.
//
// Compiled without OpenMP and exceptions, loops run in the calling thread, and nothing but the C library is needed.

#ifdef _OPENMP
#include <omp.h>
#endif
#include <sys/mman.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>

// Part of the C interface of libtvm_ffi. Weak, because a host without it (a plain C program that stubs the one function
// that kernels call) must be able to load a library too.
extern "C" {
__attribute__((weak)) void TVMFFIErrorMoveFromRaised(void** result);
__attribute__((weak)) void TVMFFIErrorSetRaised(void* error);
__attribute__((weak)) void TVMFFIErrorSetRaisedFromCStr(const char* kind, const char* message);
__attribute__((weak)) int TVMFFIObjectDecRef(void* object);
}

namespace {

// Both types have the layout that TVM's code generator expects.
struct ParallelGroup {
  void* sync_handle;
  std::int32_t num_task;
};
using ParallelTask = int (*)(int task_id, ParallelGroup* group, void* data);

// ---------------------------------------------------------------------------------------------------------------------
// Parallel loops

#ifdef _OPENMP

int RunTask(ParallelTask task, int task_id, int num_task, void* data) noexcept {
  ParallelGroup group{nullptr, num_task};
  try {
    return task(task_id, &group, data);
  } catch (...) {  // must not leave an OpenMP region
    return -1;
  }
}

// An error is raised in storage of the thread that meets it, and the caller looks into its own. This takes the error of
// the calling thread along, to be raised again by Raise() in the thread that launched the loop.
void* TakeError() {
  void* error = nullptr;
  if (TVMFFIErrorMoveFromRaised != nullptr) TVMFFIErrorMoveFromRaised(&error);
  return error;
}

void DropError(void* error) {
  if (error != nullptr && TVMFFIObjectDecRef != nullptr) TVMFFIObjectDecRef(error);
}

void Raise(void* error) {
  if (error != nullptr && TVMFFIErrorSetRaised != nullptr) {
    TVMFFIErrorSetRaised(error);  // takes a reference of its own
    DropError(error);
  } else if (TVMFFIErrorSetRaisedFromCStr != nullptr) {
    TVMFFIErrorSetRaisedFromCStr("RuntimeError", "A task of a parallel loop failed without a message.");
  }
}

// A loop is cut into this many pieces for each thread, and a thread that has finished its own takes those of others: where
// another program holds up one core, the others do more.
constexpr int kPiecesPerThread = 16;

// Hands out the tasks of one loop. Each thread has a range of its own, the same one in every loop of this length, so that
// it finds in its cache what it worked on in the loop before; when it is through it takes tasks of others.
class Tasks {
 public:
  Tasks(int count, int threads) : count_(count), ranges_(threads < kMostRanges ? threads : kMostRanges) {
    for (int range = 0; range < ranges_; ++range) next_[range].store(Begin(range));
  }

  // The next task for a thread, or -1 if there is none left.
  int Take(int thread) {
    for (int other = 0; other < ranges_; ++other) {
      const int range = (thread + other) % ranges_;
      const int task_id = next_[range].fetch_add(1);
      if (task_id < Begin(range + 1)) return task_id;
    }
    return -1;
  }

 private:
  static constexpr int kMostRanges = 64;  // more threads share ranges: no memory to ask for

  int Begin(int range) const { return static_cast<int>(static_cast<std::int64_t>(count_) * range / ranges_); }

  int count_;
  int ranges_;
  std::atomic<int> next_[kMostRanges];
};

// Runs `task` once for each task_id in [0, number of tasks) and returns 0, or the status of a task that failed.
// num_task == 0 leaves the number to us; the threads are OpenMP's, which torch.set_num_threads sets too. A loop inside a
// loop runs as one task. There is no barrier between tasks: several may run in one thread, one after the other.
int ParallelLaunch(ParallelTask task, void* data, int num_task) {
  const int threads = omp_get_max_threads();
  if (omp_in_parallel()) return RunTask(task, 0, 1, data);
  if (num_task <= 0) num_task = threads > 1 ? kPiecesPerThread * threads : 1;
  Tasks tasks(num_task, threads);
  std::atomic<int> status{0};
  std::atomic<void*> error{nullptr};
#pragma omp parallel num_threads(threads) if (num_task > 1)
  {
    for (int task_id; (task_id = tasks.Take(omp_get_thread_num())) >= 0;) {
      const int result = RunTask(task, task_id, num_task, data);
      if (result == 0) continue;
      status.store(result);
      void* mine = TakeError();
      void* none = nullptr;
      if (mine != nullptr && !error.compare_exchange_strong(none, mine)) DropError(mine);  // the first one is reported
    }
  }
  if (status.load() != 0) Raise(error.load());
  return status.load();
}

#else

int ParallelLaunch(ParallelTask task, void* data, int num_task) {
  const int count = num_task > 0 ? num_task : 1;
  ParallelGroup group{nullptr, count};
  for (int task_id = 0; task_id < count; ++task_id) {
    if (const int result = task(task_id, &group, data); result != 0) return result;
  }
  return 0;
}

#endif

// ---------------------------------------------------------------------------------------------------------------------
// Workspace
//
// The C library gives big blocks back to the kernel when they are freed, and a fresh one costs a page fault for every
// page at its first use: 15 to 25 % of the time of a call, measured. So each thread keeps the blocks that it has freed
// and hands them out again for the same size. What a thread keeps is bounded by the number of slots and by bytes; the
// block that was not used for the longest time goes first, and all of them go when the thread ends.

constexpr std::size_t kCacheLine = 64;  // what the code generator promises itself
constexpr std::size_t kPage = std::size_t{4} << 10;
constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kHugeFrom = std::size_t{256} << 10;  // from this size on, a block gets huge pages
constexpr std::size_t kKeptBytes = std::size_t{128} << 20;  // a thread keeps at most this much
constexpr int kSlots = 16;  // a kernel uses 4 to 12 blocks at a time

std::size_t RoundUp(std::size_t bytes, std::size_t unit) { return (bytes + unit - 1) / unit * unit; }

// Whole pages, and whole huge pages for big blocks: the kernel backs only complete ones.
std::size_t BlockSize(std::uint64_t bytes) {
  return bytes < kHugeFrom ? RoundUp(bytes != 0 ? bytes : 1, kPage) : RoundUp(bytes, kHugePage);
}

void* SmallBlock(std::size_t size) {
  void* data = nullptr;
  return posix_memalign(&data, kCacheLine, size) == 0 ? data : nullptr;
}

// Straight from the kernel: what the C library hands out may have been in use before, in small pages, and stays in them.
void* HugeBlock(std::size_t size) {
  const std::size_t mapped = size + kHugePage;  // the kernel aligns to small pages only
  void* start = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) return nullptr;
  const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(start);
  const std::uintptr_t data = (begin + kHugePage - 1) / kHugePage * kHugePage;
  if (data != begin) munmap(start, data - begin);
  if (data + size != begin + mapped) munmap(reinterpret_cast<void*>(data + size), begin + mapped - data - size);
  madvise(reinterpret_cast<void*>(data), size, MADV_HUGEPAGE);  // a wish: without huge pages the block works as well
  return reinterpret_cast<void*>(data);
}

void* NewBlock(std::size_t size) { return size < kHugeFrom ? SmallBlock(size) : HugeBlock(size); }

void DeleteBlock(void* data, std::size_t size) {
  if (data == nullptr) return;
  if (size < kHugeFrom) {
    std::free(data);
  } else {
    munmap(data, size);
  }
}

class Workspace {
 public:
  ~Workspace() {
    for (Slot& slot : slots_) {
      if (!slot.in_use) DeleteBlock(slot.data, slot.size);
    }
  }

  void* Allocate(std::size_t size) {
    for (Slot& slot : slots_) {
      if (slot.data != nullptr && !slot.in_use && slot.size == size) {
        slot.in_use = true;
        kept_ -= size;
        return slot.data;
      }
    }
    Slot* slot = EmptySlot();
    if (slot == nullptr && DropOldest()) slot = EmptySlot();
    if (slot == nullptr) return SmallBlock(size);  // every slot is in use: the block is not kept later
    void* data = NewBlock(size);
    if (data == nullptr) {  // out of memory: what is kept may be what is missing
      while (DropOldest()) {
      }
      data = NewBlock(size);
    }
    if (data != nullptr) *slot = Slot{data, size, 0, true};
    return data;
  }

  void Free(void* data) {
    for (Slot& slot : slots_) {
      if (slot.data == data) {
        slot.in_use = false;
        slot.freed_at = ++clock_;
        kept_ += slot.size;
        while (kept_ > kKeptBytes) DropOldest();
        return;
      }
    }
    std::free(data);  // of no slot
  }

 private:
  struct Slot {
    void* data = nullptr;
    std::size_t size = 0;
    std::uint64_t freed_at = 0;
    bool in_use = false;
  };

  Slot* EmptySlot() {
    for (Slot& slot : slots_) {
      if (slot.data == nullptr) return &slot;
    }
    return nullptr;
  }

  bool DropOldest() {
    Slot* oldest = nullptr;
    for (Slot& slot : slots_) {
      if (slot.data == nullptr || slot.in_use) continue;
      if (oldest == nullptr || slot.freed_at < oldest->freed_at) oldest = &slot;
    }
    if (oldest == nullptr) return false;
    DeleteBlock(oldest->data, oldest->size);
    kept_ -= oldest->size;
    *oldest = Slot{};
    return true;
  }

  Slot slots_[kSlots];
  std::size_t kept_ = 0;     // bytes of the blocks that are not in use
  std::uint64_t clock_ = 0;  // counts calls of Free
};

#ifndef _OPENMP
// What destructors of threads go through, otherwise libstdc++'s; the C library has had it since glibc 2.18.
extern "C" int __cxa_thread_atexit_impl(void (*destroy)(void*), void* object, void* library);
extern "C" __attribute__((visibility("hidden"))) int __cxa_thread_atexit(void (*destroy)(void*), void* object,
                                                                         void* library) noexcept {
  return __cxa_thread_atexit_impl(destroy, object, library);
}
#endif

thread_local Workspace workspace;

// A kernel frees a block in the thread that allocated it.
void* AllocWorkspace(int, int, std::uint64_t bytes, int, int) { return workspace.Allocate(BlockSize(bytes)); }

int FreeWorkspace(int, int, void* data) {
  if (data != nullptr) workspace.Free(data);
  return 0;
}

}  // namespace

#define RPE_TVM_HOOK extern "C" __attribute__((visibility("hidden")))

RPE_TVM_HOOK int (*__TVMBackendParallelLaunch)(ParallelTask, void*, int);
RPE_TVM_HOOK void* (*__TVMBackendAllocWorkspace)(int, int, std::uint64_t, int, int);
RPE_TVM_HOOK int (*__TVMBackendFreeWorkspace)(int, int, void*);

int (*__TVMBackendParallelLaunch)(ParallelTask, void*, int) = ParallelLaunch;
void* (*__TVMBackendAllocWorkspace)(int, int, std::uint64_t, int, int) = AllocWorkspace;
int (*__TVMBackendFreeWorkspace)(int, int, void*) = FreeWorkspace;

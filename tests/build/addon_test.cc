// Tests the hooks of addon.cc from C++, where what they do can be seen. Exit status 0, or a line on stderr and 1.

#include ADDON

#include <malloc.h>

#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <vector>

#define CHECK(condition)                                                      \
  do {                                                                        \
    if (!(condition)) {                                                       \
      std::fprintf(stderr, "line %d: failed: %s\n", __LINE__, #condition);    \
      std::exit(1);                                                           \
    }                                                                         \
  } while (false)

namespace {

struct Record {
  std::atomic<int> calls[64];
  std::atomic<int> num_task{0};
  int fail_at = -1;
  bool use_exception = false;
};

int Note(int task_id, ParallelGroup* group, void* data) {
  auto* record = static_cast<Record*>(data);
  ++record->calls[task_id];
  record->num_task = group->num_task;
  if (task_id != record->fail_at) return 0;
  if (record->use_exception) throw std::runtime_error("from a task");
  return -7;
}

int NoteNested(int, ParallelGroup*, void* data) { return __TVMBackendParallelLaunch(Note, data, 0); }

void TestLaunch() {
  omp_set_dynamic(0);
  omp_set_num_threads(3);
  for (int asked : {0, 1, 2, 5}) {
    Record record{};
    CHECK(__TVMBackendParallelLaunch(Note, &record, asked) == 0);
    const int expected = asked == 0 ? 3 * kPiecesPerThread : asked;
    CHECK(record.num_task == expected);
    for (int i = 0; i < 64; ++i) CHECK(record.calls[i] == (i < expected ? 1 : 0));
  }
}

void TestThreadsBeginWithTheirOwnTasks() {
  Tasks tasks(7, 3);
  for (int expected : {2, 3, 4, 5, 6, 0}) CHECK(tasks.Take(1) == expected);  // its own, the next one's, the first one's
  CHECK(tasks.Take(2) == 1);
  for (int thread : {0, 1, 2}) CHECK(tasks.Take(thread) == -1);

  Tasks many(500, 200);
  bool taken[500] = {};
  for (int i = 0; i < 500; ++i) {
    const int task_id = many.Take(i % 200);
    CHECK(0 <= task_id && task_id < 500 && !taken[task_id]);
    taken[task_id] = true;
  }
  CHECK(many.Take(199) == -1);
}

void TestFewerThreadsThanAsked() {
  omp_set_dynamic(1);
  Record record{};
  CHECK(__TVMBackendParallelLaunch(Note, &record, 40) == 0);
  for (int i = 0; i < 64; ++i) CHECK(record.calls[i] == (i < 40 ? 1 : 0));
  omp_set_dynamic(0);
}

void TestNestedRunsAsOneTask() {
  Record record{};
  CHECK(__TVMBackendParallelLaunch(NoteNested, &record, 3) == 0);
  CHECK(record.num_task == 1);
  CHECK(record.calls[0] == 3 && record.calls[1] == 0);
}

void TestFailures() {
  for (int fail_at : {0, 2}) {
    Record record{};
    record.fail_at = fail_at;
    CHECK(__TVMBackendParallelLaunch(Note, &record, 3) == -7);
    CHECK(record.calls[0] == 1 && record.calls[1] == 1 && record.calls[2] == 1);
    record.use_exception = true;
    CHECK(__TVMBackendParallelLaunch(Note, &record, 3) == -1);
  }
  Record record{};
  record.fail_at = 0;
  record.use_exception = true;
  CHECK(__TVMBackendParallelLaunch(Note, &record, 1) == -1);
}

void* Alloc(std::size_t bytes) {
  void* data = __TVMBackendAllocWorkspace(1, 0, bytes, 2, 32);
  CHECK(data != nullptr);
  CHECK(reinterpret_cast<std::uintptr_t>(data) % kCacheLine == 0);
  std::memset(data, 1, bytes);
  return data;
}

void Free(void* data) { CHECK(__TVMBackendFreeWorkspace(1, 0, data) == 0); }

// What the C library holds in use and what is mapped: blocks come from both.
std::size_t BytesInUse() {
  struct mallinfo2 info = mallinfo2();
  std::size_t mapped = 0, resident = 0;
  std::FILE* file = std::fopen("/proc/self/statm", "r");
  CHECK(file != nullptr && std::fscanf(file, "%zu %zu", &mapped, &resident) == 2);
  std::fclose(file);
  return info.uordblks + info.hblkhd + resident * kPage;
}

void TestBlocksAreUsedAgain() {
  std::vector<std::size_t> sizes = {100, 5000, 5000, 300000, 3000000, 70000};
  std::vector<void*> first;
  for (std::size_t size : sizes) {
    first.push_back(Alloc(size));
    if (size >= kHugeFrom) CHECK(reinterpret_cast<std::uintptr_t>(first.back()) % kHugePage == 0);
  }
  for (int i = static_cast<int>(first.size()) - 1; i >= 0; --i) Free(first[i]);
  const std::size_t before = BytesInUse();
  for (int call = 0; call < 100; ++call) {
    std::vector<void*> again;
    for (std::size_t size : sizes) again.push_back(Alloc(size));
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      int times = 0;
      for (void* data : first) times += data == again[i];
      CHECK(times == 1);
      for (std::size_t j = 0; j < i; ++j) CHECK(again[i] != again[j]);
    }
    for (int i = static_cast<int>(again.size()) - 1; i >= 0; --i) Free(again[i]);
  }
  CHECK(BytesInUse() <= before + (1 << 20));  // the kernel counts resident pages a little late
}

void TestWhatIsKeptIsBounded() {
  const std::size_t before = BytesInUse();
  for (int i = 0; i < 200; ++i) Free(Alloc((std::size_t{1} << 20) * (1 + i % 50)));
  CHECK(BytesInUse() <= before + kKeptBytes + (std::size_t{4} << 20) * kSlots);
  std::vector<void*> many;  // more at a time than there are slots
  for (int i = 0; i < 3 * kSlots; ++i) many.push_back(Alloc(1 << 20));
  for (void* data : many) Free(data);
  CHECK(BytesInUse() <= before + kKeptBytes + (std::size_t{4} << 20) * kSlots);
  Free(Alloc(kKeptBytes + 1));  // too big to keep
  CHECK(BytesInUse() <= before + (std::size_t{4} << 20));
}

void TestAThreadLeavesNothing() {
  const std::size_t before = BytesInUse();
  for (int i = 0; i < 20; ++i) {
    std::thread([] {
      void* outer = Alloc(8 << 20);
      Free(Alloc(20000));
      Free(outer);
    }).join();
  }
  CHECK(BytesInUse() <= before + (std::size_t{4} << 20));
}

}  // namespace

int main() {
  TestLaunch();
  TestThreadsBeginWithTheirOwnTasks();
  TestFewerThreadsThanAsked();
  TestNestedRunsAsOneTask();
  TestFailures();
  TestBlocksAreUsedAgain();
  TestWhatIsKeptIsBounded();
  TestAThreadLeavesNothing();
  return 0;
}

// Runs in a session of TVM's RPC server, beside the candidates: says which board it is and readies the session.
//
// Compiled for the board as candidates are, and uploaded with them, so that a board needs nothing of ours.

#include <omp.h>
#include <sys/auxv.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <csignal>
#include <cstddef>
#include <cstdint>
#include <fstream>
#include <iterator>
#include <string>

// Part of the C interface of libtvm_ffi.
extern "C" {
struct TVMFFIByteArray {
  const char* data;
  std::size_t size;
};
struct TVMFFIAny {
  std::int32_t type_index;
  std::uint32_t padding;
  union {
    std::int64_t v_int64;
    double v_float64;
  };
};
int TVMFFIStringFromByteArray(const TVMFFIByteArray* input, TVMFFIAny* out);
}

namespace {

std::string Read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(file), {});
}

std::string LinkTarget(const std::string& path) {
  char target[4096];
  const ssize_t size = readlink(path.c_str(), target, sizeof target);
  return std::string(target, size > 0 ? static_cast<std::size_t>(size) : 0);
}

std::string Describe() {
  utsname system{};
  uname(&system);
  std::string text = "machine: " + std::string(system.machine);
  text += "\nmodel: " + std::string(Read("/proc/device-tree/model").c_str());  // ends with a zero byte
  text += "\nhwcap: " + std::to_string(getauxval(AT_HWCAP)) + "\nhwcap2: " + std::to_string(getauxval(AT_HWCAP2));
  // A user-mode emulator shows a process its own program in /proc/self, and what really runs in those of others.
  text += "\nserver: " + LinkTarget("/proc/" + std::to_string(getppid()) + "/exe");
  return text + "\ncpuinfo:\n" + Read("/proc/cpuinfo");
}

// The server ends for good when the process of a session does not end with 0, so a candidate that crashes must.
void Leave(int) { _exit(0); }

}  // namespace

// prepare(threads) -> text: sets the OpenMP threads of the session and describes the board.
extern "C" __attribute__((visibility("default"))) int __tvm_ffi_prepare(void*, const TVMFFIAny* args, std::int32_t,
                                                                        TVMFFIAny* result) {
  for (const int signal : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT}) std::signal(signal, Leave);
  omp_set_num_threads(static_cast<int>(args[0].v_int64));
  const std::string text = Describe();
  const TVMFFIByteArray bytes{text.data(), text.size()};
  return TVMFFIStringFromByteArray(&bytes, result);
}

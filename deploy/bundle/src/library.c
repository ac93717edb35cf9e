#include "library.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "manifest.h"

static void explain(const char *file) {
  const char *reason = dlerror();
  if (reason == NULL) reason = "unknown error";
  rpe_tvm_fail("Could not open %s: %s.", file, reason);
  if (strstr(reason, "libgomp") != NULL) {
    rpe_tvm_append(
        " Install the OpenMP runtime (Debian and Ubuntu: apt install libgomp1), or package with --threads none.");
  } else if (strstr(reason, "libstdc++") != NULL) {
    rpe_tvm_append(" Install libstdc++ (Debian and Ubuntu: apt install libstdc++6), or package with --threads none.");
  } else if (strstr(reason, "GLIBC") != NULL) {
    rpe_tvm_append(" This system's C library is too old: package on an older system.");
  } else if (strstr(reason, "TVMFFI") != NULL) {
    rpe_tvm_append(" Link the program with -rdynamic, so that kernels find the host's functions.");
  }
}

void *rpe_tvm_open_library(const char *directory, const char *file) {
  char *path = rpe_tvm_path(directory, file);
  void *library = path == NULL ? NULL : dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (path == NULL) {
    rpe_tvm_fail("Out of memory.");
  } else if (library == NULL) {
    explain(file);
  }
  free(path);
  return library;
}

int rpe_tvm_find_kernel(void *library, const char *name, rpe_tvm_kernel *kernel) {
  char symbol[256];
  void *found;
  snprintf(symbol, sizeof symbol, "__tvm_ffi_%s", name);
  found = dlsym(library, symbol);
  if (found == NULL) return rpe_tvm_fail("The library has no function %s.", symbol);
  memcpy(kernel, &found, sizeof found); /* ISO C has no cast from an object to a function */
  return 0;
}

int rpe_tvm_call(rpe_tvm_kernel kernel, const TVMFFIAny *arguments, int num_arguments) {
  TVMFFIAny result;
  memset(&result, 0, sizeof result);
  rpe_tvm_fail("A kernel failed without a message.");
  return kernel(NULL, arguments, num_arguments, &result) == 0 ? 0 : -1;
}

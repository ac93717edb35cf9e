/* Opens compiled libraries. */
#ifndef RPE_TVM_LIBRARY_H_
#define RPE_TVM_LIBRARY_H_

#include "kernel_abi.h"

/* The library, for dlclose; NULL after rpe_tvm_fail. */
void *rpe_tvm_open_library(const char *directory, const char *file);

/* Looks up __tvm_ffi_NAME. Returns 0, or -1 after rpe_tvm_fail. */
int rpe_tvm_find_kernel(void *library, const char *name, rpe_tvm_kernel *kernel);

/* Calls a kernel. Returns 0, or -1 with the kernel's message in rpe_tvm_last_error. */
int rpe_tvm_call(rpe_tvm_kernel kernel, const TVMFFIAny *arguments, int num_arguments);

#endif

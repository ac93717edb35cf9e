/* How compiled kernels are called: the part of the C interface of tvm-ffi that they use, declared after its public
 * header tvm/ffi/c_api.h and DLPack's dlpack.h, and the one function of libtvm_ffi that they call. */
#ifndef RPE_TVM_KERNEL_ABI_H_
#define RPE_TVM_KERNEL_ABI_H_

#include <stdint.h>

typedef struct {
  int32_t type, id;
} DLDevice;

typedef struct {
  uint8_t code, bits;
  uint16_t lanes;
} DLDataType;

typedef struct {
  void *data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape;
  int64_t *strides; /* in elements */
  uint64_t byte_offset;
} DLTensor;

typedef struct {
  int32_t type_index;
  uint32_t zero_padding;
  union {
    int64_t v_int64;
    void *v_ptr;
  } value;
} TVMFFIAny;

enum { kDLCPU = 1, kDLFloat = 2, kTVMFFINone = 0, kTVMFFIInt = 1, kTVMFFIDLTensorPtr = 7 };

/* Returns 0, or another number after TVMFFIErrorSetRaisedFromCStrParts. */
typedef int (*rpe_tvm_kernel)(void *self, const TVMFFIAny *arguments, int32_t num_arguments, TVMFFIAny *result);

/* Fail to compile where the sizes are others than those that kernels were compiled for. */
typedef char check_size_of_any[sizeof(TVMFFIAny) == 16 ? 1 : -1];
typedef char check_size_of_tensor[sizeof(DLTensor) == (sizeof(void *) == 8 ? 48 : 40) ? 1 : -1];

/* Kernels resolve these in the program: it has to be linked with -rdynamic, unless this host is a shared library. */
__attribute__((visibility("default"))) void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts,
                                                                              int32_t num_parts);
__attribute__((visibility("default"))) void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *message);

#endif

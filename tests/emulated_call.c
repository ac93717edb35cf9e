// Calls one function of a compiled library, for tests under user-mode emulation:
//
//   emulated_call LIBRARY FUNCTION FILE
//
// FILE holds the arguments and gets them back with what the function wrote. Numbers are 64-bit integers: the count of
// arguments, then for each one the number of its axes and, of an integer (-1 axes), its value, or of a float32 tensor
// its shape, its strides and, padded to 8 bytes, its compact data.

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

// As dlpack.h and tvm/ffi/c_api.h define them.
typedef struct {
  void* data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
} Tensor;

typedef struct {
  int32_t type;
  uint32_t padding;
  union {
    int64_t integer;
    void* pointer;
  } value;
} Any;

typedef int (*Function)(void* self, const Any* arguments, int32_t count, Any* result);

enum { kInt = 1, kTensor = 7, kCpu = 1, kFloat = 2 };

// The one function of libtvm_ffi that compiled code needs.
void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int32_t i = 0; i < count; ++i) fputs(parts[i], stderr);
  fputc('\n', stderr);
}

static void Fail(const char* what, const char* why) {
  fprintf(stderr, "%s: %s\n", what, why != NULL ? why : "failed");
  exit(2);
}

int main(int argc, char** argv) {
  if (argc != 4) Fail("usage", "emulated_call LIBRARY FUNCTION FILE");
  FILE* file = fopen(argv[3], "r+b");
  if (file == NULL) Fail("open", argv[3]);
  fseek(file, 0, SEEK_END);
  const size_t size = (size_t)ftell(file);
  rewind(file);
  int64_t* words = aligned_alloc(64, (size + 127) / 64 * 64);
  if (words == NULL || fread(words, 1, size, file) != size) Fail("read", argv[3]);

  int64_t* at = words;
  const int32_t count = (int32_t)*at++;
  Any* arguments = calloc((size_t)count, sizeof(Any));
  Tensor* tensors = calloc((size_t)count, sizeof(Tensor));
  for (int32_t i = 0; i < count; ++i) {
    const int64_t axes = *at++;
    if (axes < 0) {
      arguments[i] = (Any){kInt, 0, {.integer = *at++}};
      continue;
    }
    Tensor* tensor = &tensors[i];
    *tensor = (Tensor){NULL, {kCpu, 0}, (int32_t)axes, {kFloat, 32, 1}, at, at + axes, 0};
    tensor->data = at + 2 * axes;
    int64_t floats = 1;
    for (int64_t axis = 0; axis < axes; ++axis) floats *= at[axis];
    at += 2 * axes + (floats + 1) / 2;
    arguments[i].type = kTensor;
    arguments[i].value.pointer = tensor;
  }

  void* library = dlopen(argv[1], RTLD_NOW);
  if (library == NULL) Fail("dlopen", dlerror());
  Function function;
  *(void**)&function = dlsym(library, argv[2]);
  if (function == NULL) Fail("dlsym", dlerror());
  Any result = {0, 0, {0}};
  if (function(NULL, arguments, count, &result) != 0) return 3;

  rewind(file);
  if (fwrite(words, 1, size, file) != size || fclose(file) != 0) Fail("write", argv[3]);
  return 0;
}

#define _POSIX_C_SOURCE 200809L

#include <dlfcn.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "bundle.h"
#include "error.h"
#include "library.h"
#include "rpe_tvm.h"

enum { ALIGNMENT = 64, NUM_MAPS = 2 }; /* a cache line: kernels take any address and run fastest from here */

typedef struct {
  void *library;
  rpe_tvm_kernel features[NUM_MAPS], weights, attention;
} kernels;

typedef struct {
  float *data;
  int64_t size;
} block;

struct rpe_tvm_operator {
  rpe_tvm_bundle bundle;
  kernels *kernels;             /* one for each library of the bundle */
  block phi_q, phi_k, table;    /* intermediates, kept from call to call: fresh memory costs page faults */
};

/* ------------------------------------------------------------------------------------------------------------------
 * Opening
 */

static int open_kernels(const char *directory, const rpe_tvm_library *library, kernels *self) {
  self->library = rpe_tvm_open_library(directory, library->file);
  if (self->library == NULL) return -1;
  if (rpe_tvm_find_kernel(self->library, "features_nprf", &self->features[RPE_TVM_NPRF]) != 0 ||
      rpe_tvm_find_kernel(self->library, "features_prf", &self->features[RPE_TVM_PRF]) != 0 ||
      rpe_tvm_find_kernel(self->library, "weights", &self->weights) != 0 ||
      rpe_tvm_find_kernel(self->library, "attention", &self->attention) != 0) {
    return rpe_tvm_append(" (%s)", library->file);
  }
  return 0;
}

rpe_tvm_operator *rpe_tvm_open(const char *bundle) {
  rpe_tvm_operator *self;
  int i;
  if (bundle == NULL) {
    rpe_tvm_fail("Expected the directory of an unpacked bundle, got NULL.");
    return NULL;
  }
  self = calloc(1, sizeof *self);
  if (self == NULL) {
    rpe_tvm_fail("Out of memory.");
    return NULL;
  }
  if (rpe_tvm_bundle_read(bundle, &self->bundle) != 0) goto failed;
  self->kernels = calloc((size_t)self->bundle.num_libraries, sizeof *self->kernels);
  if (self->kernels == NULL) {
    rpe_tvm_fail("Out of memory.");
    goto failed;
  }
  for (i = 0; i < self->bundle.num_libraries; ++i) {
    if (open_kernels(bundle, &self->bundle.libraries[i], &self->kernels[i]) != 0) goto failed;
  }
  return self;
failed:
  rpe_tvm_close(self);
  return NULL;
}

void rpe_tvm_close(rpe_tvm_operator *self) {
  int i;
  if (self == NULL) return;
  for (i = 0; self->kernels != NULL && i < self->bundle.num_libraries; ++i) {
    if (self->kernels[i].library != NULL) dlclose(self->kernels[i].library);
  }
  free(self->kernels);
  free(self->phi_q.data);
  free(self->phi_k.data);
  free(self->table.data);
  rpe_tvm_bundle_free(&self->bundle);
  free(self);
}

const char *rpe_tvm_variant(const rpe_tvm_operator *self) { return self->bundle.variant; }
int64_t rpe_tvm_num_features(const rpe_tvm_operator *self) { return self->bundle.num_features; }
int64_t rpe_tvm_head_dim(const rpe_tvm_operator *self) { return self->bundle.head_dim; }
int64_t rpe_tvm_max_length(const rpe_tvm_operator *self) {
  return self->bundle.libraries[self->bundle.num_libraries - 1].length;
}

/* ------------------------------------------------------------------------------------------------------------------
 * Arguments
 */

/* The number of floats, or -1 where there cannot be as many. */
static int64_t count(int64_t a, int64_t b, int64_t c, int64_t d) {
  const int64_t factors[] = {a, b, c, d}, most = INT64_MAX / (int64_t)sizeof(float);
  int64_t product = 1;
  int i;
  for (i = 0; i < 4; ++i) {
    if (factors[i] == 0) return 0;
    if (product > most / factors[i]) return -1;
    product *= factors[i];
  }
  return product;
}

static rpe_tvm_strides strides_of(rpe_tvm_strides given, const rpe_tvm_arguments *a, int64_t n) {
  if (given.batch == 0 && given.head == 0 && given.position == 0) {
    given.position = a->head_dim;
    given.head = n * given.position;
    given.batch = a->heads * given.head;
  }
  return given;
}

/* One more than the distance from the first element of a tensor to its last one. */
static int64_t span(rpe_tvm_strides strides, const rpe_tvm_arguments *a, int64_t n) {
  return (a->batch - 1) * strides.batch + (a->heads - 1) * strides.head + (n - 1) * strides.position + a->head_dim;
}

static int check_sizes(const rpe_tvm_operator *self, const rpe_tvm_arguments *a) {
  if (a->num_features != self->bundle.num_features || a->head_dim != self->bundle.head_dim) {
    return rpe_tvm_fail("Wrong bundle: it has %" PRId64 " features and head_dim %" PRId64 ", the call has %" PRId64
                        " and %" PRId64 ".",
                        self->bundle.num_features, self->bundle.head_dim, a->num_features, a->head_dim);
  }
  if (a->batch < 0 || a->heads < 0 || a->n_query < 0 || a->n_key < 0) {
    return rpe_tvm_fail("Invalid size: expected no negative one, got batch %" PRId64 ", heads %" PRId64
                        ", n_query %" PRId64 ", n_key %" PRId64 ".",
                        a->batch, a->heads, a->n_query, a->n_key);
  }
  if (a->n_key == 0 && a->n_query > 0) {
    return rpe_tvm_fail("Invalid n_key: expected at least one position for query to attend to, got 0.");
  }
  if (a->n_query > rpe_tvm_max_length(self) || a->n_key > rpe_tvm_max_length(self)) {
    return rpe_tvm_fail("Invalid length: expected at most %" PRId64 " queries and keys, got %" PRId64 " and %" PRId64
                        ". Package a longer one: python -m rpe_tvm package --lengths N.",
                        rpe_tvm_max_length(self), a->n_query, a->n_key);
  }
  if (a->num_offsets != (a->n_query + a->n_key > 0 ? a->n_query + a->n_key - 1 : 0)) {
    return rpe_tvm_fail("Invalid num_offsets: expected n_query + n_key - 1 = %" PRId64 ", got %" PRId64 ".",
                        a->n_query + a->n_key - 1, a->num_offsets);
  }
  if (count(a->batch, a->heads, a->n_query + a->n_key, a->head_dim) < 0) {
    return rpe_tvm_fail("Invalid size: no memory holds batch %" PRId64 " and heads %" PRId64 ".", a->batch, a->heads);
  }
  if (a->feature_map != RPE_TVM_NPRF && a->feature_map != RPE_TVM_PRF) {
    return rpe_tvm_fail("Unknown feature map %d: expected RPE_TVM_NPRF or RPE_TVM_PRF.", (int)a->feature_map);
  }
  return 0;
}

static int check_strides(const char *name, rpe_tvm_strides s) {
  if (s.batch >= 0 && s.head >= 0 && s.position >= 0) return 0;
  return rpe_tvm_fail("Invalid strides of %s: expected no negative one, got %" PRId64 ", %" PRId64 ", %" PRId64 ".",
                      name, s.batch, s.head, s.position);
}

static int check_memory(const rpe_tvm_arguments *a) {
  const struct {
    const char *name;
    const float *data;
  } inputs[] = {{"query", a->query},       {"key", a->key},
                {"value", a->value},       {"rpe_bias", a->rpe_bias},
                {"projection", a->projection}, {"out", a->out}};
  rpe_tvm_strides out = strides_of(a->out_strides, a, a->n_query), value = strides_of(a->value_strides, a, a->n_key);
  uintptr_t out_start = (uintptr_t)a->out, value_start = (uintptr_t)a->value;
  size_t i;
  for (i = 0; i < sizeof inputs / sizeof inputs[0]; ++i) {
    if (inputs[i].data == NULL) return rpe_tvm_fail("Invalid %s: expected an array, got NULL.", inputs[i].name);
    if ((uintptr_t)inputs[i].data % sizeof(float) != 0) {
      return rpe_tvm_fail("Invalid %s: expected an address that is a multiple of 4.", inputs[i].name);
    }
  }
  if (check_strides("query", a->query_strides) != 0 || check_strides("key", a->key_strides) != 0 ||
      check_strides("value", a->value_strides) != 0 || check_strides("out", a->out_strides) != 0) {
    return -1;
  }
  if ((a->batch > 1 && out.batch == 0) || (a->heads > 1 && out.head == 0) || (a->n_query > 1 && out.position == 0)) {
    return rpe_tvm_fail("Invalid strides of out: expected distinct elements, got %" PRId64 ", %" PRId64 ", %" PRId64
                        ".",
                        out.batch, out.head, out.position);
  }
  if (out_start < value_start + sizeof(float) * (uintptr_t)span(value, a, a->n_key) &&
      value_start < out_start + sizeof(float) * (uintptr_t)span(out, a, a->n_query)) {
    return rpe_tvm_fail("Invalid out: expected memory of its own, got memory that value uses too.");
  }
  return 0;
}

/* ------------------------------------------------------------------------------------------------------------------
 * Calling
 */

typedef struct {
  DLTensor tensor;
  int64_t shape[5], strides[5];
} tensor;

/* A contiguous tensor; `ndim` of the sizes count. */
static void describe(tensor *self, const float *data, int ndim, const int64_t *shape) {
  int axis;
  int64_t stride = 1;
  for (axis = ndim - 1; axis >= 0; --axis) {
    self->shape[axis] = shape[axis];
    self->strides[axis] = stride;
    stride *= shape[axis];
  }
  self->tensor.data = (void *)(uintptr_t)data;
  self->tensor.device.type = kDLCPU;
  self->tensor.device.id = 0;
  self->tensor.ndim = ndim;
  self->tensor.dtype.code = kDLFloat;
  self->tensor.dtype.bits = 32;
  self->tensor.dtype.lanes = 1;
  self->tensor.shape = self->shape;
  self->tensor.strides = self->strides;
  self->tensor.byte_offset = 0;
}

/* A tensor [batch, heads, n, head_dim] of the caller. */
static void describe_heads(tensor *self, const float *data, rpe_tvm_strides given, const rpe_tvm_arguments *a,
                           int64_t n) {
  const int64_t shape[] = {a->batch, a->heads, n, a->head_dim};
  rpe_tvm_strides strides = strides_of(given, a, n);
  describe(self, data, 4, shape);
  self->strides[0] = strides.batch;
  self->strides[1] = strides.head;
  self->strides[2] = strides.position;
}

static TVMFFIAny of_tensor(tensor *x) {
  TVMFFIAny any;
  memset(&any, 0, sizeof any);
  any.type_index = kTVMFFIDLTensorPtr;
  any.value.v_ptr = &x->tensor;
  return any;
}

static TVMFFIAny of_int(int64_t x) {
  TVMFFIAny any;
  memset(&any, 0, sizeof any);
  any.type_index = kTVMFFIInt;
  any.value.v_int64 = x;
  return any;
}

static float *take(block *self, int64_t size) {
  if (size < 0) return NULL;
  if (self->size < size) {
    void *data = NULL;
    free(self->data);
    self->data = NULL;
    self->size = 0;
    if (posix_memalign(&data, ALIGNMENT, (size_t)size * sizeof(float)) != 0) return NULL;
    self->data = data;
    self->size = size;
  }
  return self->data;
}

static int64_t round_up(int64_t number, int64_t step) { return (number + step - 1) / step * step; }

static int run(rpe_tvm_operator *self, const rpe_tvm_library *library, const kernels *k, const rpe_tvm_arguments *a) {
  static const float unused = 0;
  const int64_t longest = a->n_query > a->n_key ? a->n_query : a->n_key;
  const int64_t m = self->bundle.num_features, d = self->bundle.head_dim, columns = library->columns;
  const int64_t padded = round_up(round_up(longest, library->step), columns); /* whole tiles, then whole rows */
  const int64_t phi_shape[] = {a->batch, a->heads, m, padded / columns, columns};
  const int64_t fft_shape[] = {a->heads, 2, library->length, 2}, direct_shape[] = {a->heads, 2 * padded};
  const int64_t bias_shape[] = {a->heads, a->num_offsets}, projection_shape[] = {m, d};
  const int64_t tables_shape[] = {library->tables == NULL ? 1 : library->num_tables};
  float *phi_q_data = take(&self->phi_q, count(a->batch, a->heads, m, padded));
  float *phi_k_data = take(&self->phi_k, count(a->batch, a->heads, m, padded));
  float *table_data = take(&self->table, count(a->heads, library->is_fft ? 4 * library->length : 2 * padded, 1, 1));
  tensor query, key, value, out, bias, projection, tables, phi_q, phi_k, table;
  if (phi_q_data == NULL || phi_k_data == NULL || table_data == NULL) {
    return rpe_tvm_fail("Out of memory for intermediate results: use a smaller batch.");
  }
  describe_heads(&query, a->query, a->query_strides, a, a->n_query);
  describe_heads(&key, a->key, a->key_strides, a, a->n_key);
  describe_heads(&value, a->value, a->value_strides, a, a->n_key);
  describe_heads(&out, a->out, a->out_strides, a, a->n_query);
  describe(&bias, a->rpe_bias, 2, bias_shape);
  describe(&projection, a->projection, 2, projection_shape);
  describe(&tables, library->tables == NULL ? &unused : library->tables, 1, tables_shape);
  describe(&phi_q, phi_q_data, 5, phi_shape);
  describe(&phi_k, phi_k_data, 5, phi_shape);
  describe(&table, table_data, library->is_fft ? 4 : 2, library->is_fft ? fft_shape : direct_shape);
  {
    const TVMFFIAny of_query[] = {of_tensor(&query), of_tensor(&projection), of_tensor(&phi_q)};
    const TVMFFIAny of_key[] = {of_tensor(&key), of_tensor(&projection), of_tensor(&phi_k)};
    const TVMFFIAny of_weights[] = {of_tensor(&bias),           of_int(a->n_query),  of_int(a->n_key),
                                    of_int(a->is_causal != 0), of_tensor(&tables), of_tensor(&table)};
    const TVMFFIAny of_attention[] = {of_tensor(&phi_q), of_tensor(&phi_k),  of_tensor(&value),
                                      of_tensor(&table), of_tensor(&tables), of_tensor(&out)};
    const rpe_tvm_kernel features = k->features[a->feature_map];
    if (rpe_tvm_call(features, of_query, 3) != 0 || rpe_tvm_call(features, of_key, 3) != 0 ||
        rpe_tvm_call(k->weights, of_weights, 6) != 0 || rpe_tvm_call(k->attention, of_attention, 6) != 0) {
      return -1;
    }
  }
  return 0;
}

int rpe_tvm_attention(rpe_tvm_operator *self, const rpe_tvm_arguments *arguments) {
  const rpe_tvm_library *libraries;
  int i = 0;
  if (self == NULL || arguments == NULL) return rpe_tvm_fail("Expected an open operator and arguments, got NULL.");
  if (check_sizes(self, arguments) != 0) return -1;
  if (arguments->batch == 0 || arguments->heads == 0 || arguments->n_query == 0) return 0; /* nothing to write */
  if (check_memory(arguments) != 0) return -1;
  libraries = self->bundle.libraries;
  while (libraries[i].length < arguments->n_query || libraries[i].length < arguments->n_key) ++i;
  return run(self, &libraries[i], &self->kernels[i], arguments);
}

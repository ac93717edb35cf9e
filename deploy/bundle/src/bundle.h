/* Reads bundle.txt. Besides the lines that manifest.h lists, it has:
 *
 *     operator attention NUM_FEATURES HEAD_DIM
 *     library TARGET LENGTH ALGORITHM COLUMNS STEP SCHEDULE BYTES SHA256 FILE
 *     tables TARGET LENGTH BYTES SHA256 FILE                       of the library with that target and length
 *
 * A library serves every n up to its LENGTH. COLUMNS is the last axis of its feature buffers, STEP what positions are
 * rounded up to.
 */
#ifndef RPE_TVM_BUNDLE_H_
#define RPE_TVM_BUNDLE_H_

#include <stdint.h>

typedef struct {
  int64_t length, columns, step;
  int is_fft;
  char file[256];   /* the library, relative to the bundle */
  float *tables;    /* constant tables; owned by the bundle */
  int64_t num_tables;
} rpe_tvm_library;

typedef struct {
  char variant[64];
  int64_t num_features, head_dim;
  int num_libraries;
  rpe_tvm_library *libraries; /* of that variant, shortest first */
} rpe_tvm_bundle;

/* Returns 0, or -1 after rpe_tvm_fail; then there is nothing to free. */
int rpe_tvm_bundle_read(const char *directory, rpe_tvm_bundle *bundle);

void rpe_tvm_bundle_free(rpe_tvm_bundle *bundle);

#endif

/* Reads bundle.txt, checks files against it, and chooses the variant for this machine.
 *
 * Its lines, words between single spaces:
 *
 *     rpe_tvm-bundle 1
 *     operator attention NUM_FEATURES HEAD_DIM
 *     versions PACKAGE VERSION ...
 *     variant TARGET MACHINE GLIBC THREADS FEATURE,FEATURE,...     a "-" stands for no features
 *     library TARGET LENGTH ALGORITHM COLUMNS STEP SCHEDULE BYTES SHA256 FILE
 *     tables TARGET LENGTH BYTES SHA256 FILE                       of the library with that target and length
 *     end SHA256                                                   of all lines above
 *
 * A library serves every n up to its LENGTH. COLUMNS is the last axis of its feature buffers, STEP what positions are
 * rounded up to.
 */
#ifndef RPE_TVM_BUNDLE_H_
#define RPE_TVM_BUNDLE_H_

#include <stddef.h>
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

/* `directory`/`file` in memory of malloc; NULL where there is none left. */
char *rpe_tvm_path(const char *directory, const char *file);

#endif

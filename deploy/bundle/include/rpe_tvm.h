/* Attention with relative positional encoding, compiled ahead of time, for C programs.
 *
 *     out_i = sum_j c[j-i] (phi(q_i) . phi(k_j)) v_j / sum_j c[j-i] (phi(q_i) . phi(k_j)),   c = exp(rpe_bias)
 *
 * A bundle, which `python -m rpe_tvm package` writes, holds compiled libraries and this host. It needs Linux and a C
 * library; neither Python nor TVM.
 */
#ifndef RPE_TVM_H_
#define RPE_TVM_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The operator of a bundle. One thread may use it at a time: it owns the memory of intermediate results. */
typedef struct rpe_tvm_operator rpe_tvm_operator;

typedef enum {
  RPE_TVM_NPRF = 0, /* positive random features of queries and keys that are scaled to length 1 */
  RPE_TVM_PRF = 1   /* the same without scaling */
} rpe_tvm_feature_map;

/* Distances in floats from a sequence, a head and a position to the next; the channels of a position are adjacent.
 * All zero: contiguous, [batch, heads, n, head_dim]. What a projection writes, [batch, n, heads * head_dim], has
 * {n * heads * head_dim, head_dim, heads * head_dim}. */
typedef struct {
  int64_t batch, head, position;
} rpe_tvm_strides;

/* Arguments of a call. Set the struct to zero first: `rpe_tvm_arguments arguments = {0};` */
typedef struct {
  int64_t batch, heads, n_query, n_key;
  int64_t num_features, head_dim; /* those of the bundle: a check against the wrong one */
  const float *query;             /* [batch, heads, n_query, head_dim] */
  const float *key, *value;       /* [batch, heads, n_key, head_dim] */
  const float *rpe_bias;          /* [heads, num_offsets]; entry (j - i) + n_query - 1 is of query i and key j */
  int64_t num_offsets;            /* n_query + n_key - 1 */
  const float *projection;        /* [num_features, head_dim], the random projection of the feature map */
  float *out;                     /* [batch, heads, n_query, head_dim], sharing no memory with value */
  rpe_tvm_strides query_strides, key_strides, value_strides, out_strides;
  rpe_tvm_feature_map feature_map;
  int is_causal; /* whether query i sees only keys j <= i */
} rpe_tvm_arguments;

/* Opens the bundle in a directory: checks sizes and SHA-256 of its files, and takes the variant that uses most of this
 * CPU. Returns NULL where it is refused; rpe_tvm_last_error says why, with one line for each variant. */
rpe_tvm_operator *rpe_tvm_open(const char *bundle);

/* Computes attention. Returns 0, or -1 where an argument does not fit; rpe_tvm_last_error says which. */
int rpe_tvm_attention(rpe_tvm_operator *self, const rpe_tvm_arguments *arguments);

/* Gives everything back. NULL is allowed. */
void rpe_tvm_close(rpe_tvm_operator *self);

/* What went wrong in this thread last; valid until its next call. */
const char *rpe_tvm_last_error(void);

/* The variant that was taken, such as "aarch64-cortex-a72". */
const char *rpe_tvm_variant(const rpe_tvm_operator *self);

int64_t rpe_tvm_num_features(const rpe_tvm_operator *self);
int64_t rpe_tvm_head_dim(const rpe_tvm_operator *self);
int64_t rpe_tvm_max_length(const rpe_tvm_operator *self); /* most queries and keys that a call may have */

#ifdef __cplusplus
}
#endif

#endif

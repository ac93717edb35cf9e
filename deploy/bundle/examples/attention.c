/* Computes attention of a case in a file with a bundle, in C.
 *
 *     attention_c BUNDLE CASE OUT
 *
 * CASE holds eight 64-bit numbers: batch, heads, n_query, n_key, num_features, head_dim, feature_map, is_causal; then
 * query, key, value, rpe_bias and projection as 32-bit floats. OUT gets the floats of the result.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "rpe_tvm.h"

/* Reads `count` floats into memory of malloc; ends the program where they are not there. */
static float *read_floats(FILE *file, int64_t count) {
  float *data = malloc((size_t)(count > 0 ? count : 1) * sizeof(float));
  if (data == NULL || fread(data, sizeof(float), (size_t)count, file) != (size_t)count) {
    fprintf(stderr, "error: the case is incomplete: expected %lld more floats\n", (long long)count);
    exit(1);
  }
  return data;
}

int main(int argc, char **argv) {
  int64_t n[8], query_size, key_size;
  rpe_tvm_arguments arguments = {0};
  rpe_tvm_operator *attention;
  float *query, *key, *value, *rpe_bias, *projection, *out;
  FILE *file;
  int status;
  if (argc != 4) {
    fprintf(stderr, "usage: %s BUNDLE CASE OUT\n", argv[0]);
    return 2;
  }
  attention = rpe_tvm_open(argv[1]);
  if (attention == NULL) {
    fprintf(stderr, "error: %s\n", rpe_tvm_last_error());
    return 1;
  }
  printf("%s\n", rpe_tvm_variant(attention));
  file = fopen(argv[2], "rb");
  if (file == NULL || fread(n, sizeof(int64_t), 8, file) != 8) {
    fprintf(stderr, "error: cannot read %s\n", argv[2]);
    return 1;
  }
  arguments.batch = n[0], arguments.heads = n[1], arguments.n_query = n[2], arguments.n_key = n[3];
  arguments.num_features = n[4], arguments.head_dim = n[5];
  arguments.feature_map = n[6] == 1 ? RPE_TVM_PRF : RPE_TVM_NPRF;
  arguments.is_causal = (int)n[7];
  arguments.num_offsets = n[2] + n[3] > 0 ? n[2] + n[3] - 1 : 0;
  query_size = n[0] * n[1] * n[2] * n[5];
  key_size = n[0] * n[1] * n[3] * n[5];
  arguments.query = query = read_floats(file, query_size);
  arguments.key = key = read_floats(file, key_size);
  arguments.value = value = read_floats(file, key_size);
  arguments.rpe_bias = rpe_bias = read_floats(file, n[1] * arguments.num_offsets);
  arguments.projection = projection = read_floats(file, n[4] * n[5]);
  fclose(file);
  arguments.out = out = malloc((size_t)(query_size + 1) * sizeof(float));
  status = rpe_tvm_attention(attention, &arguments);
  if (status != 0) fprintf(stderr, "error: %s\n", rpe_tvm_last_error());
  if (status == 0) {
    file = fopen(argv[3], "wb");
    if (file == NULL || fwrite(out, sizeof(float), (size_t)query_size, file) != (size_t)query_size ||
        fclose(file) != 0) {
      fprintf(stderr, "error: cannot write %s\n", argv[3]);
      status = 1;
    }
  }
  free(query), free(key), free(value), free(rpe_bias), free(projection), free(out);
  rpe_tvm_close(attention);
  return status == 0 ? 0 : 1;
}

/* The attention part of an encoder block: LayerNorm(x + attention(q, k, v)), between its two projections.
 *
 *     encoder_block BUNDLE BLOCK OUT
 *
 * BLOCK holds five 64-bit numbers: batch, heads, n, num_features, head_dim; then x [batch, n, E] with
 * E = heads * head_dim, the projected qkv [batch, n, 3, E], rpe_bias [heads, 2n - 1] and projection, as 32-bit floats.
 * OUT gets [batch, n, E]. Heads are split and merged by strides, nothing is copied.
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "rpe_tvm.h"

static const float EPSILON = 1e-5f;

static float *read_floats(FILE *file, int64_t count) {
  float *data = malloc((size_t)count * sizeof(float));
  if (data == NULL || fread(data, sizeof(float), (size_t)count, file) != (size_t)count) {
    fprintf(stderr, "error: the block is incomplete: expected %lld more floats\n", (long long)count);
    exit(1);
  }
  return data;
}

/* x = LayerNorm(x + y) of one position, without weights. */
static void add_and_normalise(float *x, const float *y, int64_t channels) {
  double mean = 0, variance = 0;
  int64_t c;
  for (c = 0; c < channels; ++c) {
    x[c] += y[c];
    mean += x[c];
  }
  mean /= (double)channels;
  for (c = 0; c < channels; ++c) variance += (x[c] - mean) * (x[c] - mean);
  variance /= (double)channels;
  for (c = 0; c < channels; ++c) x[c] = (float)((x[c] - mean) / sqrt(variance + EPSILON));
}

int main(int argc, char **argv) {
  int64_t sizes[5], batch, heads, n, channels, i;
  rpe_tvm_arguments arguments = {0};
  rpe_tvm_operator *attention;
  float *x, *qkv, *rpe_bias, *projection, *merged;
  FILE *file;
  if (argc != 4) {
    fprintf(stderr, "usage: %s BUNDLE BLOCK OUT\n", argv[0]);
    return 2;
  }
  attention = rpe_tvm_open(argv[1]);
  if (attention == NULL) {
    fprintf(stderr, "error: %s\n", rpe_tvm_last_error());
    return 1;
  }
  file = fopen(argv[2], "rb");
  if (file == NULL || fread(sizes, sizeof(int64_t), 5, file) != 5) {
    fprintf(stderr, "error: cannot read %s\n", argv[2]);
    return 1;
  }
  batch = sizes[0], heads = sizes[1], n = sizes[2], channels = heads * sizes[4];
  x = read_floats(file, batch * n * channels);
  qkv = read_floats(file, batch * n * 3 * channels);
  rpe_bias = read_floats(file, heads * (2 * n - 1));
  projection = read_floats(file, sizes[3] * sizes[4]);
  fclose(file);
  merged = malloc((size_t)(batch * n * channels) * sizeof(float));

  arguments.batch = batch, arguments.heads = heads, arguments.n_query = arguments.n_key = n;
  arguments.num_features = sizes[3], arguments.head_dim = sizes[4];
  arguments.query = qkv, arguments.key = qkv + channels, arguments.value = qkv + 2 * channels;
  arguments.query_strides.batch = n * 3 * channels;
  arguments.query_strides.head = sizes[4];
  arguments.query_strides.position = 3 * channels;
  arguments.key_strides = arguments.value_strides = arguments.query_strides;
  arguments.rpe_bias = rpe_bias, arguments.num_offsets = 2 * n - 1, arguments.projection = projection;
  arguments.out = merged;
  arguments.out_strides.batch = n * channels;
  arguments.out_strides.head = sizes[4];
  arguments.out_strides.position = channels;
  if (rpe_tvm_attention(attention, &arguments) != 0) {
    fprintf(stderr, "error: %s\n", rpe_tvm_last_error());
    return 1;
  }
  for (i = 0; i < batch * n; ++i) add_and_normalise(x + i * channels, merged + i * channels, channels);

  file = fopen(argv[3], "wb");
  i = batch * n * channels;
  if (file == NULL || fwrite(x, sizeof(float), (size_t)i, file) != (size_t)i || fclose(file) != 0) {
    fprintf(stderr, "error: cannot write %s\n", argv[3]);
    return 1;
  }
  free(x), free(qkv), free(rpe_bias), free(projection), free(merged);
  rpe_tvm_close(attention);
  return 0;
}

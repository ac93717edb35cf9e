/* Checks a bundle on this machine: attention of random numbers against the definition in double precision.
 *
 *     self_check BUNDLE [N ...]
 */
#define _POSIX_C_SOURCE 200809L

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "rpe_tvm.h"

enum { HEADS = 2 };
static const double TOLERANCE = 2e-5; /* of float32, times the largest value */

static float *random_floats(int64_t count, double scale) {
  float *data = malloc((size_t)count * sizeof(float));
  int64_t i;
  if (data == NULL) exit(1);
  for (i = 0; i < count; ++i) { /* twelve uniform numbers make nearly a normal one */
    double sum = -6;
    int j;
    for (j = 0; j < 12; ++j) sum += rand() / (RAND_MAX + 1.0);
    data[i] = (float)(scale * sum);
  }
  return data;
}

/* phi(x) of NPRF up to a factor that cancels: exp(w . x / |x|). */
static void features(const float *x, const float *projection, int64_t m, int64_t d, double *phi) {
  double norm = 0, sum;
  int64_t i, c;
  for (c = 0; c < d; ++c) norm += (double)x[c] * x[c];
  for (i = 0; i < m; ++i) {
    for (c = 0, sum = 0; c < d; ++c) sum += (double)projection[i * d + c] * x[c];
    phi[i] = exp(sum / sqrt(norm));
  }
}

/* The largest error of a call with n positions, over the largest value; -1 where the call fails. */
static double error_of(rpe_tvm_operator *attention, int64_t n, double *milliseconds) {
  const int64_t m = rpe_tvm_num_features(attention), d = rpe_tvm_head_dim(attention), size = HEADS * n * d;
  rpe_tvm_arguments a = {0};
  float *query = random_floats(size, 1), *key = random_floats(size, 1), *value = random_floats(size, 1);
  float *rpe_bias = random_floats(HEADS * (2 * n - 1), 0.5), *projection = random_floats(m * d, 1);
  float *out = random_floats(size, 1);
  double *phi = malloc((size_t)((n + 1) * m) * sizeof(double)), *sums = malloc((size_t)d * sizeof(double));
  double error = 0, largest = 0;
  struct timespec start, end;
  int64_t h, i, j, c;
  a.batch = 1, a.heads = HEADS, a.n_query = a.n_key = n, a.num_offsets = 2 * n - 1;
  a.num_features = m, a.head_dim = d;
  a.query = query, a.key = key, a.value = value, a.rpe_bias = rpe_bias, a.projection = projection, a.out = out;
  if (phi == NULL || sums == NULL || rpe_tvm_attention(attention, &a) != 0) return -1; /* and makes memory */
  clock_gettime(CLOCK_MONOTONIC, &start);
  if (rpe_tvm_attention(attention, &a) != 0) return -1;
  clock_gettime(CLOCK_MONOTONIC, &end);
  *milliseconds = 1e3 * (double)(end.tv_sec - start.tv_sec) + 1e-6 * (double)(end.tv_nsec - start.tv_nsec);
  for (h = 0; h < HEADS; ++h) {
    for (j = 0; j < n; ++j) features(key + (h * n + j) * d, projection, m, d, phi + j * m);
    for (i = 0; i < n; ++i) {
      double denominator = 0, *phi_q = phi + n * m;
      features(query + (h * n + i) * d, projection, m, d, phi_q);
      for (c = 0; c < d; ++c) sums[c] = 0;
      for (j = 0; j < n; ++j) {
        double weight = 0;
        for (c = 0; c < m; ++c) weight += phi_q[c] * phi[j * m + c];
        weight *= exp(rpe_bias[h * (2 * n - 1) + j - i + n - 1]);
        denominator += weight;
        for (c = 0; c < d; ++c) sums[c] += weight * value[(h * n + j) * d + c];
      }
      for (c = 0; c < d; ++c) {
        double expected = sums[c] / denominator, off = fabs(expected - out[(h * n + i) * d + c]);
        if (!(off <= error)) error = off; /* a NaN is larger, too */
        if (fabs(expected) > largest) largest = fabs(expected);
      }
    }
  }
  free(query), free(key), free(value), free(rpe_bias), free(projection), free(out), free(phi), free(sums);
  return error / largest;
}

int main(int argc, char **argv) {
  rpe_tvm_operator *attention;
  int i, failed = 0;
  if (argc < 2) {
    fprintf(stderr, "usage: %s BUNDLE [N ...]\n", argv[0]);
    return 2;
  }
  attention = rpe_tvm_open(argv[1]);
  if (attention == NULL) {
    fprintf(stderr, "error: %s\n", rpe_tvm_last_error());
    return 1;
  }
  printf("variant %s, %lld features, head_dim %lld, up to n = %lld\n", rpe_tvm_variant(attention),
         (long long)rpe_tvm_num_features(attention), (long long)rpe_tvm_head_dim(attention),
         (long long)rpe_tvm_max_length(attention));
  for (i = 2; i < argc || i == 2; ++i) {
    int64_t n = argc > 2 ? atoll(argv[i]) : rpe_tvm_max_length(attention);
    double milliseconds = 0, error = n < 1 ? -1 : error_of(attention, n, &milliseconds);
    if (error == -1) {
      fprintf(stderr, "error: n = %lld: %s\n", (long long)n, n < 1 ? "expected 1 or more" : rpe_tvm_last_error());
      failed = 1;
      continue;
    }
    failed |= !(error <= TOLERANCE);
    printf("n = %lld: error %.1e, %s; %d heads in %.2f ms\n", (long long)n, error, error <= TOLERANCE ? "ok" : "WRONG",
           HEADS, milliseconds);
  }
  rpe_tvm_close(attention);
  return failed;
}

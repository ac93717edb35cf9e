#include "bundle.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "manifest.h"

static const char MANIFEST[] = "bundle.txt";

static int read_library(const char *directory, const char *line, rpe_tvm_bundle *bundle) {
  rpe_tvm_library library = {0}, *libraries;
  char target[64], algorithm[16], sha256[65];
  long long bytes;
  unsigned char *data;
  if (sscanf(line, "library %63s %" SCNd64 " %15s %" SCNd64 " %" SCNd64 " %*s %lld %64s %255[^\n]", target,
             &library.length, algorithm, &library.columns, &library.step, &bytes, sha256, library.file) != 8) {
    return rpe_tvm_fail("%s has a line that this host cannot read: %s", MANIFEST, line);
  }
  if (strcmp(target, bundle->variant) != 0) return 0;
  library.is_fft = strcmp(algorithm, "fft") == 0;
  /* the positions of an FFT are whole rows; tiles are rounded up to them */
  if (library.length < 1 || library.columns < 1 || library.step < 1 ||
      (library.is_fft && library.step % library.columns != 0)) {
    return rpe_tvm_fail("%s has impossible sizes: %s", MANIFEST, line);
  }
  if (bundle->num_libraries > 0 && library.length <= bundle->libraries[bundle->num_libraries - 1].length) {
    return rpe_tvm_fail("%s does not list its libraries by length.", MANIFEST);
  }
  data = rpe_tvm_read_checked(directory, library.file, bytes, sha256);
  if (data == NULL) return -1;
  free(data);
  libraries = realloc(bundle->libraries, sizeof *libraries * (size_t)(bundle->num_libraries + 1));
  if (libraries == NULL) return rpe_tvm_fail("Out of memory.");
  libraries[bundle->num_libraries++] = library;
  bundle->libraries = libraries;
  return 0;
}

static int read_tables(const char *directory, const char *line, rpe_tvm_bundle *bundle) {
  char target[64], sha256[65], file[256];
  int64_t length;
  long long bytes;
  rpe_tvm_library *last = bundle->libraries + bundle->num_libraries - 1;
  if (sscanf(line, "tables %63s %" SCNd64 " %lld %64s %255[^\n]", target, &length, &bytes, sha256, file) != 5) {
    return rpe_tvm_fail("%s has a line that this host cannot read: %s", MANIFEST, line);
  }
  if (strcmp(target, bundle->variant) != 0) return 0;
  if (bundle->num_libraries == 0 || last->length != length || last->tables != NULL) {
    return rpe_tvm_fail("%s has tables without a library: %s", MANIFEST, line);
  }
  last->tables = (float *)(void *)rpe_tvm_read_checked(directory, file, bytes, sha256);
  last->num_tables = bytes / (long long)sizeof(float);
  return last->tables == NULL ? -1 : 0;
}

static int read_libraries(const char *directory, const char *text, rpe_tvm_bundle *bundle) {
  char line[RPE_TVM_MAX_LINE];
  while (rpe_tvm_next_line(&text, line)) {
    if (strncmp(line, "library ", 8) == 0 && read_library(directory, line, bundle) != 0) return -1;
    if (strncmp(line, "tables ", 7) == 0 && read_tables(directory, line, bundle) != 0) return -1;
  }
  if (bundle->num_libraries == 0) return rpe_tvm_fail("The bundle has no library for %s.", bundle->variant);
  return 0;
}

int rpe_tvm_bundle_read(const char *directory, rpe_tvm_bundle *bundle) {
  char op[32] = "";
  char *text = rpe_tvm_read_manifest(directory, MANIFEST, "rpe_tvm-bundle");
  const char *line;
  int status = -1;
  memset(bundle, 0, sizeof *bundle);
  if (text == NULL) return -1;
  line = strstr(text, "\noperator ");
  if (line == NULL ||
      sscanf(line, "\noperator %31s %" SCNd64 " %" SCNd64, op, &bundle->num_features, &bundle->head_dim) != 3) {
    rpe_tvm_fail("%s names no operator.", MANIFEST);
  } else if (strcmp(op, "attention") != 0) {
    rpe_tvm_fail("The bundle is of the operator %s, this host runs attention.", op);
  } else if (rpe_tvm_choose_variant(text, bundle->variant) == 0) {
    status = read_libraries(directory, text, bundle);
  }
  free(text);
  if (status != 0) rpe_tvm_bundle_free(bundle);
  return status;
}

void rpe_tvm_bundle_free(rpe_tvm_bundle *bundle) {
  int i;
  for (i = 0; i < bundle->num_libraries; ++i) free(bundle->libraries[i].tables);
  free(bundle->libraries);
  memset(bundle, 0, sizeof *bundle);
}

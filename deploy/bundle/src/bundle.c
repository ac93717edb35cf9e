#include "bundle.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <features.h>
#endif
#ifdef __GLIBC__
#include <gnu/libc-version.h>
#endif

#include "cpu.h"
#include "error.h"
#include "sha256.h"

enum { FORMAT = 1, MAX_LINE = 4096 };
static const char MANIFEST[] = "bundle.txt";

/* Reads a file into memory of malloc and puts a zero behind it; NULL after rpe_tvm_fail. */
static unsigned char *read_file(const char *directory, const char *name, size_t *size) {
  char *path = rpe_tvm_path(directory, name);
  FILE *file = path == NULL ? NULL : fopen(path, "rb");
  unsigned char *data = NULL;
  long end = -1;
  if (file == NULL) {
    rpe_tvm_fail("Cannot read %s in %s: %s.", name, directory, path == NULL ? "out of memory" : strerror(errno));
    free(path);
    return NULL;
  }
  if (fseek(file, 0, SEEK_END) == 0) end = ftell(file);
  if (end >= 0 && fseek(file, 0, SEEK_SET) == 0) data = malloc((size_t)end + 1);
  if (data == NULL || fread(data, 1, (size_t)end, file) != (size_t)end) {
    rpe_tvm_fail("Cannot read %s in %s to its end.", name, directory);
    free(data);
    data = NULL;
  } else {
    *size = (size_t)end;
    data[end] = 0;
  }
  fclose(file);
  free(path);
  return data;
}

static unsigned char *read_checked(const char *directory, const char *name, long long bytes, const char *sha256) {
  size_t size = 0;
  char found[65];
  unsigned char *data = read_file(directory, name, &size);
  if (data == NULL) return NULL;
  if ((long long)size != bytes) {
    rpe_tvm_fail("%s was altered or truncated: expected %lld bytes, got %lld. Unpack the bundle again.", name, bytes,
                 (long long)size);
  } else {
    rpe_tvm_sha256(data, size, found);
    if (strcmp(found, sha256) == 0) return data;
    rpe_tvm_fail("%s was altered: expected SHA-256 %.12s..., got %.12s.... Unpack the bundle again.", name, sha256,
                 found);
  }
  free(data);
  return NULL;
}

/* Copies the line at *text, without its end, and moves *text behind it; 0 at the end of the text. */
static int next_line(const char **text, char line[MAX_LINE]) {
  const char *end = strchr(*text, '\n');
  size_t length = end == NULL ? 0 : (size_t)(end - *text);
  if (end == NULL || length >= MAX_LINE) return 0;
  memcpy(line, *text, length);
  line[length] = '\0';
  *text = end + 1;
  return 1;
}

/* Checks the first line and the hash in the last one. */
static int check_manifest(const char *text, size_t size) {
  int format = 0;
  const char *end = strstr(text, "\nend ");
  char found[65], expected[65] = "";
  if (sscanf(text, "rpe_tvm-bundle %d", &format) != 1) return rpe_tvm_fail("%s is no bundle of rpe_tvm.", MANIFEST);
  if (format != FORMAT) {
    return rpe_tvm_fail("The bundle has format %d, this host reads format %d: use the host that came with it.", format,
                        FORMAT);
  }
  if (end == NULL || sscanf(end, "\nend %64s", expected) != 1 || strlen(text) != size) {
    return rpe_tvm_fail("%s was truncated: its last line is missing. Unpack the bundle again.", MANIFEST);
  }
  rpe_tvm_sha256((const unsigned char *)text, (size_t)(end + 1 - text), found);
  if (strcmp(found, expected) != 0) {
    return rpe_tvm_fail("%s was altered: expected SHA-256 %.12s..., got %.12s.... Unpack the bundle again.", MANIFEST,
                        expected, found);
  }
  return 0;
}

/* How many features of this CPU a variant uses; -1 after a line about why it cannot run here. */
static int fit_of(const char *target, const char *machine, const char *glibc, char *features) {
  char *feature;
  int count = 0, lacking = 0;
  if (strcmp(machine, rpe_tvm_machine()) != 0) {
    return rpe_tvm_append("\n  - %s: compiled for %s machines, and this is %s", target, machine, rpe_tvm_machine());
  }
  for (feature = strtok(features, ","); feature != NULL; feature = strtok(NULL, ",")) {
    if (strcmp(feature, "-") == 0) continue;
    ++count;
    if (rpe_tvm_cpu_has(feature)) continue;
    if (lacking++ == 0) rpe_tvm_append("\n  - %s: this CPU lacks", target);
    rpe_tvm_append("%s %s", lacking > 1 ? "," : "", feature);
  }
  if (lacking > 0) return -1;
#ifdef __GLIBC__
  {
    int major = 0, minor = 0, major_here = 0, minor_here = 0;
    sscanf(glibc, "%d.%d", &major, &minor);
    sscanf(gnu_get_libc_version(), "%d.%d", &major_here, &minor_here);
    if (major_here < major || (major_here == major && minor_here < minor)) {
      return rpe_tvm_append("\n  - %s: needs glibc %s or later, this system has %s; package on an older system", target,
                            glibc, gnu_get_libc_version());
    }
  }
#else
  (void)glibc;
#endif
  return count;
}

static int choose_variant(const char *text, char variant[64]) {
  char line[MAX_LINE], target[64], machine[32], glibc[16], features[MAX_LINE];
  int best = -1;
  rpe_tvm_fail("No variant of the bundle runs here:");
  while (next_line(&text, line)) {
    if (sscanf(line, "variant %63s %31s %15s %*s %4095s", target, machine, glibc, features) == 4) {
      int fit = fit_of(target, machine, glibc, features);
      if (fit > best) {
        best = fit;
        strcpy(variant, target);
      }
    }
  }
  return best < 0 ? -1 : 0;
}

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
  if (library.length < 1 || library.columns < 1 || library.step < 1 || library.step % library.columns != 0) {
    return rpe_tvm_fail("%s has impossible sizes: %s", MANIFEST, line);
  }
  library.is_fft = strcmp(algorithm, "fft") == 0;
  if (bundle->num_libraries > 0 && library.length <= bundle->libraries[bundle->num_libraries - 1].length) {
    return rpe_tvm_fail("%s does not list its libraries by length.", MANIFEST);
  }
  data = read_checked(directory, library.file, bytes, sha256);
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
  last->tables = (float *)(void *)read_checked(directory, file, bytes, sha256);
  last->num_tables = bytes / (long long)sizeof(float);
  return last->tables == NULL ? -1 : 0;
}

static int read_libraries(const char *directory, const char *text, rpe_tvm_bundle *bundle) {
  char line[MAX_LINE];
  while (next_line(&text, line)) {
    if (strncmp(line, "library ", 8) == 0 && read_library(directory, line, bundle) != 0) return -1;
    if (strncmp(line, "tables ", 7) == 0 && read_tables(directory, line, bundle) != 0) return -1;
  }
  if (bundle->num_libraries == 0) return rpe_tvm_fail("The bundle has no library for %s.", bundle->variant);
  return 0;
}

int rpe_tvm_bundle_read(const char *directory, rpe_tvm_bundle *bundle) {
  size_t size = 0;
  char op[32] = "";
  unsigned char *data = read_file(directory, MANIFEST, &size);
  const char *text = (const char *)data, *operator_line;
  int status = -1;
  memset(bundle, 0, sizeof *bundle);
  if (data == NULL) return rpe_tvm_append(" Expected the directory of an unpacked bundle.");
  if (check_manifest(text, size) != 0) goto done;
  operator_line = strstr(text, "\noperator ");
  if (operator_line == NULL || sscanf(operator_line, "\noperator %31s %" SCNd64 " %" SCNd64, op, &bundle->num_features,
                                      &bundle->head_dim) != 3) {
    rpe_tvm_fail("%s names no operator.", MANIFEST);
    goto done;
  }
  if (strcmp(op, "attention") != 0) {
    rpe_tvm_fail("The bundle is of the operator %s, this host runs attention.", op);
    goto done;
  }
  if (choose_variant(text, bundle->variant) == 0) status = read_libraries(directory, text, bundle);
done:
  free(data);
  if (status != 0) rpe_tvm_bundle_free(bundle);
  return status;
}

void rpe_tvm_bundle_free(rpe_tvm_bundle *bundle) {
  int i;
  for (i = 0; i < bundle->num_libraries; ++i) free(bundle->libraries[i].tables);
  free(bundle->libraries);
  memset(bundle, 0, sizeof *bundle);
}

char *rpe_tvm_path(const char *directory, const char *file) {
  size_t size = strlen(directory) + strlen(file) + 2;
  char *path = malloc(size);
  if (path != NULL) snprintf(path, size, "%s/%s", directory, file);
  return path;
}

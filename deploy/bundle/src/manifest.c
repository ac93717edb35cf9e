#define _POSIX_C_SOURCE 200809L

#include "manifest.h"

#include <errno.h>
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

enum { FORMAT = 1 };

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

unsigned char *rpe_tvm_read_checked(const char *directory, const char *name, long long bytes, const char *sha256) {
  size_t size = 0;
  char found[65];
  unsigned char *data = read_file(directory, name, &size);
  if (data == NULL) return NULL;
  if ((long long)size != bytes) {
    rpe_tvm_fail("%s was altered or truncated: expected %lld bytes, got %lld. Unpack it again.", name, bytes,
                 (long long)size);
  } else {
    rpe_tvm_sha256(data, size, found);
    if (strcmp(found, sha256) == 0) return data;
    rpe_tvm_fail("%s was altered: expected SHA-256 %.12s..., got %.12s.... Unpack it again.", name, sha256,
                 found);
  }
  free(data);
  return NULL;
}

int rpe_tvm_next_line(const char **text, char line[RPE_TVM_MAX_LINE]) {
  const char *end = strchr(*text, '\n');
  size_t length = end == NULL ? 0 : (size_t)(end - *text);
  if (end == NULL || length >= RPE_TVM_MAX_LINE) return 0;
  memcpy(line, *text, length);
  line[length] = '\0';
  *text = end + 1;
  return 1;
}

/* Checks the first line and the hash in the last one. */
static int check(const char *name, const char *kind, const char *text, size_t size) {
  int format = 0;
  const char *end = strstr(text, "\nend ");
  size_t length = strlen(kind);
  char found[65], expected[65] = "";
  if (strncmp(text, kind, length) != 0 || sscanf(text + length, " %d", &format) != 1) {
    return rpe_tvm_fail("%s is no %s.", name, kind);
  }
  if (format != FORMAT) {
    return rpe_tvm_fail("%s has format %d, this host reads format %d: use the host that came with it.", name, format,
                        FORMAT);
  }
  if (end == NULL || sscanf(end, "\nend %64s", expected) != 1 || strlen(text) != size) {
    return rpe_tvm_fail("%s was truncated: its last line is missing. Unpack it again.", name);
  }
  rpe_tvm_sha256((const unsigned char *)text, (size_t)(end + 1 - text), found);
  if (strcmp(found, expected) != 0) {
    return rpe_tvm_fail("%s was altered: expected SHA-256 %.12s..., got %.12s.... Unpack it again.", name, expected,
                        found);
  }
  return 0;
}

char *rpe_tvm_read_manifest(const char *directory, const char *name, const char *kind) {
  size_t size = 0;
  char *text = (char *)read_file(directory, name, &size);
  if (text == NULL) {
    rpe_tvm_append(" Expected the directory of an unpacked %s.", kind);
  } else if (check(name, kind, text, size) != 0) {
    free(text);
    text = NULL;
  }
  return text;
}

/* How many features of this CPU a variant uses; -1 after a line about why it cannot run here. */
static int fit_of(const char *target, const char *machine, const char *glibc, char *features) {
  char *feature, *rest = NULL;
  int count = 0, lacking = 0;
  if (strcmp(machine, rpe_tvm_machine()) != 0) {
    return rpe_tvm_append("\n  - %s: compiled for %s machines, and this is %s", target, machine, rpe_tvm_machine());
  }
  for (feature = strtok_r(features, ",", &rest); feature != NULL; feature = strtok_r(NULL, ",", &rest)) {
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

int rpe_tvm_choose_variant(const char *text, char variant[64]) {
  char line[RPE_TVM_MAX_LINE], target[64], machine[32], glibc[16], features[RPE_TVM_MAX_LINE];
  int best = -1;
  rpe_tvm_fail("Nothing of this runs here:");
  while (rpe_tvm_next_line(&text, line)) {
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

char *rpe_tvm_path(const char *directory, const char *file) {
  size_t size = strlen(directory) + strlen(file) + 2;
  char *path = malloc(size);
  if (path != NULL) snprintf(path, size, "%s/%s", directory, file);
  return path;
}

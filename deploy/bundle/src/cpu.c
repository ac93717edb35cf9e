#define _POSIX_C_SOURCE 200809L

#include "cpu.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(__aarch64__) || defined(__arm__)
#include <sys/auxv.h>
#endif

const char *rpe_tvm_machine(void) {
#if defined(__x86_64__)
  return "x86_64";
#elif defined(__aarch64__)
  return "aarch64";
#elif defined(__arm__)
  return "armv7";
#else
  return "unknown";
#endif
}

#if defined(__aarch64__) || defined(__arm__)

/* The bits of the hardware capabilities that Linux hands to a process, from bit 0 on, by their names in /proc/cpuinfo:
 * under user-mode emulation that file is of the emulating machine. Source: Linux, include/uapi/asm/hwcap.h. */
#if defined(__aarch64__)
static const char *const HWCAP[] = {
    "fp",    "asimd", "evtstrm", "aes",     "pmull", "sha1",    "sha2",     "crc32", "atomics", "fphp",   "asimdhp",
    "cpuid", "asimdrdm", "jscvt", "fcma",   "lrcpc", "dcpop",   "sha3",     "sm3",   "sm4",     "asimddp", "sha512",
    "sve",   "asimdfhm", "dit",  "uscat",   "ilrcpc", "flagm",  "ssbs",     "sb",    "paca",    "pacg"};
static const char *const HWCAP2[] = {"dcpodp", "sve2",     "sveaes",   "svepmull", "svebitperm", "svesha3",
                                     "svesm4", "flagm2",   "frint",    "svei8mm",  "svef32mm",   "svef64mm",
                                     "svebf16", "i8mm",    "bf16",     "dgh",      "rng",        "bti"};
#else
static const char *const HWCAP[] = {"swp",     "half",  "thumb", "26bit",    "fastmult", "fpa",   "vfp",   "edsp",
                                    "java",    "iwmmxt", "crunch", "thumbee", "neon",    "vfpv3", "vfpv3d16", "tls",
                                    "vfpv4",   "idiva", "idivt", "vfpd32",   "lpae",     "evtstrm"};
static const char *const HWCAP2[] = {"aes", "pmull", "sha1", "sha2", "crc32"};
#endif

static int has_bit(unsigned long bits, const char *const *names, size_t count, const char *feature) {
  size_t bit;
  for (bit = 0; bit < count; ++bit) {
    if (strcmp(names[bit], feature) == 0) return (int)(bits >> bit & 1);
  }
  return 0;
}

int rpe_tvm_cpu_has(const char *feature) {
  return has_bit(getauxval(AT_HWCAP), HWCAP, sizeof HWCAP / sizeof HWCAP[0], feature) ||
         has_bit(getauxval(AT_HWCAP2), HWCAP2, sizeof HWCAP2 / sizeof HWCAP2[0], feature);
}

#else

/* Whether `word` stands in `text`, between spaces. */
static int has_word(const char *text, const char *word) {
  size_t length = strlen(word);
  const char *found = text;
  while ((found = strstr(found, word)) != NULL) {
    int begins = found == text || found[-1] == ' ' || found[-1] == '\t';
    if (begins && (found[length] == ' ' || found[length] == '\n' || found[length] == '\0')) return 1;
    found += length;
  }
  return 0;
}

int rpe_tvm_cpu_has(const char *feature) {
  FILE *file = fopen("/proc/cpuinfo", "r");
  char *line = NULL;
  size_t size = 0;
  int found = 0, all = 1; /* the processors may differ */
  if (file == NULL) return 0;
  while (getline(&line, &size, file) > 0) {
    char *value = strchr(line, ':');
    if (strncmp(line, "flags", 5) != 0 || value == NULL) continue;
    found = 1;
    all = all && has_word(value + 1, feature);
  }
  free(line);
  fclose(file);
  return found && all;
}

#endif

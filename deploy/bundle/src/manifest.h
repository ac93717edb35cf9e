/* Reads manifests, bundle.txt and model.txt, checks files against them, and chooses the variant for this machine.
 *
 * A manifest has lines of words between single spaces. Of every kind are:
 *
 *     KIND 1                                                       the first line
 *     versions PACKAGE VERSION ...
 *     variant TARGET MACHINE GLIBC THREADS FEATURE,FEATURE,...     a "-" stands for no features
 *     end SHA256                                                   of all lines above
 */
#ifndef RPE_TVM_MANIFEST_H_
#define RPE_TVM_MANIFEST_H_

#include <stddef.h>

enum { RPE_TVM_MAX_LINE = 4096 };

/* The text of a manifest in memory of malloc, NULL after rpe_tvm_fail. */
char *rpe_tvm_read_manifest(const char *directory, const char *name, const char *kind);

/* Copies the line at *text, without its end, and moves *text behind it; 0 at the end of the text. */
int rpe_tvm_next_line(const char **text, char line[RPE_TVM_MAX_LINE]);

/* Writes the name of the variant that uses most of this CPU, of several the first. Returns 0, or -1 after rpe_tvm_fail
 * with a line for each variant. */
int rpe_tvm_choose_variant(const char *text, char variant[64]);

/* A file of this size and hash in memory of malloc, with a zero behind it; NULL after rpe_tvm_fail. */
unsigned char *rpe_tvm_read_checked(const char *directory, const char *name, long long bytes, const char *sha256);

/* `directory`/`file` in memory of malloc; NULL where there is none left. */
char *rpe_tvm_path(const char *directory, const char *file);

#endif

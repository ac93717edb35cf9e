/* SHA-256 (FIPS 180-4). */
#ifndef RPE_TVM_SHA256_H_
#define RPE_TVM_SHA256_H_

#include <stddef.h>

/* Writes 64 hexadecimal digits and a zero. */
void rpe_tvm_sha256(const unsigned char *data, size_t size, char digits[65]);

#endif

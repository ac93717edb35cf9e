/* The message of the last error of each thread. */
#ifndef RPE_TVM_ERROR_H_
#define RPE_TVM_ERROR_H_

#if defined(__GNUC__)
#define RPE_TVM_FORMAT __attribute__((format(printf, 1, 2)))
#else
#define RPE_TVM_FORMAT
#endif

/* Both return -1; `append` goes on with what is there. */
int rpe_tvm_fail(const char *format, ...) RPE_TVM_FORMAT;
int rpe_tvm_append(const char *format, ...) RPE_TVM_FORMAT;

/* Of rpe_tvm.h: the message. */
const char *rpe_tvm_last_error(void);

#endif

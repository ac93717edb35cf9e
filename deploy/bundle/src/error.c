#include "error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "kernel_abi.h"


static __thread char message[4096];

static void add(const char *format, va_list arguments) {
  size_t used = strlen(message);
  vsnprintf(message + used, sizeof message - used, format, arguments);
}

int rpe_tvm_fail(const char *format, ...) {
  va_list arguments;
  message[0] = '\0';
  va_start(arguments, format);
  add(format, arguments);
  va_end(arguments);
  return -1;
}

int rpe_tvm_append(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  add(format, arguments);
  va_end(arguments);
  return -1;
}

const char *rpe_tvm_last_error(void) { return message; }

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t num_parts) {
  int32_t i;
  rpe_tvm_fail("%s: ", kind);
  for (i = 0; i < num_parts; ++i) {
    if (parts[i] != NULL) rpe_tvm_append("%s", parts[i]);
  }
}

void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *text) { rpe_tvm_fail("%s: %s", kind, text); }

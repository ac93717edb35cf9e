/* What this machine's CPU is and can do. */
#ifndef RPE_TVM_CPU_H_
#define RPE_TVM_CPU_H_

/* "x86_64", "aarch64" or "armv7"; "unknown" elsewhere. */
const char *rpe_tvm_machine(void);

/* Whether the CPU has a feature, by its name in /proc/cpuinfo. */
int rpe_tvm_cpu_has(const char *feature);

#endif

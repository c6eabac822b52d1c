// The order in which the threads of the test's machine run.
#include "cuda_on_cpu.h"

extern "C" __attribute__((visibility("default"))) void cuda_on_cpu_reverse(int reverse) { cuda_on_cpu::machine.reverse = reverse != 0; }

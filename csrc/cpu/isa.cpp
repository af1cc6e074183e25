#include "isa.h"

namespace ivfast {
namespace {

Isa widest() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::generic;
}

const Isa supported = widest();
Isa chosen = supported;

}  // namespace

Isa isa() { return chosen; }

// For tests: sets the instruction set of all later calls (0 generic, 1 AVX2, 2 AVX-512) if this CPU has it; −1 changes
// nothing. Returns the one in use.
extern "C" __attribute__((visibility("default"))) int ivfast_isa(int wanted) {
  if (0 <= wanted && wanted <= int(supported)) chosen = Isa(wanted);
  return int(chosen);
}

}  // namespace ivfast

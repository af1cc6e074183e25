// The kernels of the Fréchet ops.
#if defined(__x86_64__)
#include "isa/avx2.h"
#include "fld_kernel.h"
#include "isa/end.h"
#endif

// The kernels of fld and of inverse_root, on which it stands.
#if defined(__x86_64__)
#include "isa/avx2.h"
#include "fld_kernel.h"
#include "isa/end.h"
#endif

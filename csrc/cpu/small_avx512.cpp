// The kernels of the small ops: a file per instruction set for all of them.
#if defined(__x86_64__)
#include "isa/avx512.h"
#include "bridge_kernel.h"
#include "gaussian_kernel.h"
#include "linear_adam_kernel.h"
#include "multi_js_kernel.h"
#include "reconstruction_kernel.h"
#include "isa/end.h"
#endif

#if defined(__x86_64__)
#include "isa/avx2.h"
#include "linear_adam_kernel.h"
#include "isa/end.h"
#endif

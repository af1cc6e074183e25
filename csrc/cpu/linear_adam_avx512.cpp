#if defined(__x86_64__)
#include "isa/avx512.h"
#include "linear_adam_kernel.h"
#include "isa/end.h"
#endif

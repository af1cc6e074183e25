#if defined(__x86_64__)
#include "isa/avx512.h"
#include "reconstruction_kernel.h"
#include "isa/end.h"
#endif

#if defined(__x86_64__)
#include "isa/avx2.h"
#include "bridge_kernel.h"
#include "isa/end.h"
#endif

#if defined(__x86_64__)
#include "isa/avx2.h"
#include "as_distance_kernel.h"
#include "isa/end.h"
#endif

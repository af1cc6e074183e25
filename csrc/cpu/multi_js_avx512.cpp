#if defined(__x86_64__)
#include "isa/avx512.h"
#include "multi_js_kernel.h"
#include "isa/end.h"
#endif

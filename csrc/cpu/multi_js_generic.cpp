#include "isa/generic.h"
#include "multi_js_kernel.h"
#include "isa/end.h"

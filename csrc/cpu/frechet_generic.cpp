// The kernels of the Fréchet ops.
#include "isa/generic.h"
#include "fld_kernel.h"
#include "isa/end.h"

// The kernels of fld and of inverse_root, which fld uses.
#include "isa/generic.h"
#include "fld_kernel.h"
#include "isa/end.h"

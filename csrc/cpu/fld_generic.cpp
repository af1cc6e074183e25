// The kernels of fld and of inverse_root, on which it stands.
#include "isa/generic.h"
#include "fld_kernel.h"
#include "isa/end.h"

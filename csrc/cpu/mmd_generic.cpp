#include "isa/generic.h"
#include "mmd_kernel.h"
#include "isa/end.h"

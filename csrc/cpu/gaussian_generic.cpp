#include "isa/generic.h"
#include "gaussian_kernel.h"
#include "isa/end.h"

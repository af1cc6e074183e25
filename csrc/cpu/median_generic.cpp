#include "isa/generic.h"
#include "median_kernel.h"
#include "isa/end.h"

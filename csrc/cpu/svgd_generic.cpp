#include "isa/generic.h"
#include "svgd_kernel.h"
#include "isa/end.h"

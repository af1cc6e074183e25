#include "isa/generic.h"
#include "svgd_bridge_kernel.h"
#include "isa/end.h"

#include "isa/generic.h"
#include "as_distance_kernel.h"
#include "isa/end.h"

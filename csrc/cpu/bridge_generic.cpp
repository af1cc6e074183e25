#include "isa/generic.h"
#include "bridge_kernel.h"
#include "isa/end.h"

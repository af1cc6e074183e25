#include "isa/generic.h"
#include "reconstruction_kernel.h"
#include "isa/end.h"

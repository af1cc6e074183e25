#include "isa/generic.h"
#include "linear_adam_kernel.h"
#include "isa/end.h"

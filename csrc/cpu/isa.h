// Which instruction set the kernels of this process use: the widest that the CPU has.
//
// A kernel header is compiled once per instruction set, by <op>_avx512.cpp, <op>_avx2.cpp and <op>_generic.cpp, into
// the namespaces avx512, avx2 and generic; the operator picks one at run time with `IVFAST_BY_ISA`.
#pragma once

namespace ivfast {

enum class Isa : int { generic, avx2, avx512 };

Isa isa();

}  // namespace ivfast

// Declares a function in the namespace of each instruction set
#define IVFAST_IN_EACH_ISA(...)     \
  namespace avx512 { __VA_ARGS__; } \
  namespace avx2 { __VA_ARGS__; }   \
  namespace generic { __VA_ARGS__; }

// function(…) of the namespace that serves
#if defined(__x86_64__)
#define IVFAST_BY_ISA(function, ...)                                    \
  (::ivfast::isa() == ::ivfast::Isa::avx512 ? avx512::function(__VA_ARGS__) \
   : ::ivfast::isa() == ::ivfast::Isa::avx2 ? avx2::function(__VA_ARGS__)   \
                                            : generic::function(__VA_ARGS__))
#else
#define IVFAST_BY_ISA(function, ...) generic::function(__VA_ARGS__)
#endif

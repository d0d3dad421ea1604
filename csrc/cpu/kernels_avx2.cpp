// The kernels for AVX2 + FMA + F16C. The pragma stays in force to the end of the file, where templates compile.
#include "isa.h"

#if ADAPTLORA_X86_KERNELS
#include <immintrin.h>
#pragma GCC target("avx2,fma,f16c")
#define ADAPTLORA_ISA_NAMESPACE isa_avx2
#define ADAPTLORA_LANES 8
#include "kernels.h"

namespace adaptlora {
extern constexpr Kernels kernels_avx2 = isa_avx2::make_kernels("avx2");
}
#endif

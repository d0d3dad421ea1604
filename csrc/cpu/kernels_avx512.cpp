// The kernels for AVX-512 F, BW, DQ, VL. The pragma stays in force to the end of the file, where templates compile.
#include "isa.h"

#if ADAPTLORA_X86_KERNELS
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define ADAPTLORA_ISA_NAMESPACE isa_avx512
#define ADAPTLORA_LANES 16
#include "kernels.h"

namespace adaptlora {
extern constexpr Kernels kernels_avx512 = isa_avx512::make_kernels("avx512");
}
#endif

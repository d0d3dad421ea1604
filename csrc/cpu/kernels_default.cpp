// The kernels for any machine: 4-lane vectors, which are SSE2 on x86-64.
#define ADAPTLORA_ISA_NAMESPACE isa_default
#define ADAPTLORA_LANES 4
#include "kernels.h"

namespace adaptlora {
extern constexpr Kernels kernels_default = isa_default::make_kernels("default");
}

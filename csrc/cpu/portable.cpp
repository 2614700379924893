// The tile of avx512_bf16 in whatever instructions the compiler's baseline has. Slow: it is there
// to test that tile where the processor lacks its registers, and is never chosen by itself.
#define FASTCOV_VARIANT portable
#define FASTCOV_VECTOR_BYTES 64
#define FASTCOV_ROWS 8
#define FASTCOV_VECTORS 3
#define FASTCOV_BFLOAT_PAIRS
#include "variant.h"

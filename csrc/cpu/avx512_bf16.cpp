// As avx512f, with bf16 keys multiplied in pairs into float32.
#define FASTCOV_VARIANT avx512_bf16
#define FASTCOV_VECTOR_BYTES 64
#define FASTCOV_ROWS 8
#define FASTCOV_VECTORS 3
#define FASTCOV_BFLOAT_PAIRS
#include "variant.h"

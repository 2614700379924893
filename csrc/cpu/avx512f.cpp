// 512-bit registers, thirty-two of them: a tile of 8 x 48 float or 8 x 24 double.
#define FASTCOV_VARIANT avx512f
#define FASTCOV_VECTOR_BYTES 64
#define FASTCOV_ROWS 8
#define FASTCOV_VECTORS 3
#include "variant.h"

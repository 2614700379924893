// 256-bit registers, sixteen of them: a tile of 4 x 24 float or 4 x 12 double.
#define FASTCOV_VARIANT avx2
#define FASTCOV_VECTOR_BYTES 32
#define FASTCOV_ROWS 4
#define FASTCOV_VECTORS 3
#include "variant.h"

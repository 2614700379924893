// Which variants are in this build, and which this processor can run.
#include "rank_k.h"

namespace fastcov::cpu {
namespace {

bool always() { return true; }

#if defined(FASTCOV_X86)
// __builtin_cpu_supports asks the operating system too, whether it saves the wide registers.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512f() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512f() && __builtin_cpu_supports("avx512bf16"); }
#endif
#if defined(FASTCOV_AMX)
// Its packing is in vectors of avx512f, and so is what it leaves to that variant.
#if defined(FASTCOV_EMULATE_AMX)
bool has_amx_bf16() { return true; }  // for tests: tiles in plain C++
#else
bool has_amx_bf16() { return has_avx512f() && amx_bf16::supported(); }
#endif
#endif

constexpr Variant kVariants[] = {
#if defined(FASTCOV_AMX)
    {"amx_bf16", has_amx_bf16, amx_bf16::run, amx_bf16::peak, nullptr, 0},
#endif
#if defined(FASTCOV_X86)
    {"avx512_bf16", has_avx512_bf16, avx512_bf16::run, avx512_bf16::peak, nullptr, 0},
    {"avx512f", has_avx512f, avx512f::run, avx512f::peak, avx512f::skinny, 64},
    {"avx2", has_avx2, avx2::run, avx2::peak, avx2::skinny, 32},
#endif
    {"portable", always, portable::run, portable::peak, portable::skinny, 64},
};

}  // namespace

bool is_intel() {
#if defined(FASTCOV_X86)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

const Variant* variants(int* count) {
  *count = static_cast<int>(sizeof(kVariants) / sizeof(kVariants[0]));
  return kVariants;
}

}  // namespace fastcov::cpu

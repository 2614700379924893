// Every variant of the CPU kernel that this processor can run, against a plain loop in double.
//
// The Python tests check the same through torch. This program needs nothing but itself, so it runs
// where Python does not: under an emulator of a processor that is not at hand, for example.
//
//   g++ -O2 -std=c++17 -fopenmp -static -Icsrc tests/native/check_cpu.cpp OBJECTS -o check_cpu
//
// with the objects of csrc/cpu, compiled as CMakeLists.txt says.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "cpu/rank_k.h"

using fastcov::cpu::Dtype;
using fastcov::cpu::Problem;
using fastcov::cpu::Variant;

namespace {

std::uint16_t bfloat(float value) {  // cut off: any bf16 number will do
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<std::uint16_t>(bits >> 16);
}

double number(std::uint16_t bits, Dtype dtype) {
  if (dtype == Dtype::kBFloat16) {
    const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
  const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
  const double size =
      exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  return bits & 0x8000 ? -size : size;
}

// Keys with NaN in the rows that are left out, and their values in double.
struct Keys {
  std::vector<char> bytes;
  std::vector<double> values;
};

Keys keys(Dtype dtype, std::int64_t count, std::mt19937& random) {
  std::normal_distribution<float> normal;
  Keys made;
  for (std::int64_t i = 0; i < count; ++i) {
    const float value = normal(random);
    char raw[8];
    std::size_t size = 4;
    double exact = value;
    if (dtype == Dtype::kFloat32) {
      std::memcpy(raw, &value, 4);
    } else if (dtype == Dtype::kFloat64) {
      std::memcpy(raw, &exact, size = 8);
    } else {
      // Any half of moderate size: sign, an exponent around one, any fraction.
      const std::uint16_t half = (random() & 0x83ff) | ((12 + random() % 6) << 10);
      const std::uint16_t bits = dtype == Dtype::kBFloat16 ? bfloat(value) : half;
      std::memcpy(raw, &bits, size = 2);
      exact = number(bits, dtype);
    }
    made.bytes.insert(made.bytes.end(), raw, raw + size);
    made.values.push_back(exact);
  }
  return made;
}

// The relative error of one update, infinite where something above the diagonal changed.
template <class T>
double error(const Variant& variant, Dtype dtype, std::int64_t n, std::int64_t d, bool strided,
             int threads, std::mt19937& random) {
  const Keys x = keys(dtype, n * d, random);
  std::vector<std::int64_t> offsets, kept;
  for (std::int64_t row = 0; row < n; ++row) {
    if (random() % 5 == 0) continue;
    kept.push_back(row);
    offsets.push_back(strided ? row : row * d);
  }
  std::vector<T> c(d * d, std::numeric_limits<T>::quiet_NaN());
  std::vector<double> wanted(d * d, 0.0);
  auto at = [&](std::int64_t row, std::int64_t column) {
    return x.values[strided ? column * n + row : row * d + column];
  };
  for (std::int64_t i = 0; i < d; ++i) {
    for (std::int64_t j = 0; j <= i; ++j) {
      c[i * d + j] = static_cast<T>(0.25);
      double sum = 0;
      for (const std::int64_t row : kept) sum += at(row, i) * at(row, j);
      wanted[i * d + j] = 0.25 - 0.5 * sum;
    }
  }
  const Dtype sums = sizeof(T) == 8 ? Dtype::kFloat64 : Dtype::kFloat32;
  variant.run(Problem{x.bytes.data(), dtype, strided ? n : 1, offsets.data(),
                      static_cast<std::int64_t>(offsets.size()), d, c.data(), sums, d, 1, -0.5,
                      threads});
  double difference = 0, norm = 0;
  for (std::int64_t i = 0; i < d; ++i) {
    for (std::int64_t j = 0; j < d; ++j) {
      if (j > i) {
        if (!std::isnan(c[i * d + j])) return std::numeric_limits<double>::infinity();
        continue;
      }
      difference += std::pow(c[i * d + j] - wanted[i * d + j], 2);
      norm += std::pow(wanted[i * d + j], 2);
    }
  }
  return std::sqrt(difference / norm);
}

}  // namespace

int main(int arguments, char** names) {  // with names, only these variants
  std::mt19937 random(1);
  int count = 0, failed = 0;
  const Variant* const all = fastcov::cpu::variants(&count);
  for (int v = 0; v < count; ++v) {
    bool named = arguments == 1;
    for (int i = 1; i < arguments; ++i) named |= std::strcmp(names[i], all[v].name) == 0;
    if (!named) continue;
    if (!all[v].supported()) {
      std::printf("%-12s cannot run here\n", all[v].name);
      continue;
    }
    double single = 0, twice = 0;
    int cases = 0;
    for (const std::int64_t d : {1, 23, 24, 49, 100, 401}) {
      for (const std::int64_t n : {1, 2, 255, 257, 600}) {
        for (const bool strided : {false, true}) {
          for (int code = 0; code < 4; ++code) {
            const Dtype dtype = static_cast<Dtype>(code);
            const int threads = 1 + cases++ % 3;
            const double e = error<float>(all[v], dtype, n, d, strided, threads, random);
            single = e <= single ? single : e;  // so that NaN stays
            if (std::strcmp(all[v].name, "avx512_bf16") == 0) continue;
            const double f = error<double>(all[v], dtype, n, d, strided, threads, random);
            twice = f <= twice ? twice : f;
          }
        }
      }
    }
    const bool good = single <= 1e-6 && twice <= 1e-14;
    failed += !good;
    std::printf("%-12s %d cases, largest relative error %.2g (float32 sums), %.2g (float64): %s\n",
                all[v].name, cases, single, twice, good ? "right" : "WRONG");
    std::fflush(stdout);
  }
  return failed != 0;
}

// The kernels of the file CAFE_KERNEL, for each instruction set in a namespace of its own. Included inside a namespace, after
// cpu.h or philox.h.
//   CAFE_WIDTH           floats in a vector
//   CAFE_ROWS            rows of a register tile
//   CAFE_MULTIPLY(a, b)  the 64-bit products of the low halves of 64-bit lanes
//   CAFE_SQRT(x)         the square roots of a vector

// A wide vector in a function's type warns about the ABI; these functions are all inlined or local.
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC bug 105593: its own AVX-512 header sets it off

#ifdef CAFE_X86
#define CAFE_ISA avx512
#define CAFE_TARGET __attribute__((target("avx512f")))
#define CAFE_WIDTH 16
#define CAFE_ROWS 8
#define CAFE_MULTIPLY(a, b) (Pairs) _mm512_mul_epu32((__m512i)(a), (__m512i)(b))
#define CAFE_SQRT(x) (Vector) _mm512_sqrt_ps((__m512)(x))
#include "simd.h"

#define CAFE_ISA avx2
#define CAFE_TARGET __attribute__((target("avx2,fma")))
#define CAFE_WIDTH 8
#define CAFE_ROWS 6
#define CAFE_MULTIPLY(a, b) (Pairs) _mm256_mul_epu32((__m256i)(a), (__m256i)(b))
#define CAFE_SQRT(x) (Vector) _mm256_sqrt_ps((__m256)(x))
#include "simd.h"
#endif

#define CAFE_ISA portable
#define CAFE_TARGET
#define CAFE_WIDTH 4
#define CAFE_ROWS 6
#ifdef CAFE_X86
#define CAFE_MULTIPLY(a, b) (Pairs) _mm_mul_epu32((__m128i)(a), (__m128i)(b))
#define CAFE_SQRT(x) (Vector) _mm_sqrt_ps((__m128)(x))
#else
#define CAFE_MULTIPLY(a, b) ((a) & 0xFFFFFFFF) * ((b) & 0xFFFFFFFF)
#define CAFE_SQRT(x) (Vector{std::sqrt((x)[0]), std::sqrt((x)[1]), std::sqrt((x)[2]), std::sqrt((x)[3])})
#endif
#include "simd.h"

// A call of a kernel, in the namespace of `isa`.
#ifdef CAFE_X86
#define CAFE_DISPATCH(isa, ...)               \
    ((isa) == Isa::avx512 ? avx512::__VA_ARGS__ \
     : (isa) == Isa::avx2 ? avx2::__VA_ARGS__   \
                          : portable::__VA_ARGS__)
#else
#define CAFE_DISPATCH(isa, ...) portable::__VA_ARGS__
#endif

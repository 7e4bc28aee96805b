// Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
// 1, 2, 3" (SC 2011): four random words that are a pure function of a 64-bit key and four counter words.
//
// The convention shared by every kernel, on every backend:
//   key     = (seed low, seed high)
//   counter = (position low, position high, attempt, stream)
// `position` says which number it is (a sampler's offset + index, an element of a dropout mask), `attempt` is 0 but for
// numbers that were drawn again after a rejection, `stream` keeps the users of one seed apart. In Triton:
// tl.philox(seed, position low, position high, attempt, stream).
#pragma once
#include <cstdint>

#include "cpu.h"
#ifdef CAFE_X86
#include <immintrin.h>
#endif

namespace cafe {

enum Stream : uint32_t { kSamplerStream = 0, kOptimizerStream = 2 };

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u, kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

struct Philox {
    uint32_t word[4];
    uint64_t bits() const { return word[0] | uint64_t(word[1]) << 32; }  // the 64 bits that one draw consumes
};

inline Philox philox(uint64_t seed, uint64_t position, uint32_t attempt, uint32_t stream) {
    uint32_t c0 = uint32_t(position), c1 = uint32_t(position >> 32), c2 = attempt, c3 = stream;
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
        uint64_t a = uint64_t(kPhiloxM0) * c0, b = uint64_t(kPhiloxM1) * c2;
        c0 = uint32_t(b >> 32) ^ c1 ^ k0;
        c2 = uint32_t(a >> 32) ^ c3 ^ k1;
        c1 = uint32_t(b);
        c3 = uint32_t(a);
    }
    return {{c0, c1, c2, c3}};
}

// The wide versions keep one counter in each 64-bit lane: the multiply reads the low half of a lane only, so what
// is left in the high halves does no harm until the end. n is a multiple of 8.
#ifdef CAFE_X86
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC bug 105593: its own AVX-512 header sets it off
__attribute__((target("avx512f"))) inline void philox_bits_avx512(uint64_t seed, uint64_t position, uint32_t attempt,
                                                                   uint32_t stream, int n, uint64_t* bits) {
    const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
    const __m512i lane = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
    for (int i = 0; i < n; i += 8) {
        __m512i c0 = _mm512_add_epi64(_mm512_set1_epi64(int64_t(position + i)), lane), c1 = _mm512_srli_epi64(c0, 32);
        __m512i c2 = _mm512_set1_epi64(attempt), c3 = _mm512_set1_epi64(stream);
        uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
        for (int round = 0; round < 10; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
            __m512i a = _mm512_mul_epu32(m0, c0), b = _mm512_mul_epu32(m1, c2);
            c0 = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(b, 32), c1), _mm512_set1_epi64(k0));
            c2 = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(a, 32), c3), _mm512_set1_epi64(k1));
            c1 = b;
            c3 = a;
        }
        c0 = _mm512_and_si512(c0, _mm512_set1_epi64(0xFFFFFFFF));
        _mm512_storeu_si512(bits + i, _mm512_or_si512(c0, _mm512_slli_epi64(c1, 32)));
    }
}
#pragma GCC diagnostic pop

__attribute__((target("avx2"))) inline void philox_bits_avx2(uint64_t seed, uint64_t position, uint32_t attempt,
                                                             uint32_t stream, int n, uint64_t* bits) {
    const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
    const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
    for (int i = 0; i < n; i += 4) {
        __m256i c0 = _mm256_add_epi64(_mm256_set1_epi64x(int64_t(position + i)), lane), c1 = _mm256_srli_epi64(c0, 32);
        __m256i c2 = _mm256_set1_epi64x(attempt), c3 = _mm256_set1_epi64x(stream);
        uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
        for (int round = 0; round < 10; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
            __m256i a = _mm256_mul_epu32(m0, c0), b = _mm256_mul_epu32(m1, c2);
            c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(b, 32), c1), _mm256_set1_epi64x(k0));
            c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(a, 32), c3), _mm256_set1_epi64x(k1));
            c1 = b;
            c3 = a;
        }
        c0 = _mm256_and_si256(c0, _mm256_set1_epi64x(0xFFFFFFFF));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(bits + i), _mm256_or_si256(c0, _mm256_slli_epi64(c1, 32)));
    }
}
#endif

// bits[i] = philox(seed, position + i, attempt, stream).bits() for i < n, n a multiple of 8.
inline void philox_bits(Isa isa, uint64_t seed, uint64_t position, uint32_t attempt, uint32_t stream, int n,
                        uint64_t* bits) {
#ifdef CAFE_X86
    if (isa == Isa::avx512) return philox_bits_avx512(seed, position, attempt, stream, n, bits);
    if (isa == Isa::avx2) return philox_bits_avx2(seed, position, attempt, stream, n, bits);
#endif
    for (int i = 0; i < n; ++i) bits[i] = philox(seed, position + i, attempt, stream).bits();
}

}  // namespace cafe

// The inner loops of exact top-k for one instruction set. topk.cpp includes this file once for each, with CAFE_ISA (the
// namespace), CAFE_TARGET, CAFE_WIDTH (32-bit lanes of a vector), CAFE_USERS (users of a register tile), CAFE_LIMIT (the
// largest code of a user) and two macros set:
//   CAFE_DOT4(sum, codes, p)  sum + the products, four a lane, of unsigned bytes with signed bytes; no overflow
//   CAFE_MASK(a, b)           bit l: a[l] >= b[l]
namespace CAFE_ISA {

constexpr int W = CAFE_WIDTH, kVectors = kBlock / W, kUsers = CAFE_USERS;

typedef float Floats __attribute__((vector_size(4 * W)));
typedef float AnyFloats __attribute__((vector_size(4 * W), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));
typedef int32_t AnyInts __attribute__((vector_size(4 * W), aligned(4)));
typedef double Lanes __attribute__((vector_size(64)));
typedef float AnyEight __attribute__((vector_size(32), aligned(4)));

#define INLINE CAFE_TARGET __attribute__((always_inline)) inline

// The score's definition: products in double (exact), added in eight sums i mod 8, these folded in halves.
CAFE_TARGET double dot(const float* a, const float* b, int64_t dim) {
    Lanes sum = {};
    int64_t i = 0;
    for (; i + 8 <= dim; i += 8)
        sum += __builtin_convertvector(*reinterpret_cast<const AnyEight*>(a + i), Lanes) *
               __builtin_convertvector(*reinterpret_cast<const AnyEight*>(b + i), Lanes);
    for (int l = 0; i + l < dim; ++l) sum[l] += double(a[i + l]) * b[i + l];
    for (int l = 0; l < 4; ++l) sum[l] += sum[l + 4];
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

template <int U>
INLINE void project_tile(const float* panel, int64_t dim, const float* users, float* out) {
    Floats sum[U][kVectors] = {};
    for (int64_t i = 0; i < dim; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            Floats right = *reinterpret_cast<const AnyFloats*>(panel + i * kBlock + v * W);
#pragma GCC unroll 8
            for (int u = 0; u < U; ++u) sum[u][v] += users[u * dim + i] * right;
        }
    for (int u = 0; u < U; ++u)
        for (int v = 0; v < kVectors; ++v) *reinterpret_cast<AnyFloats*>(out + u * kBlock + v * W) = sum[u][v];
}

// out[u][l] = users[u] . column l of the panel (dim, kBlock), in float.
CAFE_TARGET void project(const float* panel, int64_t dim, const float* users, int64_t count, float* out) {
    int64_t u = 0;
    for (; u + kUsers <= count; u += kUsers) project_tile<kUsers>(panel, dim, users + u * dim, out + u * kBlock);
    for (; u < count; ++u) project_tile<1>(panel, dim, users + u * dim, out + u * kBlock);
}

template <int B, int U>
INLINE void scan_tile(const uint8_t* codes, const float* scale, int64_t quads, const Query* const* query, uint32_t* low,
                      uint32_t* high) {
    Ints sum[U][B * kVectors];
    for (int u = 0; u < U; ++u)
        for (int v = 0; v < B * kVectors; ++v) sum[u][v] = query[u]->bias - Ints{};
    for (int64_t q = 0; q < quads; ++q) {
        Ints left[B * kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < B * kVectors; ++v)
            left[v] = *reinterpret_cast<const AnyInts*>(codes + (v / kVectors * quads + q) * 4 * kBlock + v % kVectors * 4 * W);
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) {
            const int32_t four = query[u]->codes[q];
#pragma GCC unroll 8
            for (int v = 0; v < B * kVectors; ++v) sum[u][v] = CAFE_DOT4(sum[u][v], left[v], four);
        }
    }
    for (int u = 0; u < U; ++u) {
        low[u * kPairs] = high[u * kPairs] = 0;
        for (int v = 0; v < B * kVectors; ++v) {
            Floats score = __builtin_convertvector(sum[u][v], Floats) * *reinterpret_cast<const AnyFloats*>(scale + v * W);
            low[u * kPairs] |= uint32_t(CAFE_MASK(score, (query[u]->low - Floats{}))) << (v * W);
            high[u * kPairs] |= uint32_t(CAFE_MASK(score, (query[u]->high - Floats{}))) << (v * W);
        }
    }
}

template <int U>
CAFE_TARGET void scan_users(const uint8_t* codes, const float* scale, int64_t quads, int64_t blocks,
                            const Query* const* query, uint32_t* low, uint32_t* high) {
    for (int64_t b = 0; b < blocks; b += 2, codes += 8 * kBlock * quads, scale += 2 * kBlock, ++low, ++high)
        if (b + 1 < blocks) scan_tile<2, U>(codes, scale, quads, query, low, high);
        else scan_tile<1, U>(codes, scale, quads, query, low, high);
}

// For up to kUsers users and kSegment blocks: which items' code scores reach each user's low and high, as masks (count, kPairs)
// of 32 items each.
template <int U = kUsers>
CAFE_TARGET void scan(const uint8_t* codes, const float* scale, int64_t quads, int64_t blocks, int64_t count,
                      const Query* const* query, uint32_t* low, uint32_t* high) {
    if (count >= U) return scan_users<U>(codes, scale, quads, blocks, query, low, high);
    if constexpr (U > 1) scan<U - 1>(codes, scale, quads, blocks, count, query, low, high);
}

constexpr Kernels kernels{kUsers, CAFE_LIMIT, dot, project, scan<>};

#undef INLINE
}  // namespace CAFE_ISA
#undef CAFE_ISA
#undef CAFE_TARGET
#undef CAFE_WIDTH
#undef CAFE_USERS
#undef CAFE_LIMIT
#undef CAFE_DOT4
#undef CAFE_MASK

// Vectors and small matrix products for one instruction set, and after them the file CAFE_KERNEL, in one namespace. each_isa.h
// includes this once for each instruction set.
namespace CAFE_ISA {

#define TARGET CAFE_TARGET
#define INLINE CAFE_TARGET __attribute__((always_inline)) inline

constexpr int W = CAFE_WIDTH, kRows = CAFE_ROWS, kPanel = 2 * W;

typedef float Vector __attribute__((vector_size(4 * W)));
typedef float Unaligned __attribute__((vector_size(4 * W), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));
typedef int32_t UnalignedInts __attribute__((vector_size(4 * W), aligned(4)));
typedef uint32_t Words __attribute__((vector_size(4 * W)));
typedef uint16_t Halves __attribute__((vector_size(2 * W), aligned(2)));
typedef uint8_t Bytes __attribute__((vector_size(W), aligned(1)));

INLINE Vector load(const float* x) { return *reinterpret_cast<const Unaligned*>(x); }
INLINE void store(float* x, Vector v) { *reinterpret_cast<Unaligned*>(x) = v; }
INLINE Vector load(const Bf16* x) {
    return (Vector)(__builtin_convertvector(*reinterpret_cast<const Halves*>(x), Words) << 16);
}

INLINE void store(Bf16* x, Vector v) {  // rounds to nearest, ties to even; a NaN stays one
    Words bits = (Words)v, rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    *reinterpret_cast<Halves*>(x) = __builtin_convertvector(v == v ? rounded : (bits >> 16 | 0x40), Halves);
}

template <class T>
INLINE Vector load(const T* x, int64_t count) {  // zeros from count on
    if (count >= W) return load(x);
    T part[W] = {};
    for (int64_t l = 0; l < count; ++l) part[l] = x[l];
    return load(part);
}

template <class T>
INLINE void store(T* x, Vector v, int64_t count) {
    if (count >= W) return store(x, v);
    T part[W];
    store(part, v);
    for (int64_t l = 0; l < count; ++l) x[l] = part[l];
}

// Transposes the square of n vectors of n lanes: for each bit of the indices, rows without the bit swap their lanes with
// it for the lanes without it of the rows with it.
template <int S, class V, int... L>
INLINE void swap_blocks(V& a, V& b, std::integer_sequence<int, L...>) {
    constexpr int n = sizeof...(L);
    V low = __builtin_shufflevector(a, b, ((L & S) ? n + L - S : L)...);
    b = __builtin_shufflevector(a, b, ((L & S) ? n + L : L + S)...);
    a = low;
}

template <int S = 1, class V, int N>
INLINE void transpose(V (&v)[N]) {
    if constexpr (S < N) {
#pragma GCC unroll 16
        for (int r = 0; r < N; ++r)
            if (!(r & S)) swap_blocks<S>(v[r], v[r + S], std::make_integer_sequence<int, N>());
        transpose<2 * S>(v);
    }
}

template <int S, int... L>
INLINE Vector rotate(Vector v, std::integer_sequence<int, L...>) {
    return __builtin_shufflevector(v, v, (L ^ S)...);
}

// Lane l of the result is the sum of v[l % N], N <= W. As transpose, with a sum in place of each pair of rows.
template <int S = 1, int N>
INLINE Vector sums_of(Vector (&v)[N]) {
    if constexpr (S < N) {
#pragma GCC unroll 16
        for (int r = 0; r < N; r += 2 * S) {
            swap_blocks<S>(v[r], v[r + S], std::make_integer_sequence<int, W>());
            v[r] += v[r + S];
        }
        return sums_of<2 * S>(v);
    } else if constexpr (S < W) {
        v[0] += rotate<S>(v[0], std::make_integer_sequence<int, W>());
        return sums_of<2 * S>(v);
    } else {
        return v[0];
    }
}

INLINE Vector larger(Vector a, Vector b) { return a > b ? a : b; }

template <int S = W / 2>
INLINE float max_of(Vector v) {
    v = larger(v, rotate<S>(v, std::make_integer_sequence<int, W>()));
    if constexpr (S > 1) return max_of<S / 2>(v);
    else return v[0];
}

template <int S = W / 2>
INLINE float sum_of(Vector v) {
    v += rotate<S>(v, std::make_integer_sequence<int, W>());
    if constexpr (S > 1) return sum_of<S / 2>(v);
    else return v[0];
}

// e^x for x <= 0 or just above: 2^n e^f, f in +-ln(2) / 2 with the polynomial of Cephes' expf; relative error 1e-7.
INLINE Vector exponential(Vector x) {
    Vector shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer, which stands in the low bits
    Vector n = shifted - 12582912.0f, f = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vector y = 1.9875691500e-4f * f + 1.3981999507e-3f;
    y = y * f + 8.3334519073e-3f;
    y = y * f + 4.1665795894e-2f;
    y = y * f + 1.6666665459e-1f;
    y = y * f + 5.0000001201e-1f;
    y = y * (f * f) + f + 1.0f;
    return x < -87.0f ? Vector{} : y * (Vector)(((Ints)shifted + 127) << 23);
}

// log(1 + e) for 0 <= e <= 1: 2 artanh(z), z = e / (2 + e) <= 1/3, by its series; relative error 1e-7.
INLINE Vector log_of_one_and(Vector e) {
    Vector z = e / (e + 2.0f), square = z * z;
    Vector y = square * (1.0f / 15) + 1.0f / 13;
    y = y * square + 1.0f / 11;
    y = y * square + 1.0f / 9;
    y = y * square + 1.0f / 7;
    y = y * square + 1.0f / 5;
    y = y * square + 1.0f / 3;
    return 2.0f * (y * square * z + z);
}

// The right factor of a product, in panels: two vectors of columns, rows one after another.
struct Right {
    const float* x;
    int64_t row, panel;  // how far apart the rows of a panel, and the panels, are
    Right from(int64_t k) const { return {x + k * row, row, panel}; }
};

constexpr float kOnes[8] = {1, 1, 1, 1, 1, 1, 1, 1};
static_assert(kRows <= 8, "a row, an alpha");

// C = alpha * A B (+ C) for M rows, each with its alpha, and N vectors of columns; A's element (m, k) is a[m * lda + k], or
// a[k * lda + m].
template <int M, int N, bool kTransposed>
INLINE void multiply_tile(int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, const float* alpha, bool add,
                          float* c, int64_t ldc) {
    Vector sum[M][N] = {};
    for (int64_t k = 0; k < depth; ++k, b += ldb) {
        Vector right[N];
        for (int x = 0; x < N; ++x) right[x] = load(b + x * W);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            float left = kTransposed ? a[k * lda + m] : a[m * lda + k];
            for (int x = 0; x < N; ++x) sum[m][x] += left * right[x];
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
        for (int x = 0; x < N; ++x) {
            float* at = c + m * ldc + x * W;
            store(at, add ? alpha[m] * sum[m][x] + load(at) : alpha[m] * sum[m][x]);
        }
}

// The same for rows <= kRows and any number of vectors. (A copy of `right` would be read right after it is written, in wider
// pieces than it is written in, for which a CPU waits.)
template <bool kTransposed, int M = kRows>
TARGET void multiply(int64_t rows, int64_t vectors, int64_t depth, const float* a, int64_t lda, const Right& right,
                     const float* alpha, bool add, float* c, int64_t ldc) {
    if constexpr (M > 1)
        if (rows < M) return multiply<kTransposed, M - 1>(rows, vectors, depth, a, lda, right, alpha, add, c, ldc);
    const float* b = right.x;
    for (; vectors >= 2; vectors -= 2, b += right.panel, c += kPanel)
        multiply_tile<M, 2, kTransposed>(depth, a, lda, b, right.row, alpha, add, c, ldc);
    if (vectors) multiply_tile<M, 1, kTransposed>(depth, a, lda, b, right.row, alpha, add, c, ldc);
}

// x (n, dim), rows `stride` apart, as a right factor.
template <class T>
TARGET Right pack(const T* x, int64_t stride, int64_t n, int64_t dim, float* panels) {
    for (int64_t d = 0; d < dim; d += W) {
        float* to = panels + d / kPanel * n * kPanel + d % kPanel;
        for (int64_t j = 0; j < n; ++j) store(to + j * kPanel, load(x + j * stride + d, dim - d));
    }
    return {panels, kPanel, n * kPanel};
}

// Its transpose (dim, n), as panels of dim rows; the panel of column j, a multiple of kPanel, is at j * dim.
template <class T>
TARGET Right pack_transposed(const T* x, int64_t stride, int64_t n, int64_t dim, float* panels) {
    for (int64_t j = 0; j < n; j += W) {
        float* to = panels + j / kPanel * dim * kPanel + j % kPanel;
        for (int64_t d = 0; d < dim; d += W) {
            Vector block[W];
            for (int r = 0; r < W; ++r) block[r] = j + r < n ? load(x + (j + r) * stride + d, dim - d) : Vector{};
            transpose(block);
            for (int r = 0; r < W && d + r < dim; ++r) store(to + (d + r) * kPanel, block[r]);
        }
    }
    return {panels, kPanel, dim * kPanel};
}

// The dot products of x (dim) with the first `count` <= W rows of y, `stride` apart; other lanes repeat them. Sums of N rows,
// a power of two, stay in registers.
template <int N = W, class T>
INLINE Vector dots(const T* x, const T* y, int64_t stride, int64_t count, int64_t dim) {
    if constexpr (N > 4)  // fewer would wait for one another's sums
        if (count <= N / 2) return dots<N / 2>(x, y, stride, count, dim);
    Vector sum[N] = {};
    const T* row[N];
    for (int r = 0; r < N; ++r) row[r] = y + std::min<int64_t>(r, count - 1) * stride;
    for (int64_t d = 0; d < dim; d += W) {
        Vector left = load(x + d, dim - d);
#pragma GCC unroll 16
        for (int r = 0; r < N; ++r) sum[r] += left * load(row[r] + d, dim - d);
    }
    return sums_of(sum);
}

#include CAFE_KERNEL

}  // namespace CAFE_ISA
#undef TARGET
#undef INLINE
#undef CAFE_ISA
#undef CAFE_TARGET
#undef CAFE_WIDTH
#undef CAFE_ROWS
#undef CAFE_MULTIPLY
#undef CAFE_SQRT

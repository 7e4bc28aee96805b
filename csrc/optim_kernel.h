// Adam's arithmetic on one row, for one instruction set: see simd.h. The equations are in optim.cpp.

INLINE void store(float* x, Vector v, const uint16_t*) { store(x, v); }
INLINE void store(Bf16* x, Vector v, const uint16_t* random) {  // a NaN stays one
    Words bits = (Words)v;
    Words up = random ? __builtin_convertvector(*reinterpret_cast<const Halves*>(random), Words) : 0x7FFF + ((bits >> 16) & 1);
    *reinterpret_cast<Halves*>(x) = __builtin_convertvector((v == v ? bits + up : bits | 0x400000) >> 16, Halves);
}

// One vector; p, m, v and g may be the row itself or a copy of its last elements.
template <class T, class S>
INLINE void update(const Row& row, T* p, S* m, S* v, const float* g, const uint16_t* random, int64_t stride) {
    Vector weight = load(p), mean = load(m), square = load(v);
    if (row.gap) {  // the steps that were skipped
        const Vector root = CAFE_SQRT(square);
        weight *= row.decay;
        for (int64_t i = 0; i < row.terms; ++i) {
            const Term& t = row.term[i];
            const Vector inverse = 1 / (root + t.epsilon), z = t.epsilon * inverse;
            weight -= t.weight * mean * inverse * (1 + z * z * (t.c2 - z * (t.c3 - z * t.c4)));
        }
        mean *= row.beta1_power;
        square *= row.beta2_power;
    }
    if (g) {
        const Step& s = *row.step;
        const Vector grad = load(g);
        mean += (grad - mean) * s.one_minus_beta1;
        square = square * s.beta2 + grad * grad * s.one_minus_beta2;
        weight = weight * s.decay - s.size * mean / (CAFE_SQRT(square) + s.epsilon);
    }
    store(p, weight, random);
    store(m, mean, random ? random + stride : nullptr);
    store(v, square, random ? random + 2 * stride : nullptr);
}

template <class T, class S>
TARGET void update_row(const Row& row, int64_t dim, T* p, S* m, S* v, const float* g, const uint16_t* random, int64_t stride) {
    int64_t x = 0;
    for (; x + W <= dim; x += W) {
        prefetch(p + x + row.ahead), prefetch(m + x + row.ahead), prefetch(v + x + row.ahead);
        update(row, p + x, m + x, v + x, g ? g + x : g, random ? random + x : random, stride);
    }
    if (x == dim) return;
    const int64_t rest = dim - x;
    T p_rest[W] = {};
    S m_rest[W] = {}, v_rest[W] = {};
    float g_rest[W] = {};
    std::copy_n(p + x, rest, p_rest), std::copy_n(m + x, rest, m_rest), std::copy_n(v + x, rest, v_rest);
    if (g) std::copy_n(g + x, rest, g_rest);
    update(row, p_rest, m_rest, v_rest, g ? g_rest : g, random ? random + x : random, stride);
    std::copy_n(p_rest, rest, p + x), std::copy_n(m_rest, rest, m + x), std::copy_n(v_rest, rest, v + x);
}

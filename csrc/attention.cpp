// Distance attention on packed sequences, per sequence and head (Eq. 5-6 of CAFE, reduced to a bias by distance):
//   S_ij = scale * q_i . k_j + log_theta[i - j],  0 <= i - j <= reach      P_ij = exp(S_ij - lse_i)
//   out_i = sum_j M_ij P_ij v_j                  lse_i = log sum_j exp(S_ij)
// and backward, with g the gradient of out and delta_i = g_i . out_i,
//   dS_ij = P_ij (M_ij g_i . v_j - delta_i)      dlog_theta[t] = sum of dS_ij over i - j = t
//   dq_i = scale * sum_j dS_ij k_j    dk_j = scale * sum_i dS_ij q_i    dv_j = sum_i M_ij P_ij g_i
// or, not causal, -reach <= i - j <= reach, with log_theta[-(n - 1)] ... log_theta[n - 1].
// M is dropout's mask: 1 / (1 - p) where it keeps a weight, else 0; both directions draw it from Philox, nothing stores it.
// Queries go in blocks of kQueries, keys in blocks of kKeys with the softmax rescaled between them (Milakov and
// Gimelshein, "Online normalizer calculation for softmax", 2018), so that no more than a tile of weights exists.
//
// The unit of work is a head of a fixed group of sequences. Each has its own sum for dlog_theta, which are added in order:
// no number depends on how many threads there are.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "arrays.h"
#include "parallel.h"
#include "philox.h"

namespace cafe {
namespace {

constexpr int64_t kQueries = 96, kKeys = 192;
constexpr int64_t kGroups = 64;         // of sequences, at most
constexpr double kPerThread = 4e6;      // multiply-adds that are worth a thread
constexpr int64_t kInPlace = 8192;      // floats of a sequence, all heads, that the first-level cache holds unpacked
constexpr int64_t kMargin = 64;         // more than vectors read before and after the biases
constexpr int64_t kMaxHeads = 65536;    // that dropout's counter tells apart

struct Problem {
    int64_t total, heads, dim, sequences, longest;
    bool causal;
    const int32_t* cu_seqlens;
    const float* bias;  // bias[h * bias_stride + longest - 1 - t] = log_theta[h][t], -inf where t is hidden
    int64_t bias_stride;
    float scale;
    int64_t reach;     // how far back a query sees
    int64_t ahead;     // how far ahead a block of queries looks, in whole blocks; causal: 0, its own block
    uint32_t threshold;  // 0: no dropout
    float keep_scale;    // 1 / (1 - p)
    uint64_t seed, offset;
};

template <class T>
struct Tensors {
    const T *q, *k, *v;
    T* out;
    float* lse;
};

template <class T>
struct Gradients {
    const T *grad_out, *q, *k, *v, *out;
    const float* lse;
    T *dq, *dk, *dv;
    float* dbias;  // null: not wanted
};

template <class T>
struct Rows {
    T* x;
    int64_t stride;
};

// Memory of one thread, kept from one piece of work to the next.
class Room {
   public:
    void reset(int64_t floats) {
        next_ = 0;
        if (floats + 16 > int64_t(memory_.size())) memory_.assign(floats + 16, 0);
    }
    float* take(int64_t floats) {  // on a cache line of its own
        float* start = memory_.data() + (-(reinterpret_cast<uintptr_t>(memory_.data()) / 4) & 15) + next_;
        next_ += (floats + 15) / 16 * 16;
        return start;
    }

   private:
    std::vector<float> memory_;
    int64_t next_ = 0;
};
thread_local Room room;

#define CAFE_KERNEL "attention_kernel.h"
#include "each_isa.h"

template <class T>
void forward(Isa isa, const Problem& p, const Tensors<T>& t, int64_t sequence, int64_t head) {
    if (p.causal) CAFE_DISPATCH(isa, forward<true>(p, t, sequence, head, room));
    else CAFE_DISPATCH(isa, forward<false>(p, t, sequence, head, room));
}

template <class T>
void backward(Isa isa, const Problem& p, const Gradients<T>& t, int64_t sequence, int64_t head, float* dbias) {
    if (p.causal) CAFE_DISPATCH(isa, backward<true>(p, t, sequence, head, dbias, room));
    else CAFE_DISPATCH(isa, backward<false>(p, t, sequence, head, dbias, room));
}

// f(group, head, sequence) for all of them; one thread has all sequences of a (group, head), in order.
template <class F>
void for_each(const Problem& p, int64_t threads, const F& f) {
    double work = 0;
    for (int64_t s = 0; s < p.sequences; ++s) {
        double n = p.cu_seqlens[s + 1] - p.cu_seqlens[s];
        work += n * (n + 32) * double(p.dim * p.heads);
    }
    const int64_t groups = std::min(kGroups, p.sequences);
    parallel_for(groups * p.heads, std::min(threads, int64_t(work / kPerThread) + 1), [&](int64_t block) {
        const int64_t group = block / p.heads, head = block % p.heads;
        for (int64_t s = group * p.sequences / groups; s < (group + 1) * p.sequences / groups; ++s) f(group, head, s);
    });
}

// What follows checks the arguments and prepares the biases.

using Seqlens = Array<int32_t>;

struct Arguments {
    Problem problem;
    std::vector<float> biases;
    int64_t diagonals;        // that the longest sequence has
    int64_t columns, middle;  // of log_theta, and which is distance 0
    Isa isa;
};

Arguments check(const py::array& q, const std::optional<Array<float>>& log_theta, const Seqlens& cu_seqlens, double scale,
                bool causal, int64_t window, double dropout_p, uint64_t seed, uint64_t offset, int64_t threads,
                const std::string& isa) {
    if (q.ndim() != 3 || q.shape(1) > kMaxHeads) throw std::invalid_argument("q must be (total, heads up to 65536, dim), got shape " + shape_of(q));
    if (cu_seqlens.ndim() != 1 || cu_seqlens.size() < 1)
        throw std::invalid_argument("cu_seqlens must be (sequences + 1), got shape " + shape_of(cu_seqlens));
    if (!(dropout_p >= 0 && dropout_p < 1))
        throw std::invalid_argument("dropout_p must be in [0, 1), got " + std::to_string(dropout_p));
    expect_threads(threads);
    Arguments a;
    Problem& p = a.problem;
    a.isa = choose_isa(isa);
    p.total = q.shape(0), p.heads = q.shape(1), p.dim = q.shape(2), p.sequences = cu_seqlens.size() - 1;
    p.cu_seqlens = cu_seqlens.data(), p.longest = 0;
    bool ascends = p.cu_seqlens[0] == 0 && p.cu_seqlens[p.sequences] == p.total;
    for (int64_t s = 0; s < p.sequences; ++s) {
        int64_t n = int64_t(p.cu_seqlens[s + 1]) - p.cu_seqlens[s];
        ascends &= n >= 0;
        p.longest = std::max(p.longest, n);
    }
    if (!ascends)
        throw std::invalid_argument("cu_seqlens must ascend from 0 to the " + std::to_string(p.total) + " tokens of q");
    const bool table = log_theta && log_theta->ndim() == 2 && log_theta->shape(0) == p.heads;
    a.columns = table ? log_theta->shape(1) : 0;
    a.middle = causal ? 0 : (a.columns - 1) / 2;
    if (log_theta && (!table || a.columns - a.middle < p.longest || (!causal && a.columns % 2 == 0)))
        throw std::invalid_argument("log_theta must have shape (" + std::to_string(p.heads) +
                                    (causal ? ", n), n" : ", 2 n - 1), n") + " >= " + std::to_string(p.longest) +
                                    ", the heads of q and the longest sequence; got " + shape_of(*log_theta));
    p.scale = float(scale);
    p.causal = causal;
    p.reach = window < 0 ? p.longest : std::min(window, p.longest);
    p.ahead = causal ? 0 : (p.reach + kQueries - 1) / kQueries * kQueries;
    p.threshold = uint32_t(std::min(std::nearbyint(dropout_p * 0x1p32), 0x1p32 - 1));
    p.keep_scale = float(1 / (1 - dropout_p));
    p.seed = seed, p.offset = offset;
    a.diagonals = causal ? p.longest : std::max<int64_t>(0, 2 * p.longest - 1);
    p.bias_stride = a.diagonals + kMargin;
    a.biases.assign(p.heads * p.bias_stride, -std::numeric_limits<float>::infinity());
    for (int64_t h = 0; h < p.heads; ++h)
        for (int64_t x = 0; x < a.diagonals; ++x)
            if (const int64_t t = p.longest - 1 - x; std::abs(t) <= p.reach)
                a.biases[h * p.bias_stride + x] = log_theta ? log_theta->data()[h * a.columns + a.middle + t] : 0;
    p.bias = a.biases.data();
    return a;
}

template <class T, class Word>
void attention_forward(Array<Word> q, Array<Word> k, Array<Word> v, std::optional<Array<float>> log_theta, Seqlens cu_seqlens,
                       Array<Word> out, Array<float> lse, double scale, bool causal, int64_t window, double dropout_p, uint64_t seed,
                       uint64_t offset, int64_t threads, const std::string& isa) {
    const Arguments a = check(q, log_theta, cu_seqlens, scale, causal, window, dropout_p, seed, offset, threads, isa);
    const Problem& p = a.problem;
    for (auto [name, x] : {std::pair{"k", &k}, {"v", &v}, {"out", &out}}) expect(name, *x, {p.total, p.heads, p.dim});
    expect("lse", lse, {p.heads, p.total});
    auto data = [](const Array<Word>& x) { return reinterpret_cast<const T*>(x.data()); };
    const Tensors<T> t{data(q), data(k), data(v), reinterpret_cast<T*>(out.mutable_data()), lse.mutable_data()};
    py::gil_scoped_release release;
    for_each(p, threads, [&](int64_t, int64_t head, int64_t s) { forward(a.isa, p, t, s, head); });
}

template <class T, class Word>
void attention_backward(Array<Word> grad_out, Array<Word> q, Array<Word> k, Array<Word> v,
                        std::optional<Array<float>> log_theta, Seqlens cu_seqlens, Array<Word> out, Array<float> lse,
                        Array<Word> dq, Array<Word> dk, Array<Word> dv, std::optional<Array<float>> dlog_theta,
                        double scale, bool causal, int64_t window, double dropout_p, uint64_t seed, uint64_t offset, int64_t threads,
                        const std::string& isa) {
    const Arguments a = check(q, log_theta, cu_seqlens, scale, causal, window, dropout_p, seed, offset, threads, isa);
    const Problem& p = a.problem;
    for (auto [name, x] : {std::pair{"grad_out", &grad_out}, {"k", &k}, {"v", &v}, {"out", &out}, {"dq", &dq}, {"dk", &dk},
                           {"dv", &dv}})
        expect(name, *x, {p.total, p.heads, p.dim});
    expect("lse", lse, {p.heads, p.total});
    if (log_theta.has_value() != dlog_theta.has_value())
        throw std::invalid_argument("log_theta and dlog_theta must both be given, or neither");
    if (dlog_theta) expect("dlog_theta", *dlog_theta, {p.heads, a.columns});
    auto data = [](const Array<Word>& x) { return reinterpret_cast<const T*>(x.data()); };
    auto result = [](Array<Word>& x) { return reinterpret_cast<T*>(x.mutable_data()); };
    float* sums = dlog_theta ? dlog_theta->mutable_data() : nullptr;
    const Gradients<T> t{data(grad_out), data(q), data(k), data(v), data(out), lse.data(), result(dq), result(dk), result(dv), sums};
    py::gil_scoped_release release;
    const int64_t groups = std::min(kGroups, p.sequences), size = a.diagonals + kMargin;
    std::vector<float> partial(sums ? groups * p.heads * size : 0);
    for_each(p, threads, [&](int64_t group, int64_t head, int64_t s) {
        backward(a.isa, p, t, s, head, sums ? &partial[(group * p.heads + head) * size + kMargin] : nullptr);
    });
    if (!sums) return;
    std::fill_n(sums, p.heads * a.columns, 0.0f);
    for (int64_t group = 0; group < groups; ++group)
        for (int64_t head = 0; head < p.heads; ++head)
            for (int64_t x = 0; x < a.diagonals; ++x)
                sums[head * a.columns + a.middle + p.longest - 1 - x] += partial[(group * p.heads + head) * size + kMargin + x];
}

template <class T, class Word>
void bind(py::module_& m) {
    m.def("attention_forward", &attention_forward<T, Word>, py::arg("q").noconvert(), py::arg("k").noconvert(),
          py::arg("v").noconvert(), py::arg("log_theta").noconvert(), py::arg("cu_seqlens").noconvert(),
          py::arg("out").noconvert(), py::arg("lse").noconvert(), py::arg("scale"), py::arg("causal"),
          py::arg("window"), py::arg("dropout_p"), py::arg("seed"), py::arg("offset"), py::arg("threads"), py::arg("isa") = "auto",
          "Fills out and lse; see cafe_kernels.attention. uint16 arrays hold bfloat16.");
    m.def("attention_backward", &attention_backward<T, Word>, py::arg("grad_out").noconvert(), py::arg("q").noconvert(),
          py::arg("k").noconvert(), py::arg("v").noconvert(), py::arg("log_theta").noconvert(),
          py::arg("cu_seqlens").noconvert(), py::arg("out").noconvert(), py::arg("lse").noconvert(),
          py::arg("dq").noconvert(), py::arg("dk").noconvert(), py::arg("dv").noconvert(),
          py::arg("dlog_theta").noconvert(), py::arg("scale"), py::arg("causal"), py::arg("window"),
          py::arg("dropout_p"), py::arg("seed"), py::arg("offset"), py::arg("threads"), py::arg("isa") = "auto", "Fills dq, dk, dv and dlog_theta.");
}

}  // namespace

void register_attention(py::module_& m) {
    bind<float, float>(m);
    bind<Bf16, uint16_t>(m);
}

}  // namespace cafe

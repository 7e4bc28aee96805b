// Exact top-k of score(v) = fl32(intent_score[intent(v)] + g(user . E_v)), g(x) = x or log sigmoid(x) (Eq. 8 and 10 of CAFE),
// and how many items score above a given one. What a score is: the dot product in double (see `dot`), g and the sum in double,
// rounded once to float. Equal scores are ordered by item. So the answer is unique: it depends neither on the order of the
// search nor on threads or instruction sets.
//
// Items are kept in groups (an intent, a part of a large one, or some small ones), farthest from the group's centroid first, in
// blocks of kBlock slots. Every item has 8-bit codes of its difference from the centroid, E_v = centroid + scale * q + e. A user
// has codes u = step * p + f. With |.| the Euclidean norm,
//     u . E_v <= u . centroid + |u| |E_v - centroid|                         (Cauchy-Schwarz: a bound for group and block)
//     |u . E_v - u . centroid - step * scale * (p . q)| <= |u| |e| + |f| |scale * q|   (the error of a score by codes)
// An item is scored exactly only where the codes' score plus its error reaches the user's threshold, the k-th best score
// so far. All slacks for rounding are in `slack` and `reach`.
//
// Order: a user's most promising groups first, for a good threshold; then all groups in the order of memory, each for all
// the users whose threshold its bound reaches, so that they share its reads. What a user has seen at first is left out then.
#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <limits>
#include <vector>

#include "arrays.h"
#include "cpu.h"
#include "parallel.h"

#ifdef CAFE_X86
#include <immintrin.h>
#endif

namespace cafe {
namespace {

constexpr int64_t kBlock = 16;                              // items side by side in codes and centroids
constexpr int64_t kSegment = 8, kPairs = kSegment / 2;      // blocks scanned before thresholds are looked at again
constexpr int64_t kBatch = 256;                             // users that share reads
constexpr int64_t kSeeds = 64, kSeedBlocks = 64;            // groups, and blocks of each, looked at for a first threshold
constexpr int64_t kSeedItems = 4096;
static_assert(kSeedBlocks % kSegment == 0, "a user who has seen the first blocks joins at a segment");
constexpr double kLargestProduct = 1e38;                    // of norms: sums of floats up to it do not overflow
constexpr double kInf = std::numeric_limits<double>::infinity();

struct Query {  // a user against a segment
    const int32_t* codes;  // four signed bytes each
    int32_t bias;          // what the codes' offset of 128 adds to every sum, negated
    float low, high;       // thresholds of scale * (p . q)
};

struct Kernels {
    int64_t users;
    int limit;
    double (*dot)(const float*, const float*, int64_t);
    void (*project)(const float*, int64_t, const float*, int64_t, float*);
    void (*scan)(const uint8_t*, const float*, int64_t, int64_t, int64_t, const Query* const*, uint32_t*, uint32_t*);
};

// A wide vector in a function's type warns about the ABI; these functions are all inlined or local.
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC bug 105593: its own AVX-512 header sets it off

#ifdef CAFE_X86
#define CAFE_ISA avx512
#define CAFE_TARGET __attribute__((target("avx512f,avx512vnni")))
#define CAFE_WIDTH 16
#define CAFE_USERS 8
#define CAFE_LIMIT 127
#define CAFE_DOT4(sum, codes, p) (Ints) _mm512_dpbusd_epi32((__m512i)(sum), (__m512i)(codes), _mm512_set1_epi32(p))
#define CAFE_MASK(a, b) _mm512_cmp_ps_mask((__m512)(a), (__m512)(b), _CMP_GE_OQ)
#include "topk_kernel.h"

#define CAFE_ISA avx2
#define CAFE_TARGET __attribute__((target("avx2,fma")))
#define CAFE_WIDTH 8
#define CAFE_USERS 2
#define CAFE_LIMIT 63  // 2 * 255 * 63 < 2^15: vpmaddubsw does not saturate
#define CAFE_DOT4(sum, codes, p)                                                                                       \
    (sum) + (Ints)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)(codes), _mm256_set1_epi32(p)), _mm256_set1_epi16(1))
#define CAFE_MASK(a, b) _mm256_movemask_ps(_mm256_cmp_ps((__m256)(a), (__m256)(b), _CMP_GE_OQ))
#include "topk_kernel.h"
#endif

#define CAFE_ISA portable
#define CAFE_TARGET
#define CAFE_WIDTH 4
#define CAFE_USERS 1
#define CAFE_LIMIT 127
#define CAFE_DOT4(sum, codes, p)                                                                                       \
    (sum) + ((codes) & 255) * int8_t(p) + ((codes) >> 8 & 255) * int8_t((p) >> 8) +                                    \
        ((codes) >> 16 & 255) * int8_t((p) >> 16) + ((codes) >> 24 & 255) * int8_t((p) >> 24)
#define CAFE_MASK(a, b) mask_of((a) >= (b))
template <class V>
inline int mask_of(V v) { return (v[0] & 1) | (v[1] & 2) | (v[2] & 4) | (v[3] & 8); }
#include "topk_kernel.h"

const Kernels& choose_kernels(const std::string& name) {
    Isa isa = choose_isa(name);
#ifdef CAFE_X86
    if (isa == Isa::avx512) {
        if (__builtin_cpu_supports("avx512vnni")) return avx512::kernels;
        if (name == "avx512") throw std::invalid_argument("top-k on avx512 needs its VNNI part, which this CPU lacks: set auto or avx2");
        isa = Isa::avx2;
    }
    if (isa == Isa::avx2) return avx2::kernels;
#endif
    return portable::kernels;
}

template <class T>
const T* data(const char* name, const Array<T>& a, const std::vector<int64_t>& shape) {
    expect(name, a, shape);
    return a.data();
}

void require(bool holds, const char* message) {
    if (!holds) throw std::invalid_argument(message);
}

// Numbers that are not finite have no order, and std::sort reads beyond its range then; nor do sums of products beyond `most` stay finite.
template <class T>
void require_sane(const char* name, const Array<T>& a, double most = std::numeric_limits<T>::max()) {
    const T* x = a.data();
    bool sane = true;
    for (int64_t i = 0, n = a.size(); i < n; ++i) sane &= std::abs(x[i]) <= most;
    if (!sane) throw std::invalid_argument(std::string(name) + " holds numbers that are not finite, or too large");
}

// The arrays are those of cafe_kernels/topk/index.py and must not change while this lives.
struct Index {
    int64_t items, dim, quads, intents, groups, blocks;
    const float* table;           // (items, dim)
    const int32_t* item_intent;   // (items)
    const int32_t* start;         // (groups + 1), in blocks
    const int32_t* size;          // (groups), items
    const int32_t *first, *last;  // (groups), intents
    const float* centroids;       // (panels, dim, kBlock)
    const double* centroid_norm;  // (groups)
    const double *radius, *error; // (blocks), descending within a group: of |E_v - centroid| and |e| in a block or after it
    const float* scale;           // (blocks * kBlock)
    const int32_t* slot_item;     // (blocks * kBlock), -1 in empty slots
    const uint8_t* codes;         // (blocks, quads, kBlock, 4): q + 128
    double largest_centroid = 0;  // norm
    std::vector<py::object> keep;

    Index(Array<float> table_, Array<int32_t> item_intent_, int64_t intents_, Array<int32_t> start_, Array<int32_t> size_,
          Array<int32_t> first_, Array<int32_t> last_, Array<float> centroids_, Array<double> centroid_norm_,
          Array<double> radius_, Array<double> error_, Array<float> scale_, Array<int32_t> slot_item_,
          Array<uint8_t> codes_)
        : intents(intents_),
          keep{table_, item_intent_, start_, size_, first_, last_, centroids_, centroid_norm_, radius_, error_, scale_,
               slot_item_, codes_} {
        require(table_.ndim() == 2 && table_.shape(1) >= 1 && table_.shape(1) <= 32768, "table must be (items, 1 to 32768)");
        items = table_.shape(0), dim = table_.shape(1), quads = (dim + 3) / 4, groups = size_.size(), blocks = radius_.size();
        table = table_.data(), item_intent = data("item_intent", item_intent_, {items});
        start = data("start", start_, {groups + 1}), size = data("size", size_, {groups});
        first = data("first", first_, {groups}), last = data("last", last_, {groups});
        centroids = data("centroids", centroids_, {(groups + kBlock - 1) / kBlock, dim, kBlock});
        centroid_norm = data("centroid_norm", centroid_norm_, {groups});
        radius = data("radius", radius_, {blocks}), error = data("error", error_, {blocks});
        scale = data("scale", scale_, {blocks * kBlock}), slot_item = data("slot_item", slot_item_, {blocks * kBlock});
        codes = data("codes", codes_, {blocks, quads, kBlock, 4});
        for (auto [name, a] : {std::pair<const char*, const Array<float>*>{"table", &table_}, {"centroids", &centroids_}, {"scale", &scale_}})
            require_sane(name, *a);
        for (auto [name, a] : {std::pair<const char*, const Array<double>*>{"centroid_norm", &centroid_norm_}, {"radius", &radius_}, {"error", &error_}})
            require_sane(name, *a, 1e100);
        for (int64_t g = 0; g < groups; ++g) {
            double square = 0;
            for (int64_t i = 0; i < dim; ++i) {
                const double x = centroids[(g / kBlock * dim + i) * kBlock + g % kBlock];
                square += x * x;
            }
            largest_centroid = std::max(largest_centroid, std::sqrt(square));
        }
        for (int64_t v = 0; v < items; ++v)
            require(item_intent[v] >= 0 && item_intent[v] < intents, "item_intent must be in [0, intents)");
        for (int64_t s = 0; s < blocks * kBlock; ++s)
            require(slot_item[s] >= -1 && slot_item[s] < items, "slot_item must be in [-1, items)");
        require(start[0] == 0 && start[groups] == blocks, "start must go from 0 to the blocks");
        for (int64_t g = 0; g < groups; ++g)
            require(start[g] <= start[g + 1] && 0 <= first[g] && first[g] <= last[g] && last[g] < intents, "groups are damaged");
    }
};

struct User {
    const float* x;
    const float* intent_scores;  // null: zeros
    const int32_t* codes;
    int32_t bias;
    double norm, step, rest;  // |u|, the unit of the codes, |f|; norms are rounded up
    std::vector<int32_t> excluded;
    std::vector<int64_t> seeded;  // groups whose first kSeedBlocks blocks it has seen, ascending
};

struct Active {  // a user whom a group may concern
    int64_t user;
    double base;            // u . centroid, by float
    float most;             // intent score in the group
    float threshold;        // that low and high are for
    double low, high;       // of u . E_v: below low cannot reach the threshold, from high on is above it for certain
};

struct Found {
    float score;
    int32_t item;
    bool operator<(const Found& other) const {
        return score != other.score ? score > other.score : item < other.item;
    }
};

struct Tally {
    int64_t scored = 0, exact = 0;  // pairs of user and item: scored by codes, scored exactly
};

struct Above {
    int64_t above = 0, equal = 0;
};

double log_sigmoid(double x) { return std::min(x, 0.0) - std::log1p(std::exp(-std::abs(x))); }

void raise(std::atomic<float>& threshold, float to) {
    float now = threshold.load(std::memory_order_relaxed);
    while (now < to && !threshold.compare_exchange_weak(now, to, std::memory_order_relaxed)) {
    }
}

float rounded_down(double x) {
    float f = float(x);
    return f > x ? std::nextafterf(f, -INFINITY) : f;
}
float rounded_up(double x) { return -rounded_down(-x); }

class Batch {
   public:
    const Index& index;
    const Kernels& kernels;
    const bool sigmoid, counting;
    const int64_t count, threads;
    std::vector<User> users;
    std::vector<std::atomic<float>> threshold;

    Batch(const Index& index, const Kernels& kernels, bool sigmoid, bool counting, const float* x, int64_t count, const float* intent_scores,
          const int64_t* indptr, const int32_t* indices, int64_t threads)
        : index(index), kernels(kernels), sigmoid(sigmoid), counting(counting), count(count), threads(threads), users(count), threshold(count),
          codes_(count * index.quads * 4), base_((index.groups + kBlock - 1) / kBlock * kBlock * count) {
        for (int64_t u = 0; u < count; ++u) {
            User& user = users[u];
            user.x = x + u * index.dim;
            user.intent_scores = intent_scores ? intent_scores + u * index.intents : nullptr;
            if (indptr) user.excluded.assign(indices + indptr[u], indices + indptr[u + 1]);
            std::sort(user.excluded.begin(), user.excluded.end());
            encode(user, codes_.data() + u * index.quads * 4);
            threshold[u] = -INFINITY;
        }
        const int64_t panels = (index.groups + kBlock - 1) / kBlock;
        parallel_for(panels, threads, [&](int64_t panel) {
            kernels.project(index.centroids + panel * index.dim * kBlock, index.dim, x, count, &base_[panel * kBlock * count]);
        });
    }

    float score(const User& user, int64_t item) const {
        const double dot = kernels.dot(user.x, index.table + item * index.dim, index.dim);
        const double intent = user.intent_scores ? user.intent_scores[index.item_intent[item]] : 0;
        return float(intent + (sigmoid ? log_sigmoid(dot) : dot)) + 0.0f;  // no negative zero
    }

    bool excluded(const User& user, int32_t item) const {
        return std::binary_search(user.excluded.begin(), user.excluded.end(), item);
    }

    // Threads that `sweep` has work for.
    int64_t slots() const { return std::max<int64_t>(1, std::min(threads, (index.groups + kBlock - 1) / kBlock)); }

    // A first threshold: the k-th best of what the most promising groups have, which goes to `found`.
    void seed(int64_t u, int64_t k, Tally& tally, std::vector<Found>& found) {
        User& user = users[u];
        std::vector<std::pair<double, int64_t>> order(index.groups);
        const double likely = std::min(1.0, 4 / std::sqrt(double(index.dim)));
        for (int64_t g = 0; g < index.groups; ++g) {
            const double best = base(g, u) + likely * user.norm * radius_of(g);
            order[g] = {-(sigmoid ? std::min(best, 0.0) : best) - range(user, g).second, g};
        }
        const int64_t seeds = std::min(index.groups, std::max(kSeeds, k / 4));
        std::partial_sort(order.begin(), order.begin() + seeds, order.end());
        Keep keep{*this, k, u, &found};
        std::vector<Active> active;
        const int64_t enough = tally.scored + std::max(kSeedItems, 8 * k);
        for (int64_t s = 0; s < seeds && (s < 4 || tally.scored < enough); ++s) {
            active.clear();
            activate(order[s].second, u, active);
            visit(order[s].second, kSeedBlocks, active, {}, tally, keep);
            user.seeded.push_back(order[s].second);
        }
        std::sort(user.seeded.begin(), user.seeded.end());
        if (int64_t(found.size()) < k) return;
        std::nth_element(found.begin(), found.begin() + k - 1, found.end());
        raise(threshold[u], found[k - 1].score);
    }

    // All groups in the order of memory, by as many threads as there are sinks, and tallies.
    template <class Sink>
    void sweep(std::vector<Tally>& tallies, std::vector<Sink>& sinks) {
        std::atomic<int64_t> next{0};
        const int64_t panels = (index.groups + kBlock - 1) / kBlock;
        const int64_t slots = int64_t(sinks.size());
        parallel_for(slots, slots, [&](int64_t slot) {
            std::vector<Active> active, late;  // late: those who have seen the first blocks
            for (int64_t panel; (panel = next++) < panels;)
                for (int64_t g = panel * kBlock; g < std::min(index.groups, (panel + 1) * kBlock); ++g) {
                    active.clear(), late.clear();
                    for (int64_t u = 0; u < count; ++u) {
                        const std::vector<int64_t>& seeded = users[u].seeded;
                        if (!activate(g, u, active) || !std::binary_search(seeded.begin(), seeded.end(), g)) continue;
                        late.push_back(active.back()), active.pop_back();
                    }
                    if (!active.empty() || !late.empty()) visit(g, index.blocks, active, late, tallies[slot], sinks[slot]);
                }
        });
    }

    struct Keep {  // the k best of what is found
        Batch& batch;
        int64_t k, first;
        std::vector<Found>* found;  // of user first, and so on
        static constexpr bool counts = false;

        void all(int64_t, int64_t) {}
        void item(int64_t u, int32_t item, float score, float) {
            if (score < batch.threshold[u].load(std::memory_order_relaxed)) return;
            std::vector<Found>& mine = found[u - first];
            mine.push_back({score, item});
            if (int64_t(mine.size()) < k + k / 4 + 8) return;
            std::nth_element(mine.begin(), mine.begin() + k - 1, mine.end());
            mine.resize(k);
            raise(batch.threshold[u], mine[k - 1].score);
        }
    };

    struct Count {  // how much of what is found is above the threshold, or at it
        std::vector<Above> found;  // by user
        static constexpr bool counts = true;

        void all(int64_t u, int64_t items) { found[u].above += items; }
        void item(int64_t u, int32_t, float score, float threshold) {
            found[u].above += score > threshold;
            found[u].equal += score == threshold;
        }
    };

   private:
    std::vector<int8_t> codes_;
    std::vector<float> base_;  // (panels, count, kBlock)

    double base(int64_t g, int64_t u) const { return base_[(g / kBlock * count + u) * kBlock + g % kBlock]; }
    double radius_of(int64_t g) const { return index.start[g] < index.start[g + 1] ? index.radius[index.start[g]] : 0; }

    void encode(User& user, int8_t* codes) {
        double largest = 0, square = 0, rest = 0;
        for (int64_t i = 0; i < index.dim; ++i) {
            largest = std::max(largest, std::abs(double(user.x[i])));
            square += double(user.x[i]) * user.x[i];
        }
        user.step = largest > 0 ? largest / kernels.limit : 1;
        int32_t sum = 0;
        for (int64_t i = 0; i < index.dim; ++i) {
            codes[i] = int8_t(std::nearbyint(user.x[i] / user.step));
            sum += codes[i];
            const double f = user.x[i] - user.step * codes[i];
            rest += f * f;
        }
        user.codes = reinterpret_cast<const int32_t*>(codes);
        user.bias = -128 * sum;
        user.norm = std::sqrt(square) * (1 + 1e-10), user.rest = std::sqrt(rest) * (1 + 1e-10) + 1e-12 * user.norm;
    }

    // Least and most intent score of a group.
    std::pair<float, float> range(const User& user, int64_t g) const {
        if (!user.intent_scores) return {0, 0};
        const auto [least, most] = std::minmax_element(user.intent_scores + index.first[g], user.intent_scores + index.last[g] + 1);
        return {*least, *most};
    }

    // By how much float(u . centroid), and sums of it in double, may err. Float: any sum of n products of floats errs by at
    // most n * 2^-24 / (1 - n * 2^-24) times the sum of absolute products (Higham, "Accuracy and Stability of Numerical
    // Algorithms", 3.1), which is at most |u| |centroid|; n <= 32768. Double: the same with 2^-53. Subnormals: the last.
    double slack(const User& user, int64_t g, double radius) const {
        const double n = double(index.dim + 8), c = index.centroid_norm[g];
        return user.norm * (1.01 * n * 0x1p-24 * c + 2 * n * 0x1p-53 * (c + radius)) + 1e-40;
    }

    // Of a score in double that is rounded to float: from what on it can be `threshold`, and from what on it is above.
    static double reach(float threshold, float intent, bool above) {
        const double t = threshold, rounding = std::abs(t) * 0x1p-23 + 3e-45 + 1e-15 * (std::abs(t) + std::abs(double(intent)));
        return above ? t + rounding : t - rounding;
    }

    // The dot product that gives a score of `reach`, erring to the safe side: the inverse of g at reach - intent.
    double inverse(float threshold, float intent, bool above) const {
        if (threshold == -INFINITY) return above ? kInf : -kInf;
        double y = reach(threshold, intent, above) - intent;
        if (!sigmoid) return y;
        if (above ? y > -1e-300 : y > 0) return kInf;
        y = std::min(y, -1e-300);
        y += (above ? 1e-14 : -1e-14) * std::abs(y);
        const double r = y - std::log(-std::expm1(y)), rounding = 1e-12 * (1 + std::abs(r));
        return above ? r + rounding : r - rounding;
    }

    bool reaches(float threshold, float intent, double dot) const {
        return intent + (sigmoid ? std::min(dot, 0.0) : dot) >= reach(threshold, intent, false);
    }

    bool activate(int64_t g, int64_t u, std::vector<Active>& active) const {
        const User& user = users[u];
        const auto [least, most] = range(user, g);
        const float now = threshold[u].load(std::memory_order_relaxed);
        const double centre = base(g, u), radius = radius_of(g);
        if (!reaches(now, most, centre + user.norm * radius + slack(user, g, radius))) return false;
        active.push_back({u, centre, most, now, inverse(now, most, false), counting ? inverse(now, least, true) : kInf});
        return true;
    }

    // The first blocks of a group for the users `active`, from kSeedBlocks on for those of `late` too.
    template <class Sink>
    void visit(int64_t g, int64_t most_blocks, std::vector<Active>& active, const std::vector<Active>& late, Tally& tally, Sink& sink) {
        Query queries[kBatch];
        const Query* pointers[kBatch];
        uint32_t low[kBatch * kPairs], high[kBatch * kPairs];
        const int64_t end = std::min<int64_t>(index.start[g + 1], index.start[g] + most_blocks);
        for (int64_t b = index.start[g]; b < end; b += kSegment) {
            if (b - index.start[g] == kSeedBlocks) active.insert(active.end(), late.begin(), late.end());
            const int64_t blocks = std::min(kSegment, end - b), left = index.size[g] - (b - index.start[g]) * kBlock;
            const double radius = index.radius[b], error = index.error[b];
            int64_t kept = 0;
            for (const Active& was : active) {
                Active a = was;
                const User& user = users[a.user];
                const float now = threshold[a.user].load(std::memory_order_relaxed);
                if (now != a.threshold) a.threshold = now, a.low = inverse(now, a.most, false);
                const double rounding = slack(user, g, radius);
                const double far = user.norm * radius + rounding;  // all that is left is within `far` of base
                if (a.base + far < a.low) continue;
                if (Sink::counts && a.base - far >= a.high) {
                    sink.all(a.user, left);
                    continue;
                }
                const double spread = user.norm * error + user.rest * (radius + error) + rounding +
                                      (user.norm + user.rest) * (radius + error) * 0x1p-22;  // the last: sums as floats
                queries[kept] = {user.codes, user.bias, rounded_down((a.low - spread - a.base) / user.step),
                                 rounded_up((a.high + spread - a.base) / user.step)};
                pointers[kept] = queries + kept;
                active[kept++] = a;
            }
            active.resize(kept);
            if (!kept && (late.empty() || b - index.start[g] >= kSeedBlocks)) return;
            if (!kept) continue;
            for (int64_t u = 0; u < kept; u += kernels.users)
                kernels.scan(index.codes + b * index.quads * 4 * kBlock, index.scale + b * kBlock, index.quads, blocks,
                             std::min(kernels.users, kept - u), pointers + u, low + u * kPairs, high + u * kPairs);
            tally.scored += kept * std::min(left, blocks * kBlock);
            const bool mixed = index.first[g] != index.last[g];
            for (int64_t n = 0; n < kept; ++n) {
                const Active& a = active[n];
                const User& user = users[a.user];
                for (int64_t pair = 0; pair < (blocks + 1) / 2; ++pair) {
                    uint32_t maybe = low[n * kPairs + pair];
                    const int32_t* items = index.slot_item + (b + 2 * pair) * kBlock;
                    if (Sink::counts) {
                        uint32_t certain = high[n * kPairs + pair];
                        const int64_t here = std::min<int64_t>(2 * kBlock, left - 2 * pair * kBlock);  // empty slots come last
                        if (here < 32) certain &= (uint32_t(1) << std::max<int64_t>(here, 0)) - 1;
                        sink.all(a.user, __builtin_popcount(certain));
                        maybe &= ~certain;
                    }
                    for (; maybe; maybe &= maybe - 1) {
                        const int32_t item = items[__builtin_ctz(maybe)];
                        if (item < 0) continue;
                        if (mixed) {
                            const float intent = user.intent_scores ? user.intent_scores[index.item_intent[item]] : 0;
                            if (!reaches(a.threshold, intent, a.base + user.norm * radius + slack(user, g, radius))) continue;
                        }
                        if (!Sink::counts && excluded(user, item)) continue;
                        ++tally.exact;
                        sink.item(a.user, item, score(user, item), a.threshold);
                    }
                }
            }
        }
    }
};

struct Request {
    const Kernels& kernels;
    bool sigmoid;
    int64_t count;
    const float *user, *intent_scores;
    const int64_t* indptr;
    const int32_t* indices;
};

Request check(const Index& index, const Array<float>& user, const std::optional<Array<float>>& intent_scores, bool sigmoid,
              const std::optional<Array<int64_t>>& indptr, const std::optional<Array<int32_t>>& indices, int64_t threads,
              const std::string& isa) {
    require(user.ndim() == 2 && user.shape(1) == index.dim, "user must be (users, dim of the table)");
    expect_threads(threads);
    require(indptr.has_value() == indices.has_value(), "indptr and indices must both be given, or neither");
    const int64_t count = user.shape(0);
    if (intent_scores) data("intent_scores", *intent_scores, {count, index.intents}), require_sane("intent_scores", *intent_scores);
    require_sane("user", user);
    for (int64_t u = 0; u < count; ++u) {
        double square = 0;
        for (int64_t i = 0; i < index.dim; ++i) square += double(user.data()[u * index.dim + i]) * user.data()[u * index.dim + i];
        require(std::sqrt(square) * index.largest_centroid <= kLargestProduct, "user is too large: its products with the table overflow");
    }
    if (indptr) {
        const int64_t* p = data("indptr", *indptr, {count + 1});
        require(p[0] == 0 && p[count] == indices->size(), "indptr must go from 0 to the size of indices");
        for (int64_t u = 0; u < count; ++u) require(p[u] <= p[u + 1], "indptr must ascend");
    }
    return {choose_kernels(isa), sigmoid, count, user.data(), intent_scores ? intent_scores->data() : nullptr,
            indptr ? indptr->data() : nullptr, indices ? indices->data() : nullptr};
}

// f(batch, first user) for the users in batches.
template <class F>
void for_batches(const Index& index, const Request& r, bool counting, int64_t threads, const F& f) {
    for (int64_t first = 0; first < r.count; first += kBatch) {
        Batch batch(index, r.kernels, r.sigmoid, counting, r.user + first * index.dim, std::min(kBatch, r.count - first),
                    r.intent_scores ? r.intent_scores + first * index.intents : nullptr, r.indptr ? r.indptr + first : nullptr,
                    r.indices, threads);
        f(batch, first);
    }
}

Tally operator+(Tally a, Tally b) { return {a.scored + b.scored, a.exact + b.exact}; }

py::tuple search(const Index& index, Array<float> user, std::optional<Array<float>> intent_scores, bool sigmoid, int64_t k,
                 std::optional<Array<int64_t>> indptr, std::optional<Array<int32_t>> indices, Array<int64_t> out_items,
                 Array<float> out_scores, int64_t threads, const std::string& isa) {
    const Request r = check(index, user, intent_scores, sigmoid, indptr, indices, threads, isa);
    require(k >= 1, "k must be at least 1");
    data("out_items", out_items, {r.count, k}), data("out_scores", out_scores, {r.count, k});
    int64_t* items = out_items.mutable_data();
    float* scores = out_scores.mutable_data();
    Tally total;
    {
        py::gil_scoped_release release;
        for_batches(index, r, false, threads, [&](Batch& batch, int64_t first) {
            const int64_t slots = batch.slots();
            std::vector<Tally> seeding(batch.count), tallies(slots);
            std::vector<std::vector<Found>> found(slots * batch.count);
            parallel_for(batch.count, threads, [&](int64_t u) { batch.seed(u, k, seeding[u], found[u]); });
            std::vector<Batch::Keep> sinks;
            for (int64_t t = 0; t < slots; ++t) sinks.push_back({batch, k, 0, found.data() + t * batch.count});
            batch.sweep(tallies, sinks);
            for (int64_t u = 0; u < batch.count; ++u) {
                std::vector<Found> best;
                for (int64_t t = 0; t < slots; ++t)
                    best.insert(best.end(), found[t * batch.count + u].begin(), found[t * batch.count + u].end());
                const int64_t n = std::min<int64_t>(k, best.size());
                std::partial_sort(best.begin(), best.begin() + n, best.end());
                for (int64_t i = 0; i < k; ++i) {
                    items[(first + u) * k + i] = i < n ? best[i].item : -1;
                    scores[(first + u) * k + i] = i < n ? best[i].score : -INFINITY;
                }
            }
            for (const auto& all : {seeding, tallies})
                for (const Tally& one : all) total = total + one;
        });
    }
    return py::make_tuple(total.scored, total.exact);
}

py::tuple count_above(const Index& index, Array<float> user, std::optional<Array<float>> intent_scores, bool sigmoid,
                      Array<int64_t> answers, std::optional<Array<int64_t>> indptr, std::optional<Array<int32_t>> indices,
                      Array<int64_t> out, int64_t threads, const std::string& isa) {
    const Request r = check(index, user, intent_scores, sigmoid, indptr, indices, threads, isa);
    const int64_t* answer = data("answers", answers, {r.count});
    data("out", out, {2, r.count});
    for (int64_t u = 0; u < r.count; ++u) require(answer[u] >= 0 && answer[u] < index.items, "answers must be items of the table");
    for (int64_t i = 0; r.indptr && i < r.indptr[r.count]; ++i)
        require(r.indices[i] >= 0 && r.indices[i] < index.items, "indices must be items of the table");
    int64_t *above = out.mutable_data(), *equal = above + r.count;
    Tally total;
    {
        py::gil_scoped_release release;
        for_batches(index, r, true, threads, [&](Batch& batch, int64_t first) {
            for (int64_t u = 0; u < batch.count; ++u) batch.threshold[u] = batch.score(batch.users[u], answer[first + u]);
            std::vector<Tally> tallies(batch.slots());
            std::vector<Batch::Count> sinks(batch.slots(), {std::vector<Above>(batch.count)});
            batch.sweep(tallies, sinks);
            for (int64_t u = 0; u < batch.count; ++u) {
                const User& user = batch.users[u];
                const float threshold = batch.threshold[u];
                Above sum{0, -1};  // the answer is not above itself, nor does it count as equal
                for (const auto& sink : sinks) sum = {sum.above + sink.found[u].above, sum.equal + sink.found[u].equal};
                int32_t former = -1;
                for (int32_t item : user.excluded) {
                    if (item == former || item == answer[first + u]) continue;
                    former = item;
                    const float score = batch.score(user, item);
                    sum.above -= score > threshold, sum.equal -= score == threshold;
                }
                above[first + u] = sum.above, equal[first + u] = sum.equal;
            }
            for (const Tally& one : tallies) total = total + one;
        });
    }
    return py::make_tuple(total.scored, total.exact);
}

// Fills the arrays of an index for groups of items order[borders[g]] to order[borders[g + 1]], whose blocks begin at start[g].
void build(Array<float> table, Array<int32_t> order, Array<int64_t> borders, Array<int32_t> start, Array<float> centroids,
           Array<double> centroid_norm, Array<double> radius, Array<double> error, Array<float> scale,
           Array<int32_t> slot_item, Array<uint8_t> codes, int64_t threads) {
    require(table.ndim() == 2, "table must be (items, dim)");
    require_sane("table", table);
    expect_threads(threads);
    const int64_t items = table.shape(0), dim = table.shape(1), quads = (dim + 3) / 4, groups = start.size() - 1, blocks = radius.size();
    const int64_t *border = data("borders", borders, {groups + 1});
    const int32_t *item = data("order", order, {items}), *block = start.data();
    data("centroids", centroids, {(groups + kBlock - 1) / kBlock, dim, kBlock}), data("centroid_norm", centroid_norm, {groups});
    data("error", error, {blocks}), data("scale", scale, {blocks * kBlock}), data("slot_item", slot_item, {blocks * kBlock});
    data("codes", codes, {blocks, quads, kBlock, 4});
    require(border[0] == 0 && border[groups] == items && block[0] == 0 && block[groups] == blocks, "borders are damaged");
    for (int64_t g = 0; g < groups; ++g)
        require(border[g] <= border[g + 1] && border[g + 1] - border[g] <= (int64_t(block[g + 1]) - block[g]) * kBlock, "borders are damaged");
    for (int64_t i = 0; i < items; ++i) require(item[i] >= 0 && item[i] < items, "order must be of items");
    const float* rows = table.data();
    float *centroid_of = centroids.mutable_data(), *scales = scale.mutable_data();
    double *norm = centroid_norm.mutable_data(), *radii = radius.mutable_data(), *errors = error.mutable_data();
    int32_t* slots = slot_item.mutable_data();
    uint8_t* code = codes.mutable_data();
    py::gil_scoped_release release;
    std::fill_n(slots, blocks * kBlock, -1), std::fill_n(scales, blocks * kBlock, 0.0f);
    std::fill_n(radii, blocks, 0.0), std::fill_n(errors, blocks, 0.0);
    std::fill_n(code, blocks * quads * kBlock * 4, uint8_t(128)), std::fill_n(centroid_of, centroids.size(), 0.0f);
    parallel_for(groups, threads, [&](int64_t g) {
        const int64_t n = border[g + 1] - border[g];
        std::vector<double> centroid(dim);
        for (int64_t j = border[g]; j < border[g + 1]; ++j)
            for (int64_t i = 0; i < dim; ++i) centroid[i] += rows[item[j] * dim + i];
        double square = 0;
        for (int64_t i = 0; i < dim; ++i) {
            const float rounded = float(centroid[i] / double(std::max<int64_t>(n, 1)));
            centroid_of[(g / kBlock * dim + i) * kBlock + g % kBlock] = rounded;
            centroid[i] = rounded, square += double(rounded) * rounded;
        }
        norm[g] = std::sqrt(square) * (1 + 1e-10);
        std::vector<std::pair<double, int32_t>> far(n);  // the farthest from the centroid first
        for (int64_t j = 0; j < n; ++j) {
            const float* row = rows + item[border[g] + j] * dim;
            double distance = 0;
            for (int64_t i = 0; i < dim; ++i) distance += (row[i] - centroid[i]) * (row[i] - centroid[i]);
            far[j] = {-distance, item[border[g] + j]};
        }
        std::sort(far.begin(), far.end());
        for (int64_t j = 0; j < n; ++j) {
            const int64_t slot = block[g] * kBlock + j, b = slot / kBlock;
            const float* row = rows + far[j].second * dim;
            double largest = 0, rest = 0;
            for (int64_t i = 0; i < dim; ++i) largest = std::max(largest, std::abs(row[i] - centroid[i]));
            const float unit = float(largest / 127);
            const double per = unit > 0 ? 1 / double(unit) : 0;
            for (int64_t i = 0; i < dim; ++i) {
                const double x = row[i] - centroid[i], steps = x * per;
                const int q = int(std::min(127.0, std::max(-127.0, steps + (steps < 0 ? -0.5 : 0.5))));
                code[((b * quads + i / 4) * kBlock + slot % kBlock) * 4 + i % 4] = uint8_t(q + 128);
                rest += (x - double(unit) * q) * (x - double(unit) * q);
            }
            slots[slot] = far[j].second, scales[slot] = unit;
            radii[b] = std::max(radii[b], std::sqrt(-far[j].first) * (1 + 1e-10));
            errors[b] = std::max(errors[b], std::sqrt(rest) * (1 + 1e-10));
        }
        for (int64_t b = block[g + 1] - 2; b >= block[g]; --b)
            radii[b] = std::max(radii[b], radii[b + 1]), errors[b] = std::max(errors[b], errors[b + 1]);
    });
}

}  // namespace

void register_topk(py::module_& m) {
    m.def("topk_build", &build, py::arg("table").noconvert(), py::arg("order").noconvert(), py::arg("borders").noconvert(),
          py::arg("start").noconvert(), py::arg("centroids").noconvert(), py::arg("centroid_norm").noconvert(),
          py::arg("radius").noconvert(), py::arg("error").noconvert(), py::arg("scale").noconvert(),
          py::arg("slot_item").noconvert(), py::arg("codes").noconvert(), py::arg("threads"),
          "Fills the arrays of TopKIndex from centroids on.");
    py::class_<Index>(m, "TopKIndex", "The arrays of cafe_kernels.TopKIndex, checked.")
        .def(py::init<Array<float>, Array<int32_t>, int64_t, Array<int32_t>, Array<int32_t>, Array<int32_t>, Array<int32_t>,
                      Array<float>, Array<double>, Array<double>, Array<double>, Array<float>, Array<int32_t>, Array<uint8_t>>(),
             py::arg("table").noconvert(), py::arg("item_intent").noconvert(), py::arg("intents"),
             py::arg("start").noconvert(), py::arg("size").noconvert(), py::arg("first").noconvert(),
             py::arg("last").noconvert(), py::arg("centroids").noconvert(), py::arg("centroid_norm").noconvert(),
             py::arg("radius").noconvert(), py::arg("error").noconvert(), py::arg("scale").noconvert(),
             py::arg("slot_item").noconvert(), py::arg("codes").noconvert())
        .def("search", &search, py::arg("user").noconvert(), py::arg("intent_scores").noconvert(), py::arg("sigmoid"),
             py::arg("k"), py::arg("indptr").noconvert(), py::arg("indices").noconvert(), py::arg("out_items").noconvert(),
             py::arg("out_scores").noconvert(), py::arg("threads"), py::arg("isa") = "auto",
             "Fills out_items and out_scores; returns the pairs scored by codes and exactly.")
        .def("count_above", &count_above, py::arg("user").noconvert(), py::arg("intent_scores").noconvert(),
             py::arg("sigmoid"), py::arg("answers").noconvert(), py::arg("indptr").noconvert(),
             py::arg("indices").noconvert(), py::arg("out").noconvert(), py::arg("threads"), py::arg("isa") = "auto",
             "Fills out (above, equal); returns the pairs scored by codes and exactly.");
}

}  // namespace cafe

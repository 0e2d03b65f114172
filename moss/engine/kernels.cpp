// Decode on a CPU at the speed of memory: linear layers for a few tokens, and a whole step of the decoder.
//
// What    `moss_linear` is y = W x for 1 to 16 tokens, W in float32, bfloat16, int8 (a scale a row) or int4 (a scale
//         and an offset a group of 128); `moss_step` is everything from ids to the final norm for such a batch.
// Why     With one token every weight is read once and used once, so the only bound is memory; library kernels are
//         made for many tokens and stay at a third of it, and so do separate operations around them.
// How     Built by kernels.py with the flags of one path, which the macros below tell: AVX-512 VNNI, AVX2 or portable.
//         Threads are OpenMP's. Integer weights meet activations quantized to int8 a group of 128, so that the inner
//         loop is integer arithmetic on every path with equal results.
//
// A token's result does not depend on the tokens beside it, bit for bit: the sums of one row of W and one token run
// in one order, whatever tile they are in, and the compiler may not fuse a product into a sum (kernels.py).
// Shapes as in model.py; n is the number of tokens.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <omp.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

using i64 = int64_t;
using bf16 = uint16_t;

#if defined(__AVX512VNNI__)
constexpr int LANES = 16;      // floats a register
constexpr int ROWS = 4;        // rows of W that 4 tokens or more meet at once
constexpr float SHIFT = 128;   // dpbusd wants unsigned weights: int8 ones are read with this added
#else
#if defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int ROWS = 2;
constexpr float SHIFT = 0;
#endif
constexpr int CHAINS = 2;  // sums of one row that run side by side
constexpr i64 AHEAD = 2048;  // bytes before a row of int4 is needed that it is called for: its arithmetic is slower
constexpr int SPINS = 2000;  // looks at a barrier, some 50 us, before a thread goes to sleep there
constexpr i64 FEW = 1 << 19;  // products that one thread does sooner than two meet, where cores are busy
constexpr i64 GROUP = 128, PADDING = 16, BLOCK = 64;  // columns a scale; groups a load reads; keys a softmax piece

enum Kind : i64 { F32, BF16, INT8, INT4 };

extern "C" {
struct Linear {
    const void* weight;  // (rows, cols); int8: cols padded to GROUP; int4: columns j and j + 64 of a group in byte j
    const void* scale;   // int8: float32 (rows); int4: bfloat16 (rows, groups) and some rows more, as is offset
    const void* offset;  // int4: weight = scale * code + offset
    const float* bias;   // (rows) or null
    i64 rows, cols, kind;
};
struct Norm {
    const float *weight, *bias;  // with a bias it is LayerNorm, without RMSNorm
};
struct Layer {
    Norm attn_norm, mlp_norm, q_norm, k_norm;
    Linear q, k, v, o, gate, up, down;
};
struct Model {
    i64 num_layers, hidden, heads, kv_heads, head_dim, rotary_dim, ffn, moss, max_cols, quantized;
    double eps, rotary_factor;
    const float* rotary;  // (rotary_dim / 2)
    Linear embed;
    Norm norm;
    const Layer* layers;
};
struct Batch {
    i64 rows, num_new, first, threads;    // of the cache: neighbouring rows from `first`, each with num_new tokens
    const i64 *ids, *positions, *starts;  // (rows, num_new), (rows, num_new), (rows)
    void *const *keys, *const *values;    // a layer: (rows, kv heads, length, head_dim)
    i64 row_stride, head_stride, kind;    // of the cache, in elements
    float* out;                           // (rows, num_new, hidden)
};
}

namespace {

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));

// The sides of a tile are unrolled, so that it lives in registers.
#define EACH(i, count) _Pragma("GCC unroll 8") for (int i = 0; i < count; i++)

template <class To, class From>
inline To bits(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    std::memcpy(&result, &value, sizeof result);
    return result;
}
inline float widen(float value) { return value; }
inline float widen(bf16 value) { return bits<float>(uint32_t(value) << 16); }
inline void narrow(float value, float* p) { *p = value; }
inline void narrow(float value, bf16* p) {  // to the nearest, ties to even; not a number stays so
    uint32_t u = bits<uint32_t>(value);
    *p = value != value ? 0x7fc0 : bf16((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline vf load(const float* p) {
    vf v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

// What differs from path to path. dot8 and dot4 are the integer product of a group of weights and one of an input,
// spread over the lanes.
#if defined(__AVX512VNNI__)
inline __m512i bytes(const void* p) { return _mm512_loadu_si512(p); }
inline vf load(const bf16* p) {
    return bits<vf>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline vf fma(vf a, vf b, vf c) { return bits<vf>(_mm512_fmadd_ps(bits<__m512>(a), bits<__m512>(b), bits<__m512>(c))); }
inline float sum(vf v) { return _mm512_reduce_add_ps(bits<__m512>(v)); }
inline vi dot8(const int8_t* w, const int8_t* x) {
    const __m512i flip = _mm512_set1_epi8(-128);
    __m512i acc = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_xor_si512(bytes(w), flip), bytes(x));
    return bits<vi>(_mm512_dpbusd_epi32(acc, _mm512_xor_si512(bytes(w + 64), flip), bytes(x + 64)));
}
inline vi dot4(const uint8_t* w, const int8_t* x) {
    const __m512i mask = _mm512_set1_epi8(15);
    __m512i low = _mm512_and_si512(bytes(w), mask), high = _mm512_and_si512(_mm512_srli_epi16(bytes(w), 4), mask);
    __m512i acc = _mm512_dpbusd_epi32(_mm512_setzero_si512(), low, bytes(x));
    return bits<vi>(_mm512_dpbusd_epi32(acc, high, bytes(x + 64)));
}
#else
#if defined(__AVX2__)
inline __m256i bytes(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline __m256i words(const int8_t* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }
inline vf load(const bf16* p) {
    return bits<vf>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
inline vf fma(vf a, vf b, vf c) { return bits<vf>(_mm256_fmadd_ps(bits<__m256>(a), bits<__m256>(b), bits<__m256>(c))); }
inline vi dot8(const int8_t* w, const int8_t* x) {
    __m256i acc = _mm256_setzero_si256();
    for (int i = 0; i < GROUP; i += 16) acc = _mm256_add_epi32(acc, _mm256_madd_epi16(words(w + i), words(x + i)));
    return bits<vi>(acc);
}
inline vi dot4(const uint8_t* w, const int8_t* x) {  // at most 8 x 15 x 127 in 16 bits: no overflow
    const __m256i mask = _mm256_set1_epi8(15);
    __m256i acc = _mm256_setzero_si256();
    for (int i = 0; i < GROUP / 2; i += 32) {
        __m256i low = _mm256_and_si256(bytes(w + i), mask);
        __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes(w + i), 4), mask);
        acc = _mm256_add_epi16(acc, _mm256_maddubs_epi16(low, bytes(x + i)));
        acc = _mm256_add_epi16(acc, _mm256_maddubs_epi16(high, bytes(x + GROUP / 2 + i)));
    }
    return bits<vi>(_mm256_madd_epi16(acc, _mm256_set1_epi16(1)));
}
#else
inline vf load(const bf16* p) {
    vf v;
    EACH(i, LANES) v[i] = widen(p[i]);
    return v;
}
inline vf fma(vf a, vf b, vf c) { return a * b + c; }
inline vi dot8(const int8_t* w, const int8_t* x) {
    int32_t acc = 0;
#pragma omp simd reduction(+ : acc)
    for (int i = 0; i < GROUP; i++) acc += int16_t(w[i]) * int16_t(x[i]);
    return vi{acc};
}
inline vi dot4(const uint8_t* w, const int8_t* x) {
    int32_t acc = 0;
#pragma omp simd reduction(+ : acc)
    for (int i = 0; i < GROUP / 2; i++)
        acc += int16_t(w[i] & 15) * int16_t(x[i]) + int16_t(w[i] >> 4) * int16_t(x[i + GROUP / 2]);
    return vi{acc};
}
#endif
inline float sum(vf v) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) v[i] += v[i + half];
    return v[0];
}
#endif
inline vf splat(float value) { return value - vf{}; }  // "+" would have to add: it turns -0 into 0
inline vf scaled(vi whole, float scale, vf acc) { return fma(__builtin_convertvector(whole, vf), splat(scale), acc); }

inline float fast_exp(float x) {  // relative error below 2e-7; a polynomial that compilers turn into vectors
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = x * 1.44269504f + 12582912.0f;  // rounds to whole by pushing the fraction out
    int32_t power = bits<int32_t>(n) - 0x4b400000;
    n -= 12582912.0f;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r * r + r + 1.0f) * bits<float>((power + 127) << 23);
}

template <class T>
struct Array {  // memory of one call
    T* data;
    explicit Array(i64 count) : data(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64))) {
        if (!data) std::abort();
    }
    ~Array() { std::free(data); }
    Array(const Array&) = delete;
    operator T*() const { return data; }
};

inline int threads_for(i64 products, i64 threads) { return products <= FEW ? 1 : int(threads); }
inline i64 groups_of(i64 cols) { return (cols + GROUP - 1) / GROUP; }

// ---------------------------------------------------------------- linear layers

// What a thread multiplies weights with: n tokens as floats and, for integer weights, quantized a group.
struct Input {
    i64 padded, groups;
    Array<int8_t> codes;
    Array<float> scale, sums, total;  // (n, groups) twice; SHIFT x sum of all values (n)
    const float* x = nullptr;
    i64 stride = 0;

    Input(i64 n, i64 cols)
        : padded(groups_of(cols) * GROUP), groups((groups_of(cols) + PADDING - 1) / PADDING * PADDING),
          codes(n * padded), scale(n * groups), sums(n * groups), total(n) {}

    Input& read(const float* from, i64 from_stride, i64 n, i64 cols, bool quantize) {
        x = from, stride = from_stride;
        for (i64 t = 0; quantize && t < n; t++) {
            total[t] = 0;
            for (i64 g = 0; g < groups; g++) {
                const i64 count = std::min(GROUP, cols - g * GROUP);
                scale[t * groups + g] = sums[t * groups + g] = 0;
                if (count > 0) quantize_group(x + t * stride + g * GROUP, count, t, g);
                total[t] += SHIFT * sums[t * groups + g];
            }
        }
        return *this;
    }
    void quantize_group(const float* from, i64 count, i64 t, i64 g) {
        int8_t* to = codes + t * padded + g * GROUP;
        float most = 0, plain = 0;
#pragma omp simd reduction(max : most) reduction(+ : plain)
        for (i64 i = 0; i < count; i++) {
            const float size = std::fabs(from[i]);
            most = size > most ? size : most;
            plain += from[i];
        }
        const float inverse = most > 0 ? 127 / most : 0;
        int32_t whole = 0;
#pragma omp simd reduction(+ : whole)
        for (i64 i = 0; i < count; i++) {
            const int32_t code = bits<int32_t>(from[i] * inverse + 12582912.0f) - 0x4b400000;
            to[i] = int8_t(code);
            whole += code;
        }
        std::memset(to + count, 0, GROUP - count);
        const float step = most / 127 + 0 * plain;  // the second term carries infinity and not-a-number on
        scale[t * groups + g] = step, sums[t * groups + g] = step * whole;
    }
};

// y[r][t] of R rows of W and N tokens from `token`. With one token rows are read from their beginning to their end and
// then the next ones: only so do the hardware's prefetchers keep up with memory. Where several rows are read at a time
// the next ones are called for while they are.
template <int R, int N, class W>
inline void tile_float(const Linear& l, i64 row, const Input& in, i64 token, float (&y)[R][N]) {
    const W* w = static_cast<const W*>(l.weight) + row * l.cols;
    const float* x = in.x + token * in.stride;
    vf acc[CHAINS][R][N] = {};
    i64 i = 0;
    for (; i + CHAINS * LANES <= l.cols; i += CHAINS * LANES)
        EACH(c, CHAINS) {
            vf part[R];
            EACH(r, R) {
                part[r] = load(w + r * l.cols + i + c * LANES);
                if (R > 1) __builtin_prefetch(w + (R + r) * l.cols + i + c * LANES);
            }
            EACH(t, N) {
                const vf value = load(x + t * in.stride + i + c * LANES);
                EACH(r, R) acc[c][r][t] = fma(part[r], value, acc[c][r][t]);
            }
        }
    EACH(r, R) EACH(t, N) {
        y[r][t] = sum(acc[0][r][t] + acc[1][r][t]);
        for (i64 j = i; j < l.cols; j++) y[r][t] += widen(w[r * l.cols + j]) * x[t * in.stride + j];
    }
}

template <int R, int N>
inline void tile_int8(const Linear& l, i64 row, const Input& in, i64 token, float (&y)[R][N]) {
    const i64 groups = groups_of(l.cols), width = groups * GROUP;
    const int8_t *w = static_cast<const int8_t*>(l.weight) + row * width, *x = in.codes + token * in.padded;
    const float* scale = in.scale + token * in.groups;
    vf acc[R][N] = {};
    for (i64 g = 0; g < groups; g++) {
        const int8_t* part = w + g * GROUP;
        if (R > 1) EACH(r, R) EACH(half, 2) __builtin_prefetch(part + (R + r) * width + half * (GROUP / 2));
        EACH(t, N) EACH(r, R) {
            const vi whole = dot8(part + r * width, x + t * in.padded + g * GROUP);
            acc[r][t] = scaled(whole, scale[t * in.groups + g], acc[r][t]);
        }
    }
    EACH(r, R) EACH(t, N)
        y[r][t] = (sum(acc[r][t]) - in.total[token + t]) * static_cast<const float*>(l.scale)[row + r];
}

template <int R, int N>
inline void tile_int4(const Linear& l, i64 row, const Input& in, i64 token, float (&y)[R][N]) {
    const i64 groups = groups_of(l.cols), width = groups * (GROUP / 2);
    const uint8_t* w = static_cast<const uint8_t*>(l.weight) + row * width;
    const bf16 *scales = static_cast<const bf16*>(l.scale) + row * groups;
    const bf16 *offsets = static_cast<const bf16*>(l.offset) + row * groups;
    const int8_t* x = in.codes + token * in.padded;
    vf acc[R][N] = {};
    for (i64 first = 0; first < groups; first += LANES) {  // the scales of LANES groups; beyond the last, x is 0
        float step[R][N][LANES];
        EACH(r, R) {
            const vf scale = load(scales + r * groups + first), offset = load(offsets + r * groups + first);
            EACH(t, N) {
                const i64 at = (token + t) * in.groups + first;
                store(step[r][t], scale * load(in.scale + at));
                acc[r][t] = fma(offset, load(in.sums + at), acc[r][t]);
            }
        }
        const i64 count = std::min<i64>(LANES, groups - first);
        for (i64 g = 0; g < count; g++) {
            const uint8_t* part = w + (first + g) * (GROUP / 2);
            EACH(r, R) __builtin_prefetch(part + (R > 1 ? (R + r) * width : AHEAD));
            EACH(t, N) EACH(r, R) {
                const vi whole = dot4(part + r * width, x + t * in.padded + (first + g) * GROUP);
                acc[r][t] = scaled(whole, step[r][t][g], acc[r][t]);
            }
        }
    }
    EACH(r, R) EACH(t, N) y[r][t] = sum(acc[r][t]);
}

template <int K, int R, int N>
inline void tile(const Linear& l, i64 row, const Input& in, i64 token, float* out, i64 stride, bool add) {
    float y[R][N];
    if constexpr (K == F32) tile_float<R, N, float>(l, row, in, token, y);
    else if constexpr (K == BF16) tile_float<R, N, bf16>(l, row, in, token, y);
    else if constexpr (K == INT8) tile_int8<R, N>(l, row, in, token, y);
    else tile_int4<R, N>(l, row, in, token, y);
    EACH(r, R) EACH(t, N) {
        float* to = out + (token + t) * stride + row + r;
        *to = y[r][t] + (l.bias ? l.bias[row + r] : 0) + (add ? *to : 0);
    }
}

template <int K, int R>
inline void tiles(const Linear& l, i64 row, const Input& in, i64 n, float* out, i64 stride, bool add) {
    i64 t = 0;
    for (; t + 4 <= n; t += 4) tile<K, R, 4>(l, row, in, t, out, stride, add);
    for (; t + 2 <= n; t += 2) tile<K, R, 2>(l, row, in, t, out, stride, add);
    if (t < n) tile<K, R, 1>(l, row, in, t, out, stride, add);
}

template <int K>
__attribute__((noinline)) void rows_of(
    const Linear& l, i64 first, i64 last, const Input& in, i64 n, float* out, i64 stride, bool add) {
    i64 row = first;
    for (; n >= 4 && row + ROWS <= last; row += ROWS) tiles<K, ROWS>(l, row, in, n, out, stride, add);
    for (; row < last; row++) tiles<K, 1>(l, row, in, n, out, stride, add);
}

// Rows first to last of y = W x + bias; out (n, stride) is overwritten or, for a residual, added to.
void multiply(const Linear& l, i64 first, i64 last, const Input& in, i64 n, float* out, i64 stride, bool add = false) {
    static decltype(&rows_of<F32>) const kinds[] = {rows_of<F32>, rows_of<BF16>, rows_of<INT8>, rows_of<INT4>};
    kinds[l.kind](l, first, last, in, n, out, stride, add);
}

struct Share {  // the rows of a matrix that this thread works on
    i64 first, last;
    explicit Share(i64 rows) {
        const i64 id = omp_get_thread_num(), count = omp_get_num_threads();
        first = rows * id / count, last = rows * (id + 1) / count;
    }
};

// Where the threads of a step wait for each other. On quiet cores the last comes within some 10 us, for which sleep is
// too dear; on busy ones it comes after others' turns, and who spins takes the processor from whom it waits for.
// OpenMP's own barrier sends threads to sleep at once when the process has more of them than processors, for which a
// second pool (of the thread that loaded the model) is enough.
class Meeting {
    std::atomic<int> here{0}, round{0};

  public:
    void operator()() {
        const int now = round.load(std::memory_order_relaxed);
        if (here.fetch_add(1, std::memory_order_acq_rel) + 1 == omp_get_num_threads()) {
            here.store(0, std::memory_order_relaxed);
            round.store(now + 1);  // in one order with the look for sleepers, or one could be missed
            round.notify_all();
            return;
        }
        for (int spins = 0; spins < SPINS; spins++) {
            if (round.load(std::memory_order_acquire) != now) return;
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
        round.wait(now);
    }
};

void share(const Linear& l, const Input& in, i64 n, float* out, bool add = false) {
    const Share mine(l.rows);
    multiply(l, mine.first, mine.last, in, n, out, l.rows, add);
}

// ---------------------------------------------------------------- the step

void normalize(const Norm& norm, const float* x, float* y, i64 size, float eps) {
    float mean = 0, square = 0;
    if (norm.bias) {
#pragma omp simd reduction(+ : mean)
        for (i64 i = 0; i < size; i++) mean += x[i];
        mean /= size;
    }
#pragma omp simd reduction(+ : square)
    for (i64 i = 0; i < size; i++) square += (x[i] - mean) * (x[i] - mean);
    const float factor = 1 / std::sqrt(square / size + eps);
#pragma omp simd
    for (i64 i = 0; i < size; i++) y[i] = (x[i] - mean) * factor * norm.weight[i];
    if (norm.bias)
#pragma omp simd
        for (i64 i = 0; i < size; i++) y[i] += norm.bias[i];
}

// One head in place; turn holds cosines, then sines. Family moss turns neighbours, llama dimension i with i + half.
void rotate(const Model& m, float* x, const float* turn) {
    const i64 half = m.rotary_dim / 2, step = m.moss ? 2 : 1, gap = m.moss ? 1 : half;
    for (i64 i = 0; i < half; i++) {
        const float a = x[i * step], b = x[i * step + gap], cosine = turn[i], sine = turn[half + i];
        x[i * step] = a * cosine - b * sine, x[i * step + gap] = b * cosine + a * sine;
    }
}

template <class T>
struct Attention {
    const Model& m;
    const Batch& b;
    const float* turns;  // (n, rotary_dim)
    float *q, *k, *v, *out;
    const i64 dim = m.head_dim, group = m.heads / m.kv_heads;  // head size, query heads a key head
    Input in{0, 0};
    Array<float> scores{group * BLOCK}, most{group}, total{group};

    // All new tokens of one cache row and one key head: into the cache, then each attends to all up to itself.
    void run(const Layer& layer, i64 index, i64 row, i64 head) {
        const i64 at = (b.first + row) * b.row_stride + head * b.head_stride;
        T *keys = static_cast<T*>(b.keys[index]) + at, *values = static_cast<T*>(b.values[index]) + at;
        for (i64 t = row * b.num_new; t < (row + 1) * b.num_new; t++) {
            const i64 place = b.starts[row] + t - row * b.num_new;
            float *key = k + (t * m.kv_heads + head) * dim, *value = v + (t * m.kv_heads + head) * dim;
            float *queries = q + (t * m.heads + head * group) * dim, *to = out + (t * m.heads + head * group) * dim;
            prepare(layer.k_norm, key, t);
            for (i64 i = 0; i < group; i++) prepare(layer.q_norm, queries + i * dim, t);
            for (i64 i = 0; i < dim; i++) narrow(key[i], keys + place * dim + i);
            for (i64 i = 0; i < dim; i++) narrow(value[i], values + place * dim + i);
            attend(keys, values, place + 1, queries, to);
        }
    }
    void prepare(const Norm& norm, float* x, i64 t) {
        if (norm.weight) normalize(norm, x, x, dim, m.eps);
        rotate(m, x, turns + t * m.rotary_dim);
    }
    // The heads of a group over `length` keys, a block at a time with a running maximum.
    void attend(const T* keys, const T* values, i64 length, const float* queries, float* to) {
        std::memset(to, 0, group * dim * sizeof(float));
        for (i64 i = 0; i < group; i++) most[i] = -INFINITY, total[i] = 0;
        for (i64 first = 0; first < length; first += BLOCK) {
            const i64 count = std::min(BLOCK, length - first);
            const Linear block{keys + first * dim, nullptr, nullptr, nullptr, count, dim, sizeof(T) == 2 ? BF16 : F32};
            multiply(block, 0, count, in.read(queries, dim, group, dim, false), group, scores, BLOCK);
            for (i64 i = 0; i < group; i++) weigh(scores + i * BLOCK, count, i, to + i * dim, values + first * dim);
        }
        for (i64 i = 0; i < group; i++)
            for (i64 j = 0; j < dim; j++) to[i * dim + j] /= total[i];
    }
    // Some registers of a head's output so far, and the values of the block; those of the next one are called for.
    template <int C>
    void blend(const float* score, i64 count, float fade, float* to, const T* values) {
        vf acc[C];
        EACH(c, C) acc[c] = load(to + c * LANES) * fade;
        for (i64 s = 0; s < count; s++) EACH(c, C) {
            const T* value = values + s * dim + c * LANES;
            acc[c] = fma(load(value), splat(score[s]), acc[c]);
            __builtin_prefetch(value + BLOCK * dim);
        }
        EACH(c, C) store(to + c * LANES, acc[c]);
    }
    void weigh(float* score, i64 count, i64 head, float* to, const T* values) {
        const float scale = 1 / std::sqrt(float(dim));
        float top = most[head], part = 0;
#pragma omp simd reduction(max : top)
        for (i64 s = 0; s < count; s++) score[s] *= scale, top = score[s] > top ? score[s] : top;
        const float fade = fast_exp(most[head] - top);
#pragma omp simd reduction(+ : part)
        for (i64 s = 0; s < count; s++) part += score[s] = fast_exp(score[s] - top);
        most[head] = top, total[head] = total[head] * fade + part;
        i64 j = 0;
        for (; j + 4 * LANES <= dim; j += 4 * LANES) blend<4>(score, count, fade, to + j, values + j);
        for (; j + LANES <= dim; j += LANES) blend<1>(score, count, fade, to + j, values + j);
        for (; j < dim; j++) {
            to[j] *= fade;
            for (i64 s = 0; s < count; s++) to[j] += widen(values[s * dim + j]) * score[s];
        }
    }
};

// gelu_new of moss, or SwiGLU, on the rows of up and gate that this thread computed itself.
void activate(const Model& m, i64 n, float* up, const float* gate) {
    Share mine(m.ffn);
    for (i64 t = 0; t < n; t++) {
        float* u = up + t * m.ffn;
        const float* g = gate + t * m.ffn;
        if (m.moss) {
#pragma omp simd
            for (i64 i = mine.first; i < mine.last; i++)
                u[i] /= 1 + fast_exp(-1.5957691216f * (u[i] + 0.044715f * u[i] * u[i] * u[i]));
        } else {
#pragma omp simd
            for (i64 i = mine.first; i < mine.last; i++) u[i] *= g[i] / (1 + fast_exp(-g[i]));
        }
    }
}

template <class T>
void step(const Model& m, const Batch& b) {
    const i64 n = b.rows * b.num_new, size = m.hidden, queries = m.heads * m.head_dim, keys = m.kv_heads * m.head_dim;
    const i64 half = m.rotary_dim / 2;
    Array<float> x(n * size), q(n * queries), k(n * keys), v(n * keys), attended(n * queries), up(n * m.ffn);
    Array<float> gate(m.moss ? 0 : n * m.ffn), turns(n * m.rotary_dim);
    Meeting meet;
#pragma omp parallel num_threads(threads_for(n * size * m.ffn, b.threads))
    {
        const i64 id = omp_get_thread_num(), threads = omp_get_num_threads();
        Input in(n, m.max_cols);
        Array<float> normed(n * size);
        Attention<T> attention{m, b, turns, q, k, v, attended};
        for (i64 t = id; t < n; t += threads) {
            const i64 at = b.ids[t] * size;
            for (i64 i = 0; i < size; i++)
                x[t * size + i] = m.embed.kind == F32 ? static_cast<const float*>(m.embed.weight)[at + i]
                                                      : widen(static_cast<const bf16*>(m.embed.weight)[at + i]);
            for (i64 i = 0; i < half; i++) {
                const float angle = float(b.positions[t]) * m.rotary[i];
                turns[t * 2 * half + i] = std::cos(angle) * float(m.rotary_factor);
                turns[t * 2 * half + half + i] = std::sin(angle) * float(m.rotary_factor);
            }
        }
        auto norm_and_read = [&](const Norm& norm) {  // every thread for itself: cheaper than to wait for another
            for (i64 t = 0; t < n; t++) normalize(norm, x + t * size, normed + t * size, size, m.eps);
            in.read(normed, size, n, size, m.quantized);
        };
        meet();
        for (i64 index = 0; index < m.num_layers; index++) {
            const Layer& layer = m.layers[index];
            norm_and_read(layer.attn_norm);
            share(layer.q, in, n, q), share(layer.k, in, n, k), share(layer.v, in, n, v);
            if (m.moss) share(layer.up, in, n, up), activate(m, n, up, nullptr);
            meet();
            for (i64 item = id; item < b.rows * m.kv_heads; item += threads)
                attention.run(layer, index, item / m.kv_heads, item % m.kv_heads);
            meet();
            in.read(attended, queries, n, queries, m.quantized);
            share(layer.o, in, n, x, true);
            if (!m.moss) {
                meet();
                norm_and_read(layer.mlp_norm);
                share(layer.gate, in, n, gate), share(layer.up, in, n, up), activate(m, n, up, gate);
                meet();
            }
            in.read(up, m.ffn, n, m.ffn, m.quantized);
            share(layer.down, in, n, x, true);
            meet();
        }
        for (i64 t = id; t < n; t += threads) normalize(m.norm, x + t * size, b.out + t * size, size, m.eps);
    }
}

// Rows of integer weights as floats, (count, cols).
template <class T>
void unpack(const Linear& l, i64 first, i64 count, T* out, i64 threads) {
    const i64 groups = groups_of(l.cols);
#pragma omp parallel for num_threads(int(threads))
    for (i64 at = first * groups; at < (first + count) * groups; at++) {
        const i64 row = at / groups, start = at % groups * GROUP;
        const bool wide = l.kind == INT8;
        const int8_t* bytes = static_cast<const int8_t*>(l.weight) + at * GROUP;
        const uint8_t* pairs = static_cast<const uint8_t*>(l.weight) + at * (GROUP / 2);
        const float* scales = static_cast<const float*>(l.scale);
        const float scale = wide ? scales[row] : widen(static_cast<const bf16*>(l.scale)[at]);
        const float offset = wide ? 0 : widen(static_cast<const bf16*>(l.offset)[at]);
        T part[GROUP];
        for (i64 i = 0; i < GROUP / 2; i++) {
            narrow((wide ? bytes[i] : pairs[i] & 15) * scale + offset, part + i);
            narrow((wide ? bytes[i + GROUP / 2] : pairs[i] >> 4) * scale + offset, part + i + GROUP / 2);
        }
        std::memcpy(out + (row - first) * l.cols + start, part, std::min(GROUP, l.cols - start) * sizeof(T));
    }
}

}  // namespace

extern "C" {

void moss_linear(const Linear* l, const float* x, i64 n, float* y, i64 threads) {
#pragma omp parallel num_threads(threads_for(n * l->rows * l->cols, threads))
    {
        Input in(n, l->kind < INT8 ? 0 : l->cols);
        in.read(x, l->cols, n, l->cols, l->kind >= INT8);
        share(*l, in, n, y);
    }
}

void moss_unpack(const Linear* l, i64 first, i64 count, void* out, i64 kind, i64 threads) {
    if (kind == F32) unpack(*l, first, count, static_cast<float*>(out), threads);
    else unpack(*l, first, count, static_cast<bf16*>(out), threads);
}

// 0, or 1 for an id that the embedding does not have.
int moss_step(const Model* m, const Batch* b) {
    for (i64 t = 0; t < b->rows * b->num_new; t++)
        if (b->ids[t] < 0 || b->ids[t] >= m->embed.rows) return 1;
    if (b->kind == F32) step<float>(*m, *b);
    else step<bf16>(*m, *b);
    return 0;
}

}  // extern "C"

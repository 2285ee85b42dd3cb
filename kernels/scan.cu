// The selective scan on NVIDIA GPUs: forward and backward, any scan order and strides.
//
// Compiled by cuda.py through NVRTC, one ENTRY at a time. A channel's states are spread over SPLIT lanes of STATES each,
// so that a warp walks WIDTH = 32 / SPLIT channels of one scan through time, TILE steps at once. In a tile a lane loads,
// activates and stores only OWN = TILE / SPLIT steps of its channel; shared memory hands them to the lanes that need them.
// Loads of the next tile are in flight while the present one is worked on. Long sequences are cut into segments that run
// side by side: `reach` sums what a segment passes on, `carry` chains the segments, then each starts from its right state.
//
// Macros: ENTRY, ARGUMENT; THREADS, RESIDENT (blocks a processor), N, STATES, SPLIT, TILE; POLYNOMIAL: of 16 decays, how many the FMA pipe computes;
// KEEP_DECAY: the backward keeps a tile's decays rather than compute them twice; WRITE_STARTS; ADJOINT;
// X_TYPE, DELTA_TYPE, B_TYPE, C_TYPE, DY_TYPE (0 float, 1 bfloat16, 2 half); X_BY_TOKEN and so on: that tensor's tokens,
// not its channels or states, are neighbours in memory; IN_TYPE, OUT_TYPE, VECTOR of `sum`.

#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f
#define ROUND_UP(a, b) (((a) + (b) - 1) / (b))
#define INLINE __device__ __forceinline__

typedef long long i64;

constexpr int WARPS = THREADS / 32, WIDTH = 32 / SPLIT, CHANNELS = THREADS / SPLIT, PADDED = STATES * SPLIT;
constexpr int OWN = TILE / SPLIT, PER_STATE = ROUND_UP(TILE * PADDED, THREADS);
constexpr int PITCH = WIDTH + 1;  // of a warp's tile in shared memory: both ways of filling it miss bank conflicts

struct Strided { const void *data; i64 batch, scan; int token, inner; };

struct Call {
    Strided x, delta, B, C, dy;
    const float *A, *D, *bias;
    const float *carry;  // (batch, scans, segments, channels, N) or null: state before, or gradient after, each segment
    const int *order;    // (scans, length) or null
    float *ends, *sums;  // as carry, and (batch, scans, segments, channels): what each segment receives from its neighbour
    float *starts;       // (batch, scans, tiles, channels, N): state before each tile
    void *y, *dx, *ddelta;      // (batch, length, scans, channels)
    float *last;                // (batch, scans, channels, N): last state, or gradient of the initial state
    float *dA, *dD, *dbias;     // (batch, segments, scans, channels, N or nothing)
    float *dB, *dC;             // (channel blocks, batch, length, scans, N)
    i64 batch, length, scans, channels, segments, segment;  // segment: its steps, a multiple of TILE
    int softplus;
};

struct Sum { const void *in; void *out; i64 outer, terms, inner; };

template <int TYPE> struct Element { typedef unsigned short bits; };
template <> struct Element<0> { typedef unsigned bits; };

template <int TYPE> INLINE unsigned load(const void *p, i64 i) { return ((const typename Element<TYPE>::bits *)p)[i]; }

template <int TYPE> INLINE float decode(unsigned bits) {
    if (TYPE == 0) return __uint_as_float(bits);
    if (TYPE == 1) return __uint_as_float(bits << 16);
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"((unsigned short)bits));
    return f;
}

template <int TYPE> INLINE typename Element<TYPE>::bits encode(float f) {
    if (TYPE == 0) return __float_as_uint(f);
    unsigned short bits;
    if (TYPE == 2) {
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f));
        return bits;
    }
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(f));
    return bits;
#else
    const unsigned u = __float_as_uint(f);
    return f != f ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16;
#endif
}

template <int TYPE> INLINE void store(void *p, i64 i, float f) {
    ((typename Element<TYPE>::bits *)p)[i] = encode<TYPE>(f);
}

INLINE float exp2_fast(float v) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}

INLINE float log2_fast(float v) {
    float r;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}

// 2^v on the FMA pipe, relative error 1e-7: v = whole + part, |part| <= 1/2, and 2^whole added to the exponent
INLINE float exp2_polynomial(float v) {
    v = fminf(fmaxf(v, -126.f), 127.f);
    const float shifted = v + 12582912.f, part = v - (shifted - 12582912.f);
    float p = 1.326522611e-3f;
    p = p * part + 9.671231710e-3f;
    p = p * part + 5.550728478e-2f;
    p = p * part + 2.402224813e-1f;
    p = p * part + 6.931469860e-1f;
    p = p * part + 1.f;
    return __uint_as_float(__float_as_uint(p) + (__float_as_uint(shifted) << 23));
}

INLINE float decay(float log2_decay, int i) {
    return i * POLYNOMIAL % 16 + POLYNOMIAL >= 16 ? exp2_polynomial(log2_decay) : exp2_fast(log2_decay);
}

// log(1 + e), 0 <= e <= 1; float inputs: relative accuracy down to the smallest e; half precision: 2e-5
INLINE float log1p_small(float e) {
    if (DELTA_TYPE != 0) return e < 1.f / 128 ? e - 0.5f * e * e : LN2 * log2_fast(1.f + e);
    const float s = __fdividef(e, e + 2.f), q = s * s;
    const float p = 3.333315734e-1f + q * (2.001245514e-1f + q * (1.398030134e-1f + q * 1.408916763e-1f));
    return 2.f * s * (1.f + q * p);
}

INLINE float softplus(float v) { return fmaxf(v, 0.f) + log1p_small(exp2_fast(-fabsf(v) * LOG2E)); }

INLINE float sigmoid(float v) {
    const float e = exp2_fast(-fabsf(v) * LOG2E);
    return __fdividef(v > 0 ? 1.f : e, 1.f + e);
}

// What a block and a lane work on: a channel of one scan in one segment of time, walked forwards or backwards.
struct Place {
    i64 b, k, s, d0, begin, end, tiles;
    int warp, lane, c, part;  // c: channel within the warp
    bool backwards;
    const int *order;

    INLINE Place(const Call &call, bool backwards) : backwards(backwards) {
        const i64 blocks = ROUND_UP(call.channels, CHANNELS);
        i64 i = blockIdx.x;
        d0 = i % blocks * CHANNELS, i /= blocks;
        k = i % call.scans, i /= call.scans;
        s = i % call.segments, b = i / call.segments;
        begin = s * call.segment, end = min(begin + call.segment, call.length), tiles = ROUND_UP(end - begin, TILE);
        warp = threadIdx.x / 32, lane = threadIdx.x % 32, c = lane % WIDTH, part = lane / WIDTH;
        d0 += warp * WIDTH;
        order = call.order ? call.order + k * call.length : 0;
    }
    INLINE i64 d() const { return d0 + c; }
    INLINE i64 t0(i64 i) const { return begin + (backwards ? tiles - 1 - i : i) * TILE; }
    // token visited at step threadIdx.x of the i-th tile, for the threads that stage the rows of tiles
    INLINE int row(const Call &call, i64 i) const {
        const i64 t = min(max(t0(i) + threadIdx.x % TILE, 0LL), call.length - 1);
        return order ? order[t] : (int)t;
    }
    INLINE bool inside(const Call &call, i64 t, int channel) const { return t < end && d0 + channel < call.channels; }
    INLINE i64 channel(const Call &call) const { return k * call.channels + min(d(), call.channels - 1); }
    INLINE i64 in_segment(const Call &call, i64 segment) const {  // index into (batch, scans, segments, channels)
        return ((b * call.scans + k) * call.segments + segment) * call.channels + d();
    }
};

// A warp's (TILE, WIDTH) tile of one tensor: element j of a lane is step t of channel c. Neighbouring lanes take
// neighbours in memory; with channels as neighbours a lane keeps to its own channel, steps j * SPLIT + part.
struct Share {
    int t, c;
    INLINE Share(const Place &at, int j, bool by_token) {
        const int i = j * 32 + at.lane;
        t = by_token ? i % TILE : i / WIDTH, c = by_token ? i / TILE : i % WIDTH;
    }
};

// Loads are unconditional, so that all are in flight together, and stay undecoded until `publish` needs them
template <int TYPE, bool BY_TOKEN>
INLINE void fetch(unsigned *raw, const Call &call, const Place &at, const Strided &a, const int *rows) {
    const i64 base = at.b * a.batch + at.k * a.scan;
#pragma unroll
    for (int j = 0; j < OWN; j++) {
        const Share e(at, j, BY_TOKEN);
        raw[j] = load<TYPE>(a.data, base + (i64)rows[e.t] * a.token + min(at.d0 + e.c, call.channels - 1) * a.inner);
    }
}

template <int TYPE, bool BY_TOKEN>
INLINE void fetch_states(unsigned *raw, const Place &at, const Strided &a, const int *rows) {
    const i64 base = at.b * a.batch + at.k * a.scan;
#pragma unroll
    for (int j = 0; j < PER_STATE; j++) {
        const int i = min(threadIdx.x + j * THREADS, TILE * PADDED - 1);
        const int t = BY_TOKEN ? i % TILE : i / PADDED, n = BY_TOKEN ? i / TILE : i % PADDED;
        raw[j] = load<TYPE>(a.data, base + (i64)rows[t] * a.token + (i64)min(n, N - 1) * a.inner);
    }
}

template <int TYPE, bool BY_TOKEN> INLINE void publish_states(float *tile, const unsigned *raw) {
#pragma unroll
    for (int j = 0; j < PER_STATE; j++) {
        const int i = threadIdx.x + j * THREADS;
        const int t = BY_TOKEN ? i % TILE : i / PADDED, n = BY_TOKEN ? i / TILE : i % PADDED;
        if (i < TILE * PADDED) tile[t * PADDED + n] = n < N ? decode<TYPE>(raw[j]) : 0.f;
    }
}

// Steps past the end and channels past the last get zeros: decay 1 and no input
template <int TYPE, bool BY_TOKEN, class STEP>
INLINE void publish(STEP *tile, float STEP::*field, const unsigned *raw, const Call &call, const Place &at, i64 t0) {
#pragma unroll
    for (int j = 0; j < OWN; j++) {
        const Share e(at, j, BY_TOKEN);
        tile[e.t * PITCH + e.c].*field = at.inside(call, t0 + e.t, e.c) ? decode<TYPE>(raw[j]) : 0.f;
    }
}

INLINE void load_bias(float *bias, const Call &call, const Place &at) {
#pragma unroll
    for (int j = 0; j < OWN; j++) {
        const Share e(at, j, DELTA_BY_TOKEN);
        bias[j] = call.bias ? call.bias[at.k * call.channels + min(at.d0 + e.c, call.channels - 1)] : 0.f;
    }
}

template <class STEP>
INLINE void publish_delta(STEP *tile, const unsigned *raw, const float *bias, const Call &call, const Place &at, i64 t0) {
#pragma unroll
    for (int j = 0; j < OWN; j++) {
        const Share e(at, j, DELTA_BY_TOKEN);
        const float v = decode<DELTA_TYPE>(raw[j]) + bias[j];
        tile[e.t * PITCH + e.c].dt = at.inside(call, t0 + e.t, e.c) ? (call.softplus ? softplus(v) : v) : 0.f;
        if constexpr (STEP::HAS_SLOPE) tile[e.t * PITCH + e.c].slope = call.softplus ? sigmoid(v) : 1.f;
    }
}

// A lane's states of its channel, from or to an array (..., channels, N); `at` indexes (..., channels)
INLINE void load_states(float *h, const float *from, i64 at, int part, bool alive) {
    const float *p = from + at * N + part * STATES;
    if constexpr (N % 4 == 0 && STATES % 4 == 0) {
#pragma unroll
        for (int n = 0; n < STATES; n += 4) {
            const float4 v = alive ? *(const float4 *)(p + n) : make_float4(0.f, 0.f, 0.f, 0.f);
            h[n] = v.x, h[n + 1] = v.y, h[n + 2] = v.z, h[n + 3] = v.w;
        }
    } else {
#pragma unroll
        for (int n = 0; n < STATES; n++) h[n] = alive && part * STATES + n < N ? p[n] : 0.f;
    }
}

INLINE void store_states(const float *h, float *to, i64 at, int part, bool alive) {
    float *p = to + at * N + part * STATES;
    if constexpr (N % 4 == 0 && STATES % 4 == 0) {
#pragma unroll
        for (int n = 0; n < STATES; n += 4)
            if (alive) *(float4 *)(p + n) = make_float4(h[n], h[n + 1], h[n + 2], h[n + 3]);
    } else {
#pragma unroll
        for (int n = 0; n < STATES; n++)
            if (alive && part * STATES + n < N) p[n] = h[n];
    }
}

INLINE void load_decays(float *A, const Call &call, const Place &at) {
    load_states(A, call.A, at.channel(call), at.part, true);
#pragma unroll
    for (int n = 0; n < STATES; n++) A[n] *= LOG2E;
}

// A level of a sum over lanes: of 2 * HALF values each lane of a pair keeps one half, and the other lane adds its own
template <int HALF> INLINE void exchange(float *v, bool upper, int mask) {
#pragma unroll
    for (int i = 0; i < HALF; i++) {
        const float keep = upper ? v[HALF + i] : v[i], give = upper ? v[i] : v[HALF + i];
        v[i] = keep + __shfl_xor_sync(~0u, give, mask);
    }
}

// Sums v over the lanes of a channel: lane `part` gets the total of v[part] in v[0]
template <int HALF> INLINE void sum_parts(float *v, const Place &at) {
    if constexpr (HALF > 0) {
        exchange<HALF>(v, at.part & HALF, HALF * WIDTH);
        sum_parts<HALF / 2>(v, at);
    }
}

// Sums v over the channels of a warp: each lane gets 2 * HALF / WIDTH totals, from value first_total on
template <int HALF, int MASK = 1> INLINE void sum_channels(float *v, const Place &at) {
    if constexpr (MASK < WIDTH) {
        exchange<HALF>(v, at.c & MASK, MASK);
        sum_channels<HALF / 2, MASK * 2>(v, at);
    }
}

INLINE int first_total(int half, int c) {
    int first = 0;
    for (int mask = 1; mask < WIDTH; mask *= 2, half /= 2) first += c & mask ? half : 0;
    return first;
}

struct alignas(8) ForwardStep {
    static constexpr bool HAS_SLOPE = false;
    float dt, x;
};

INLINE void forward(const Call &c) {
    __shared__ int rows[3][TILE];  // of the present tile, the next and the one after
    __shared__ __align__(16) ForwardStep steps[WARPS][TILE * PITCH];
    __shared__ __align__(16) float B[2][TILE * PADDED], C[2][TILE * PADDED];
    const Place at(c, false);
    const bool alive = at.d() < c.channels;
    ForwardStep *tile = steps[at.warp];
    float A[STATES], h[STATES] = {}, bias[OWN];
    load_decays(A, c, at);
    load_bias(bias, c, at);
    if (c.carry) load_states(h, c.carry, at.in_segment(c, at.s), at.part, alive);
    const float skip = c.D ? c.D[at.channel(c)] : 0.f;

    unsigned x[OWN], delta[OWN], next_B[PER_STATE], next_C[PER_STATE];
    auto fetch_all = [&](const int *from) {
        fetch<X_TYPE, X_BY_TOKEN>(x, c, at, c.x, from);
        fetch<DELTA_TYPE, DELTA_BY_TOKEN>(delta, c, at, c.delta, from);
        fetch_states<B_TYPE, B_BY_TOKEN>(next_B, at, c.B, from);
        if (!WRITE_STARTS) fetch_states<C_TYPE, C_BY_TOKEN>(next_C, at, c.C, from);
    };
    if (threadIdx.x < TILE) rows[0][threadIdx.x] = at.row(c, 0);
    int ahead = at.row(c, 1);
    __syncthreads();
    fetch_all(rows[0]);
    for (i64 i = 0; i < at.tiles; i++) {
        const i64 t0 = at.t0(i);
        const int *here = rows[i % 3];
        const float *B_t = B[i % 2] + at.part * STATES, *C_t = C[i % 2] + at.part * STATES;
        __syncwarp();
        publish_delta(tile, delta, bias, c, at, t0);
        publish<X_TYPE, X_BY_TOKEN>(tile, &ForwardStep::x, x, c, at, t0);
        publish_states<B_TYPE, B_BY_TOKEN>(B[i % 2], next_B);
        if (!WRITE_STARTS) publish_states<C_TYPE, C_BY_TOKEN>(C[i % 2], next_C);
        if (threadIdx.x < TILE) rows[(i + 1) % 3][threadIdx.x] = ahead;
        __syncthreads();
        fetch_all(rows[(i + 1) % 3]);
        ahead = at.row(c, i + 2);
        if (WRITE_STARTS) {
            const i64 tiles = ROUND_UP(c.length, TILE);
            store_states(h, c.starts, ((at.b * c.scans + at.k) * tiles + t0 / TILE) * c.channels + at.d(), at.part, alive);
        }
        float y[SPLIT];
#pragma unroll
        for (int t = 0; t < TILE; t++) {
            const ForwardStep step = tile[t * PITCH + at.c];
            const float input = step.dt * step.x;
            float out = 0.f;
#pragma unroll
            for (int n = 0; n < STATES; n++) {
                h[n] = decay(step.dt * A[n], t * STATES + n) * h[n] + input * B_t[t * PADDED + n];
                if (!WRITE_STARTS) out += h[n] * C_t[t * PADDED + n];
            }
            y[t % SPLIT] = out;
            if (!WRITE_STARTS && t % SPLIT == SPLIT - 1) {
                const int own = t - (SPLIT - 1) + at.part;
                const i64 token = (at.b * c.length + here[own]) * c.scans + at.k;
                sum_parts<SPLIT / 2>(y, at);
                if (alive && t0 + own < at.end)
                    store<X_TYPE>(c.y, token * c.channels + at.d(), y[0] + skip * tile[own * PITCH + at.c].x);
            }
        }
    }
    if (!WRITE_STARTS && at.s == c.segments - 1)
        store_states(h, c.last, (at.b * c.scans + at.k) * c.channels + at.d(), at.part, alive);
}

// What a segment alone passes on to the next: its last state from a zero start, sum_t exp(A sum_{i>t} dt_i) dt_t x_t B_t;
// ADJOINT, with dy for x and C for B: to the one before, sum_t exp(A sum_{i<=t} dt_i) dy_t C_t. Walked away from the
// receiving end, so that it can stop where every weight has underflowed to 0.
INLINE void reach(const Call &c) {
    __shared__ int rows[3][TILE];
    __shared__ __align__(16) ForwardStep steps[WARPS][TILE * PITCH];
    __shared__ __align__(16) float B[2][TILE * PADDED];
    const Place at(c, !ADJOINT);
    const i64 receiver = ADJOINT ? at.s - 1 : at.s + 1;
    if (receiver < 0 || receiver == c.segments) return;
    const bool alive = at.d() < c.channels;
    ForwardStep *tile = steps[at.warp];
    float A[STATES], ends[STATES] = {}, bias[OWN], sum = 0.f, slowest = -__int_as_float(0x7f800000);
    load_decays(A, c, at);
    load_bias(bias, c, at);
#pragma unroll
    for (int n = 0; n < STATES; n++)
        if (at.part * STATES + n < N) slowest = fmaxf(slowest, A[n]);

    unsigned x[OWN], delta[OWN], next_B[PER_STATE];
    auto fetch_all = [&](const int *from) {
        fetch<X_TYPE, X_BY_TOKEN>(x, c, at, c.x, from);
        fetch<DELTA_TYPE, DELTA_BY_TOKEN>(delta, c, at, c.delta, from);
        fetch_states<B_TYPE, B_BY_TOKEN>(next_B, at, c.B, from);
    };
    if (threadIdx.x < TILE) rows[0][threadIdx.x] = at.row(c, 0);
    int ahead = at.row(c, 1);
    __syncthreads();
    fetch_all(rows[0]);
    for (i64 i = 0; i < at.tiles; i++) {
        const float *B_t = B[i % 2] + at.part * STATES;
        __syncwarp();
        publish_delta(tile, delta, bias, c, at, at.t0(i));
        publish<X_TYPE, X_BY_TOKEN>(tile, &ForwardStep::x, x, c, at, at.t0(i));
        publish_states<B_TYPE, B_BY_TOKEN>(B[i % 2], next_B);
        if (threadIdx.x < TILE) rows[(i + 1) % 3][threadIdx.x] = ahead;
        if (__syncthreads_and(!alive || (c.softplus && slowest * sum < -127.f))) break;  // else steps may be negative
        fetch_all(rows[(i + 1) % 3]);
        ahead = at.row(c, i + 2);
        float within = 0.f;
#pragma unroll
        for (int j = 0; j < TILE; j++) {
            const int t = ADJOINT ? j : TILE - 1 - j;
            const ForwardStep step = tile[t * PITCH + at.c];
            const float input = ADJOINT ? step.x : step.dt * step.x;
            if (ADJOINT) within += step.dt;
#pragma unroll
            for (int n = 0; n < STATES; n++)
                ends[n] += decay((sum + within) * A[n], t * STATES + n) * (input * B_t[t * PADDED + n]);
            if (!ADJOINT) within += step.dt;
        }
        sum += within;
    }
    store_states(ends, c.ends, at.in_segment(c, receiver), at.part, alive);
    if (alive && at.part == 0) c.sums[at.in_segment(c, receiver)] = sum;
}

// ends[s] becomes the state before segment s (ADJOINT: the gradient after it); one thread a state
INLINE void carry(const Call &c) {
    const i64 row = c.channels * N, i = (i64)blockIdx.x * THREADS + threadIdx.x, scan = i / row, at = i % row;
    if (scan >= c.batch * c.scans) return;
    const float A = c.A[scan % c.scans * row + at] * LOG2E;
    float h = c.carry ? c.carry[i] : 0.f;
    constexpr int AHEAD = 8;
    for (i64 s0 = 0; s0 < c.segments; s0 += AHEAD) {
        float end[AHEAD], sum[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            const i64 s = min(s0 + j, c.segments - 1), from = scan * c.segments + (ADJOINT ? c.segments - 1 - s : s);
            end[j] = s ? c.ends[from * row + at] : 0.f;
            sum[j] = s ? c.sums[from * c.channels + at / N] : 0.f;
        }
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            const i64 s = s0 + j, to = scan * c.segments + (ADJOINT ? c.segments - 1 - s : s);
            h = exp2_fast(A * sum[j]) * h + end[j];
            if (s < c.segments) c.ends[to * row + at] = h;
        }
    }
}

struct alignas(16) BackwardStep {
    static constexpr bool HAS_SLOPE = true;
    float dt, x, dy, slope;
};

// With g_t the gradient of h_t: g_t = C_t dy_t + a_{t+1} g_{t+1}. Tiles from the last to the first; a tile's states are
// recomputed from its start and stay in registers.
INLINE void backward(const Call &c) {
    // dB and dC of GROUP steps are summed over channels together: enough values for each lane to end with its own
    constexpr int GROUP = WIDTH > 2 * STATES ? WIDTH / (2 * STATES) : 1, VALUES = GROUP * 2 * STATES;
    static_assert(GROUP <= TILE, "a tile holds a group of steps");
    __shared__ int rows[3][TILE];
    __shared__ __align__(16) BackwardStep steps[WARPS][TILE * PITCH];
    __shared__ __align__(16) float B[TILE * PADDED], C[TILE * PADDED];
    __shared__ float partial[WARPS][TILE * 2 * PADDED];  // dB and dC of a tile
    const Place at(c, true);
    const bool alive = at.d() < c.channels;
    BackwardStep *tile = steps[at.warp];
    const float *B_t = B + at.part * STATES, *C_t = C + at.part * STATES;
    float A[STATES], g[STATES] = {}, dA[STATES] = {}, bias[OWN], dD = 0.f, dbias = 0.f;
    load_decays(A, c, at);
    load_bias(bias, c, at);
    if (c.carry) load_states(g, c.carry, at.in_segment(c, at.s), at.part, alive);
    const float skip = c.D ? c.D[at.channel(c)] : 0.f;
    const int first = first_total(VALUES / 2, at.c);
    const i64 first_start = (at.b * c.scans + at.k) * ROUND_UP(c.length, TILE);

    unsigned x[OWN], delta[OWN], dy[OWN], next_B[PER_STATE], next_C[PER_STATE];
    float start[STATES];
    auto fetch_all = [&](i64 i, const int *from) {
        fetch<X_TYPE, X_BY_TOKEN>(x, c, at, c.x, from);
        fetch<DELTA_TYPE, DELTA_BY_TOKEN>(delta, c, at, c.delta, from);
        fetch<DY_TYPE, DY_BY_TOKEN>(dy, c, at, c.dy, from);
        fetch_states<B_TYPE, B_BY_TOKEN>(next_B, at, c.B, from);
        fetch_states<C_TYPE, C_BY_TOKEN>(next_C, at, c.C, from);
        load_states(start, c.starts, (first_start + max(at.t0(i), 0LL) / TILE) * c.channels + at.d(), at.part, alive);
    };
    if (threadIdx.x < TILE) rows[0][threadIdx.x] = at.row(c, 0);
    int ahead = at.row(c, 1);
    __syncthreads();
    fetch_all(0, rows[0]);
    for (i64 i = 0; i < at.tiles; i++) {
        const i64 t0 = at.t0(i);
        const int *here = rows[i % 3];
        __syncwarp();
        publish_delta(tile, delta, bias, c, at, t0);
        publish<X_TYPE, X_BY_TOKEN>(tile, &BackwardStep::x, x, c, at, t0);
        publish<DY_TYPE, DY_BY_TOKEN>(tile, &BackwardStep::dy, dy, c, at, t0);
        publish_states<B_TYPE, B_BY_TOKEN>(B, next_B);
        publish_states<C_TYPE, C_BY_TOKEN>(C, next_C);
        if (threadIdx.x < TILE) rows[(i + 1) % 3][threadIdx.x] = ahead;
        float h[TILE + 1][STATES], a[KEEP_DECAY ? TILE : 1][STATES];  // h[t]: state before step t
#pragma unroll
        for (int n = 0; n < STATES; n++) h[0][n] = start[n];
        __syncthreads();
        fetch_all(i + 1, rows[(i + 1) % 3]);
        ahead = at.row(c, i + 2);
#pragma unroll
        for (int t = 0; t < TILE; t++) {
            const BackwardStep step = tile[t * PITCH + at.c];
            const float input = step.dt * step.x;
#pragma unroll
            for (int n = 0; n < STATES; n++) {
                const float a_n = decay(step.dt * A[n], t * STATES + n);
                h[t + 1][n] = a_n * h[t][n] + input * B_t[t * PADDED + n];
                if (KEEP_DECAY) a[t][n] = a_n;
            }
        }
        float dinput[SPLIT], dlog[SPLIT], dBC[VALUES];
#pragma unroll
        for (int t = TILE - 1; t >= 0; t--) {
            const BackwardStep step = tile[t * PITCH + at.c];
            const float input = step.dt * step.x;
            float *dB = dBC + t % GROUP * 2 * STATES, *dC = dB + STATES;
            dinput[t % SPLIT] = dlog[t % SPLIT] = 0.f;
#pragma unroll
            for (int n = 0; n < STATES; n++) {
                const float a_n = KEEP_DECAY ? a[t][n] : decay(step.dt * A[n], t * STATES + n);
                const float g_n = g[n] + step.dy * C_t[t * PADDED + n];
                g[n] = g_n * a_n;
                const float w = g[n] * h[t][n];
                dB[n] = g_n * input;
                dC[n] = step.dy * h[t + 1][n];
                dinput[t % SPLIT] += g_n * B_t[t * PADDED + n];
                dlog[t % SPLIT] += w * A[n];
                dA[n] += w * step.dt;
            }
            if (t % GROUP == 0) {
                sum_channels<VALUES / 2>(dBC, at);
#pragma unroll
                for (int v = 0; v < VALUES / WIDTH; v++) {
                    const int value = first + v, n = value % STATES, is_C = value / STATES % 2, own = t + value / (2 * STATES);
                    partial[at.warp][(own * 2 + is_C) * PADDED + at.part * STATES + n] = dBC[v];
                }
            }
            if (t % SPLIT == 0) {
                const int own = t + at.part;
                const BackwardStep mine = tile[own * PITCH + at.c];
                sum_parts<SPLIT / 2>(dinput, at);
                sum_parts<SPLIT / 2>(dlog, at);
                const float ddelta = (dinput[0] * mine.x + dlog[0] * LN2) * mine.slope;
                dD += mine.dy * mine.x;
                if (t0 + own < at.end) dbias += ddelta;
                const i64 token = (at.b * c.length + here[own]) * c.scans + at.k;
                if (alive && t0 + own < at.end) {
                    store<X_TYPE>(c.dx, token * c.channels + at.d(), dinput[0] * mine.dt + skip * mine.dy);
                    store<DELTA_TYPE>(c.ddelta, token * c.channels + at.d(), ddelta);
                }
            }
        }
        __syncthreads();
        const i64 block = blockIdx.x % ROUND_UP(c.channels, CHANNELS);
        for (int v = threadIdx.x; v < TILE * 2 * PADDED; v += THREADS) {
            const int t = v / (2 * PADDED), is_C = v / PADDED % 2, n = v % PADDED;
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += partial[w][v];
            const i64 token = block * c.batch * c.length + at.b * c.length + here[t];
            if (t0 + t < at.end && n < N) (is_C ? c.dC : c.dB)[(token * c.scans + at.k) * N + n] = sum;
        }
    }
    const i64 piece = ((at.b * c.segments + at.s) * c.scans + at.k) * c.channels + at.d();
    store_states(dA, c.dA, piece, at.part, alive);
    if (at.s == 0) store_states(g, c.last, (at.b * c.scans + at.k) * c.channels + at.d(), at.part, alive);
#pragma unroll
    for (int mask = WIDTH; mask < 32; mask *= 2) {
        dD += __shfl_xor_sync(~0u, dD, mask);
        dbias += __shfl_xor_sync(~0u, dbias, mask);
    }
    if (alive && at.part == 0) c.dD[piece] = dD, c.dbias[piece] = dbias;
}

template <int TYPE> struct alignas(VECTOR * sizeof(typename Element<TYPE>::bits)) Pack {
    typename Element<TYPE>::bits v[VECTOR];
};

// out[o, i] = sum over the terms j of in[o, j, i], in order; VECTOR neighbours a thread
INLINE void sum(const Sum &s) {
    const i64 i = (i64)blockIdx.x * THREADS + threadIdx.x, inner = s.inner / VECTOR, o = i / inner;
    if (o >= s.outer) return;
    const Pack<IN_TYPE> *in = (const Pack<IN_TYPE> *)s.in + o * s.terms * inner + i % inner;
    float total[VECTOR] = {};
#pragma unroll 4
    for (i64 j = 0; j < s.terms; j++) {
        const Pack<IN_TYPE> term = in[j * inner];
#pragma unroll
        for (int v = 0; v < VECTOR; v++) total[v] += decode<IN_TYPE>(term.v[v]);
    }
    Pack<OUT_TYPE> out;
#pragma unroll
    for (int v = 0; v < VECTOR; v++) out.v[v] = encode<OUT_TYPE>(total[v]);
    ((Pack<OUT_TYPE> *)s.out)[i] = out;
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) entry(const ARGUMENT argument) { ENTRY(argument); }

// The selective scan with one state a channel whose K scans add up in shared memory: x is read from memory once, y is
// written once, and nothing in between.
//
// A block takes GROUP channels of one image through its K scans, one after the other; `sum`, (length, GROUP) in dynamic
// shared memory, collects y. Lanes are 8 pairs of channels x 4 stretches of STEPS steps, so a warp advances REACH steps
// at once, a block SPAN. A lane walks its stretch from a zero state; stretches are chained by shuffles, warps through
// shared memory, spans by `carry`; then every step adds what its stretch's true start contributes. The next span's
// loads are in flight meanwhile. After scan.cuh; macros as there, and STEPS.

constexpr int PAIRS = 8, GROUP = 2 * PAIRS, REACH = 4 * STEPS, SPAN = WARPS * REACH, OWN_STEPS = REACH / 32;
static_assert(N == 1 && REACH % 32 == 0 && (EVERY == 0 || STEPS % EVERY == 0), "a stretch begins at a kept state");

template <int TYPE> struct Pair {
    unsigned bits;
    INLINE void blank() { bits = TYPE == 1 ? 0xff80ff80 : 0xfc00fc00; }  // minus infinity, whose softplus is 0
    INLINE void fetch(const char *p) { bits = __ldg((const unsigned *)p); }
    INLINE float2 value() const {
        return make_float2(decode<TYPE>(TYPE == 1 ? bits : bits & 0xffff),
                           TYPE == 1 ? __uint_as_float(bits & 0xffff0000) : decode<TYPE>(bits >> 16));
    }
};
template <> struct Pair<0> {
    float2 bits;
    INLINE void blank() { bits.x = bits.y = -__int_as_float(0x7f800000); }
    INLINE void fetch(const char *p) { bits = __ldg((const float2 *)p); }
    INLINE float2 value() const { return bits; }
};

// Where a token's sums begin. Two tokens share the 32 banks; which half a token takes is mixed from its bits, so that
// stretches that advance side by side along rows or columns mostly take different ones.
INLINE int place(int row) { return row / 2 * 128 + ((row ^ row >> 3 ^ row >> 6) & 1) * 64; }

// A span of a scan
struct Span {
    int k, i, spans;
    INLINE void advance() {
        if (++i == spans) i = 0, k++;
    }
};

INLINE void merged(const Call &c) {
    __shared__ __align__(16) float shared_B[WARPS][REACH];
    __shared__ __align__(16) float2 shared_C[WARPS][REACH];  // with the token's place
    __shared__ __align__(16) int shared_rows[WARPS][REACH];  // of the next span
    __shared__ float4 totals[2][WARPS][PAIRS];  // of a warp's steps: decay and end state of each channel
    __shared__ float2 carry[2][PAIRS];
    char *sum = dynamic_shared();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pair = lane % PAIRS, first = lane / PAIRS * STEPS;
    const int length = (int)c.length, scans = (int)c.scans, channels = (int)c.channels, groups = channels / GROUP;
    const int b = blockIdx.x / groups, d = blockIdx.x % groups * GROUP + pair * 2;
    const char *x = whole(c.x + b * c.x_view.batch + d * c.x_view.inner);
    const char *delta = whole(c.delta + b * c.delta_view.batch + d * c.delta_view.inner);
    const char *B = whole(c.B + b * c.B_view.batch), *C = whole(c.C + b * c.C_view.batch);
    const float *B_t = shared_B[warp] + first;
    const float2 *C_t = shared_C[warp] + first;
    const int *rows = shared_rows[warp] + first;

    Pair<X_TYPE> raw_x[STEPS];
    Pair<DELTA_TYPE> raw_delta[STEPS];
    unsigned raw_B[OWN_STEPS], raw_C[OWN_STEPS];  // of the steps lane, lane + 32 of the warp
    int row[OWN_STEPS], row_next[OWN_STEPS], row_after[OWN_STEPS];
    float2 next_A, next_bias;
    Span here = {0, 0, ROUND_UP(length, SPAN)}, next = here, after;

    auto tokens = [&](int *row, const Span &at) {
#pragma unroll
        for (int o = 0; o < OWN_STEPS; o++) {
            const int t = min(at.i * SPAN + warp * REACH + o * 32 + lane, length - 1);
            row[o] = c.order ? __ldg(c.order + min(at.k, scans - 1) * length + t) : t;
        }
    };
    auto fetch_shared = [&](const int *row) {
        const int k = min(next.k, scans - 1), at = k * channels + d;
        const char *B_k = B + offset(k, (int)c.B_view.scan), *C_k = C + offset(k, (int)c.C_view.scan);
#pragma unroll
        for (int o = 0; o < OWN_STEPS; o++) {
            raw_B[o] = load<B_TYPE>(B_k + offset(row[o], c.B_view.token));
            raw_C[o] = load<C_TYPE>(C_k + offset(row[o], c.C_view.token));
        }
        next_A = __ldg((const float2 *)(c.A + at));
        next_bias = c.bias ? __ldg((const float2 *)(c.bias + at)) : make_float2(0.f, 0.f);
    };
    for (int i = threadIdx.x; i < ROUND_UP(length, 2) * 8; i += THREADS)
        ((float4 *)sum)[i] = make_float4(0.f, 0.f, 0.f, 0.f);

    tokens(row, here);
    fetch_shared(row);
#pragma unroll
    for (int o = 0; o < OWN_STEPS; o++) shared_rows[warp][o * 32 + lane] = row[o];
    __syncwarp();
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
        raw_x[j].fetch(x + offset(rows[j], c.x_view.token));
        raw_delta[j].fetch(delta + offset(rows[j], c.delta_view.token));
    }
    next.advance();
    tokens(row_next, next);
    after = next;
    after.advance();

    for (int n = 0; here.k < scans; n ^= 1) {
        const int left = length - here.i * SPAN - warp * REACH - first;  // steps of the scan from the stretch on
        const float2 A = next_A, bias = make_float2(next_bias.x * LOG2E, next_bias.y * LOG2E);
        __syncwarp();
#pragma unroll
        for (int o = 0; o < OWN_STEPS; o++) {
            const int at = o * 32 + lane;
            shared_rows[warp][at] = row_next[o];
            shared_B[warp][at] = decode<B_TYPE>(raw_B[o]) * LN2;
            shared_C[warp][at] = make_float2(decode<C_TYPE>(raw_C[o]), __int_as_float(place(row[o])));
        }
        __syncwarp();
        fetch_shared(row_next);
        tokens(row_after, after);
        const char *next_delta = whole(delta + offset(min(next.k, scans - 1), (int)c.delta_view.scan));

        if (SOFTPLUS && left + first < REACH) {
#pragma unroll
            for (int j = 0; j < STEPS; j++)
                if (j >= left) raw_delta[j].blank();
        }
        // from a zero state before the stretch: the state after each step, and the decay up to it
        float2 h[STEPS], p[STEPS];
#pragma unroll
        for (int j = 0; j < STEPS; j++) {
            const float2 v = raw_delta[j].value(), w = raw_x[j].value();
            raw_delta[j].fetch(next_delta + offset(rows[j], c.delta_view.token));
            raw_x[j].fetch(x + offset(rows[j], c.x_view.token));
            float2 dt = make_float2(v.x * LOG2E + bias.x, v.y * LOG2E + bias.y);  // delta log2(e)
            if (SOFTPLUS) dt = make_float2(softplus2(dt.x), softplus2(dt.y));
            if (!SOFTPLUS && j >= left) dt = make_float2(0.f, 0.f);
            const float2 a = make_float2(exp2_fast(dt.x * A.x), exp2_fast(dt.y * A.y));
            h[j] = make_float2(w.x * B_t[j] * dt.x, w.y * B_t[j] * dt.y);
            p[j] = a;
            if (j) {
                h[j] = make_float2(a.x * h[j - 1].x + h[j].x, a.y * h[j - 1].y + h[j].y);
                p[j] = make_float2(a.x * p[j - 1].x, a.y * p[j - 1].y);
            }
        }
        float2 to_p = p[STEPS - 1], to_h = h[STEPS - 1];  // of all stretches up to this one
#pragma unroll
        for (int by = PAIRS; by < 32; by *= 2) {
            const float2 q = make_float2(__shfl_up_sync(~0u, to_p.x, by), __shfl_up_sync(~0u, to_p.y, by));
            const float2 g = make_float2(__shfl_up_sync(~0u, to_h.x, by), __shfl_up_sync(~0u, to_h.y, by));
            if (lane >= by) {
                to_h = make_float2(to_p.x * g.x + to_h.x, to_p.y * g.y + to_h.y);
                to_p.x *= q.x, to_p.y *= q.y;
            }
        }
        if (lane >= 24) totals[n][warp][pair] = make_float4(to_p.x, to_h.x, to_p.y, to_h.y);
        __syncthreads();

        float2 s = carry[n ^ 1][pair];  // state before the warp's steps, then before the stretch
        const i64 state = (i64)(b * scans + here.k) * channels + d;
        if (here.i == 0) s = c.initial ? *(const float2 *)(c.initial + state) : make_float2(0.f, 0.f);
#pragma unroll 4
        for (int v = 0; v < warp; v++) {
            const float4 total = totals[n][v][pair];
            s = make_float2(total.x * s.x + total.y, total.z * s.y + total.w);
        }
        if (warp == WARPS - 1 && lane >= 24) {
            const float2 end = make_float2(to_p.x * s.x + to_h.x, to_p.y * s.y + to_h.y);
            carry[n][pair] = end;
            if (c.last && here.i == here.spans - 1) *(float2 *)(c.last + state) = end;
        }
        to_p = make_float2(__shfl_up_sync(~0u, to_p.x, PAIRS), __shfl_up_sync(~0u, to_p.y, PAIRS));
        to_h = make_float2(__shfl_up_sync(~0u, to_h.x, PAIRS), __shfl_up_sync(~0u, to_h.y, PAIRS));
        if (first) s = make_float2(to_p.x * s.x + to_h.x, to_p.y * s.y + to_h.y);
        auto state_before = [&](int j) {
            return j ? make_float2(p[j - 1].x * s.x + h[j - 1].x, p[j - 1].y * s.y + h[j - 1].y) : s;
        };
        if (EVERY) {
            constexpr int PERIOD = EVERY ? EVERY : 1;
            const int t = (here.i * SPAN + warp * REACH + first) / PERIOD;
            const i64 at = ((i64)(b * scans + here.k) * ROUND_UP(length, PERIOD) + t) * channels + d;
#pragma unroll
            for (int j = 0; j < STEPS; j += PERIOD) {
                Pack<START_TYPE, 2> kept;
                kept.v[0] = encode<START_TYPE>(state_before(j).x), kept.v[1] = encode<START_TYPE>(state_before(j).y);
                if (j < left) ((Pack<START_TYPE, 2> *)c.starts)[(at + j / PERIOD * channels) / 2] = kept;
            }
        }
        auto add = [&](int j) {
            const float2 h = state_before(j + 1);
            float2 *to = (float2 *)(sum + __float_as_int(C_t[j].y) + pair * 8);
            *to = make_float2(C_t[j].x * h.x + to->x, C_t[j].x * h.y + to->y);
        };
        if (left + first >= REACH) {
#pragma unroll
            for (int j = 0; j < STEPS; j++) add(j);
        } else {
#pragma unroll
            for (int j = 0; j < STEPS; j++)
                if (j < left) add(j);
        }
#pragma unroll
        for (int o = 0; o < OWN_STEPS; o++) row[o] = row_next[o], row_next[o] = row_after[o];
        here = next, next = after, after.advance();
    }
    __syncthreads();

    typedef typename Element<X_TYPE>::bits bits;
    constexpr int PIECE = 16 / sizeof(bits), PIECES = GROUP / PIECE;  // of a token: 16 bytes of y
    const int d0 = blockIdx.x % groups * GROUP + threadIdx.x % PIECES * PIECE;
    float skip[PIECE] = {};
    for (int k = 0; c.D && k < scans; k++)
#pragma unroll
        for (int v = 0; v < PIECE; v++) skip[v] += c.D[k * channels + d0 + v];
    const char *from = c.x + b * c.x_view.batch + d0 * c.x_view.inner;
    char *to = c.y + (b * c.length * channels + d0) * sizeof(bits);
#pragma unroll 4
    for (int t = threadIdx.x / PIECES; t < length; t += THREADS / PIECES) {
        const float *total = (const float *)(sum + place(t)) + threadIdx.x % PIECES * PIECE;
        Pack<X_TYPE, PIECE> pack = {};
        if (c.D) pack = *(const Pack<X_TYPE, PIECE> *)(from + offset(t, c.x_view.token));
#pragma unroll
        for (int v = 0; v < PIECE; v++) pack.v[v] = encode<X_TYPE>(total[v] + skip[v] * decode<X_TYPE>(pack.v[v]));
        *(Pack<X_TYPE, PIECE> *)(to + offset(t, channels * (int)sizeof(bits))) = pack;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) KERNEL(const ARGUMENT argument) { ENTRY(argument); }

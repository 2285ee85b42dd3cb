// The selective scan with one state a channel whose K scans add up in shared memory: x and dy are read from memory
// once, y and dx written once, and nothing in between.
//
// A block takes GROUP channels of one image through its K scans, one after the other; `sum`, (length, GROUP) in dynamic
// shared memory, collects y or dx. Lanes are 8 pairs of channels x 4 stretches of STEPS steps, so a warp advances REACH
// steps at once, one for each lane, a block SPAN. A lane walks its stretch from a zero state; stretches are chained by
// shuffles, warps through `carry`; then every step adds what its stretch's true start contributes. In the forward a
// warp waits for the one before it alone, through a barrier of the two, and for all where a scan ends. The backward
// walks time backwards, a barrier for each span, and takes states from those kept by the forward.
//
// While a span is worked on, the next one's rows are copied to a stage of each warp behind the sums, past the L1 cache:
// what shared memory leaves of it has lines for a few rows only. After scan.cuh; macros as there, and
// ORDERED: `ordered_states` has run.

constexpr int PAIRS = 8, GROUP = 2 * PAIRS, STEPS = 8, REACH = 4 * STEPS, SPAN = WARPS * REACH;
static_assert(N == 1 && (EVERY == 0 || EVERY == STEPS), "a stretch begins at a kept state");

template <int TYPE> struct Pair {
    unsigned bits;
    INLINE void clear() { bits = 0; }
    INLINE void blank() { bits = TYPE == 1 ? 0xff80ff80 : 0xfc00fc00; }  // minus infinity, whose softplus is 0
    INLINE void fetch(const char *p) { bits = __ldg((const unsigned *)p); }
    INLINE void read(const char *shared) { bits = *(const unsigned *)shared; }
    INLINE float2 value() const {
        return make_float2(decode<TYPE>(TYPE == 1 ? bits : bits & 0xffff),
                           TYPE == 1 ? __uint_as_float(bits & 0xffff0000) : decode<TYPE>(bits >> 16));
    }
    static INLINE void store(char *p, float2 v) {
        __stwb((unsigned *)p, encode<TYPE>(v.x) | (unsigned)encode<TYPE>(v.y) << 16);
    }
};
template <> struct Pair<0> {
    float2 bits;
    INLINE void clear() { bits = make_float2(0.f, 0.f); }
    INLINE void blank() { bits.x = bits.y = -__int_as_float(0x7f800000); }
    INLINE void fetch(const char *p) { bits = __ldg((const float2 *)p); }
    INLINE void read(const char *shared) { bits = *(const float2 *)shared; }
    INLINE float2 value() const { return bits; }
    static INLINE void store(char *p, float2 v) { __stwb((float2 *)p, v); }
};

// A warp's rows of GROUP channels on their way, in dynamic shared memory. Lanes copy neighbouring steps together and read
// the same step of all stretches together: rows are placed so that neither conflict. Offsets are kept, not formed again.
template <int TYPE> struct Stage {
    static constexpr int ROW = GROUP * sizeof(typename Element<TYPE>::bits), BYTES = REACH * ROW, PIECES = ROW / 16;
    int to[PIECES], from[4], own;  // where a lane copies to; where its first four steps are; its own step's row

    static INLINE int at(int step) { return ((step & ~3) | ((step ^ step >> 3) & 3)) * ROW; }
    static INLINE int piece() { return threadIdx.x % PIECES * 16; }
    static INLINE int copied(int i) { return i * (32 / PIECES) + threadIdx.x % 32 / PIECES; }  // step of the i-th copy
    INLINE Stage(int begin) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < PIECES; i++) to[i] = opaque(begin + at(copied(i)) + piece());
#pragma unroll
        for (int j = 0; j < 4; j++)
            from[j] = opaque(begin + at(lane / PAIRS * STEPS + j) + lane % PAIRS * (ROW / PAIRS));
        own = begin + at(lane);
    }
    // rows: of the steps that the lane copies; tensor: the lane's piece of token 0
    INLINE void copy(const char *tensor, int token, const int *rows) const {
#pragma unroll
        for (int i = 0; i < PIECES; i++) copy_async_16_of_line(dynamic_shared() + to[i], beyond(tensor, rows[i], token));
    }
    INLINE void read(Pair<TYPE> *pairs) const {
#pragma unroll
        for (int j = 0; j < STEPS; j++) pairs[j].read(dynamic_shared() + from[j % 4] + j / 4 * 4 * ROW);
    }
    // The lane's own step gets minus infinity, whose softplus is 0
    INLINE void blank() const {
        const unsigned infinity = TYPE == 0 ? 0xff800000 : TYPE == 1 ? 0xff80ff80 : 0xfc00fc00;
        for (int i = 0; i < ROW / 4; i++) ((unsigned *)(dynamic_shared() + own))[i] = infinity;
    }
};

// Rows of the steps that a lane copies, from that of each lane's own step
template <class STAGE> INLINE void spread(int *rows, int row) {
#pragma unroll
    for (int i = 0; i < STAGE::PIECES; i++) rows[i] = __shfl_sync(~0u, row, STAGE::copied(i));
}

// Where a token's sums begin. Two tokens share the 32 banks; which half a token takes is mixed from its bits, so that
// stretches that advance side by side along rows or columns mostly take different ones.
INLINE int place(int row) { return row / 2 * 128 + ((row ^ row >> 3 ^ row >> 6) & 1) * 64; }

// A lane's step of a scan; past the last scan it stays there
struct Step {
    int k, t, index;  // index: of (scan, step within the sequence)

    INLINE Step(int t, int length) : k(0), t(t), index(min(t, length - 1)) {}
    INLINE void advance(int scans, int length, int spans) {
        t += SPAN;
        if (t / SPAN == spans) t -= spans * SPAN, k = min(k + 1, scans - 1);
        index = k * length + min(t, length - 1);
    }
};

// A span of a scan, from the last to the first
struct Span {
    int k, i, spans;
    INLINE void retreat() {
        if (i-- == 0) i = spans - 1, k++;
    }
};

INLINE void clear_sums(char *sum, int length) {
    for (int i = threadIdx.x; i < ROUND_UP(length, 2) * 8; i += THREADS)
        ((float4 *)sum)[i] = make_float4(0.f, 0.f, 0.f, 0.f);
}

// The sums of a stretch's tokens, of one pair of channels: loaded first, that they overlap; all steps if WHOLE
struct Sums {
    float2 *to[STEPS], v[STEPS];

    template <bool WHOLE> INLINE void load(char *sum, const int *places, int left) {
#pragma unroll
        for (int j = 0; j < STEPS; j++) {
            to[j] = (float2 *)(sum + places[j]);
            if (WHOLE || j < left) v[j] = *to[j];
        }
    }
    template <bool WHOLE, class Term> INLINE void add(int left, Term term) {
#pragma unroll
        for (int j = 0; j < STEPS; j++) {
            const float2 more = term(j);
            if (WHOLE || j < left) *to[j] = make_float2(v[j].x + more.x, v[j].y + more.y);
        }
    }
};

// A lane's pair of D of all scans: what x (backward: dy) adds to y, in the first scan
INLINE float2 all_skips(const Call &c, int d) {
    float2 skip = make_float2(0.f, 0.f);
#pragma unroll 4
    for (int k = 0; c.D && k < c.scans; k++) {
        const float2 D = __ldg((const float2 *)(c.D + k * c.channels + d));
        skip.x += D.x, skip.y += D.y;
    }
    return skip;
}

// Writes the sums, 16 bytes a lane at a time
INLINE void finish(const Call &c, const char *sum, char *to) {
    typedef typename Element<X_TYPE>::bits bits;
    typedef Pack<X_TYPE, 16 / sizeof(bits)> Piece;
    constexpr int PIECE = 16 / sizeof(bits), PIECES = GROUP / PIECE;
    const int channels = (int)c.channels, groups = channels / GROUP, b = blockIdx.x / groups;
    const int d = blockIdx.x % groups * GROUP + threadIdx.x % PIECES * PIECE;
    to += (b * c.length * channels + d) * sizeof(bits);
#pragma unroll 4
    for (int t = threadIdx.x / PIECES; t < c.length; t += THREADS / PIECES) {
        const float *total = (const float *)(sum + place(t)) + threadIdx.x % PIECES * PIECE;
        Piece piece;
#pragma unroll
        for (int v = 0; v < PIECE; v++) piece.v[v] = encode<X_TYPE>(total[v]);
        *(Piece *)(to + offset(t, channels * (int)sizeof(bits))) = piece;
    }
}

// B, times ln(2), and C of each step, in the order of its scan, (batch, scans, length): along columns a warp of every
// group would else fetch a line of the L1 cache for each
INLINE void ordered_states(const Call &c) {
    const i64 i = (i64)blockIdx.x * THREADS + threadIdx.x, k = i / c.length % c.scans, b = i / (c.length * c.scans);
    if (b >= c.batch) return;
    const int t = (int)(i % c.length), row = c.order ? c.order[k * c.length + t] : t;
    const unsigned B = load<B_TYPE>(c.B + b * c.B_view.batch + k * c.B_view.scan + offset(row, c.B_view.token));
    const unsigned C = load<C_TYPE>(c.C + b * c.C_view.batch + k * c.C_view.scan + offset(row, c.C_view.token));
    ((float2 *)c.ends)[i] = make_float2(decode<B_TYPE>(B) * LN2, decode<C_TYPE>(C));
}

// A lane's step of B, times ln(2), and C
struct States {
    float2 ordered;
    unsigned B, C;

    // index: of (scan, step); row: the token's
    INLINE void fetch(const Call &c, i64 b, int k, int index, int row) {
        if (ORDERED) {
            ordered = __ldg((const float2 *)c.ends + b * (c.scans * c.length) + index);
        } else {
            B = load<B_TYPE>(c.B + b * c.B_view.batch + k * c.B_view.scan + offset(row, c.B_view.token));
            C = load<C_TYPE>(c.C + b * c.C_view.batch + k * c.C_view.scan + offset(row, c.C_view.token));
        }
    }
    INLINE float2 value() const {
        return ORDERED ? ordered : make_float2(decode<B_TYPE>(B) * LN2, decode<C_TYPE>(C));
    }
};

INLINE void merged_forward(const Call &c) {
    __shared__ __align__(16) float shared_B[WARPS][REACH], shared_C[WARPS][REACH];
    __shared__ __align__(16) int places[WARPS][REACH];  // of the tokens' sums
    __shared__ float2 carry[WARPS][PAIRS];              // the state that a warp passes on
    const int thread = (int)opaque(threadIdx.x), warp = thread / 32, lane = thread % 32, pair = lane % PAIRS;
    const int first = lane / PAIRS * STEPS, length = (int)c.length, scans = (int)c.scans;
    const int channels = (int)c.channels, groups = channels / GROUP, spans = ROUND_UP(length, SPAN);
    const int b = blockIdx.x / groups, d0 = blockIdx.x % groups * GROUP, d = d0 + pair * 2;
    typedef Stage<DELTA_TYPE> StageDelta;
    typedef Stage<X_TYPE> StageX;
    const char *x = whole(c.x + b * c.x_view.batch + d0 * c.x_view.inner + StageX::piece());
    const char *delta = whole(c.delta + b * c.delta_view.batch + d0 * c.delta_view.inner + StageDelta::piece());
    const int begin = ROUND_UP(length, 2) * 128 + warp * (StageDelta::BYTES + StageX::BYTES);
    const StageDelta stage_delta(begin);
    const StageX stage_x(begin + StageDelta::BYTES);
    const int of_stretch = (int)opaque((warp * REACH + first) * 4), of_pair = (int)opaque(pair * 8);
    const float *B_t = (const float *)((const char *)shared_B + of_stretch);
    const float *C_t = (const float *)((const char *)shared_C + of_stretch);
    const int *place_t = (const int *)((const char *)places + of_stretch);
    char *sum = dynamic_shared(), *sum_pair = sum + of_pair;

    States states;
    auto visited = [&](const Step &at) { return c.order ? __ldg(c.order + at.index) : at.index - at.k * length; };
    auto fetch = [&](int k, int index, int row) {  // for the next span
        int rows[StageDelta::PIECES], x_rows[StageX::PIECES];
        spread<StageDelta>(rows, row);
        stage_delta.copy(beyond(delta, k, (int)c.delta_view.scan), c.delta_view.token, rows);
        if (X_TYPE != DELTA_TYPE) spread<StageX>(x_rows, row);
        stage_x.copy(x, c.x_view.token, X_TYPE == DELTA_TYPE ? rows : x_rows);
        copy_async_commit();
        states.fetch(c, b, k, index, row);
    };
    auto parameter = [&](const float *of, int k) {  // a pair's, of a scan
        return of ? __ldg((const float2 *)(of + k * channels + d)) : make_float2(0.f, 0.f);
    };
    clear_sums(sum, length);
    const float2 skip = all_skips(c, d);
    float2 A, bias, next_A = parameter(c.A, 0), next_bias = parameter(c.bias, 0);
    Step ahead(warp * REACH + lane, length);  // two spans from here
    int row = visited(ahead);
    fetch(0, ahead.index, row);
    ahead.advance(scans, length, spans);
    int row_next = visited(ahead), k_next = ahead.k, index_next = ahead.index;
    ahead.advance(scans, length, spans);

    for (int k = 0, i = 0; k < scans;) {
        const int left = length - i * SPAN - warp * REACH;  // steps of the scan from the warp's first on
        if (i == 0) {
            A = next_A, bias = make_float2(next_bias.x * LOG2E, next_bias.y * LOG2E);
            next_A = parameter(c.A, min(k + 1, scans - 1)), next_bias = parameter(c.bias, min(k + 1, scans - 1));
        }
        __syncwarp();
        const float2 BC = states.value();
        shared_B[warp][lane] = BC.x, shared_C[warp][lane] = BC.y, places[warp][lane] = place(row);
        copy_async_wait<0>();
        if (SOFTPLUS && left < REACH) {
            __syncwarp();
            if (lane >= left) stage_delta.blank();
        }
        __syncwarp();
        Pair<X_TYPE> raw_x[STEPS];
        Pair<DELTA_TYPE> raw_delta[STEPS];
        stage_delta.read(raw_delta), stage_x.read(raw_x);
        __syncwarp();
        fetch(k_next, index_next, row_next);
        const int row_ahead = visited(ahead);
        // from a zero state before the stretch: the state after each step, and the decay up to it
        float2 h[STEPS], p[STEPS];
#pragma unroll
        for (int j = 0; j < STEPS; j++) {
            const float2 v = raw_delta[j].value(), w = raw_x[j].value();
            float2 dt = make_float2(v.x * LOG2E + bias.x, v.y * LOG2E + bias.y);  // delta log2(e)
            if (SOFTPLUS) dt = make_float2(softplus2(dt.x), softplus2(dt.y));
            if (!SOFTPLUS && first + j >= left) dt = make_float2(0.f, 0.f);
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
            const bool joins = lane >= by;
            to_h = make_float2(to_p.x * (joins ? g.x : 0.f) + to_h.x, to_p.y * (joins ? g.y : 0.f) + to_h.y);
            to_p.x *= joins ? q.x : 1.f, to_p.y *= joins ? q.y : 1.f;
        }
        float2 before_p = make_float2(__shfl_up_sync(~0u, to_p.x, PAIRS), __shfl_up_sync(~0u, to_p.y, PAIRS));
        float2 before_h = make_float2(__shfl_up_sync(~0u, to_h.x, PAIRS), __shfl_up_sync(~0u, to_h.y, PAIRS));
        if (first == 0) before_p = make_float2(1.f, 1.f), before_h = make_float2(0.f, 0.f);

        if (i == 0) __syncthreads();  // sums are cleared, and complete for the scan before
        Sums sums;
        if (left >= REACH) sums.load<true>(sum_pair, place_t, STEPS);
        else sums.load<false>(sum_pair, place_t, left - first);
        float C[STEPS];
#pragma unroll
        for (int j = 0; j < STEPS; j++) C[j] = C_t[j];
        float2 s;  // state before the warp's steps, then before the stretch
        auto state = [&](const float *of) { return (float2 *)(of + ((i64)(b * scans + k) * channels + d)); };
        const int from = warp ? warp - 1 : WARPS - 1;
        if (WARPS == 1) __syncwarp();
        else if (warp || i || k) take_over(1 + from);
        if (warp || i) s = carry[from][pair];
        else s = c.initial ? *state(c.initial) : make_float2(0.f, 0.f);
        const float2 end = make_float2(to_p.x * s.x + to_h.x, to_p.y * s.y + to_h.y);
        if (WARPS == 1) __syncwarp();
        if (lane >= 24) carry[warp][pair] = end;
        if (WARPS > 1) pass_on(1 + warp);
        if (c.last && warp == WARPS - 1 && i == spans - 1 && lane >= 24) *state(c.last) = end;
        s = make_float2(before_p.x * s.x + before_h.x, before_p.y * s.y + before_h.y);
        if (EVERY && first < left) {
            const int t = (i * SPAN + warp * REACH + first) / STEPS;
            const i64 at = ((i64)(b * scans + k) * ROUND_UP(length, STEPS) + t) * channels + d;
            Pair<START_TYPE>::store(c.starts + at * sizeof(typename Element<START_TYPE>::bits), s);
        }
        auto y = [&](int j) {
            return make_float2(C[j] * (p[j].x * s.x + h[j].x), C[j] * (p[j].y * s.y + h[j].y));
        };
        auto y_and_skip = [&](int j) {
            const float2 y_j = y(j), w = raw_x[j].value();
            return make_float2(y_j.x + skip.x * w.x, y_j.y + skip.y * w.y);
        };
        if (left >= REACH) {
            if (k) sums.add<true>(STEPS, y);
            else sums.add<true>(STEPS, y_and_skip);
        } else {
            if (k) sums.add<false>(left - first, y);
            else sums.add<false>(left - first, y_and_skip);
        }
        row = row_next, row_next = row_ahead, k_next = ahead.k, index_next = ahead.index;
        ahead.advance(scans, length, spans);
        if (++i == spans) i = 0, k++;
    }
    if (WARPS > 1 && warp == 0) take_over(WARPS);  // what is passed on is taken, at the end too
    copy_async_wait<0>();
    __syncthreads();
    finish(c, sum, c.y);
}

// Sums over the 8 pairs of a stretch: pair i gets that of v[i] in v[0]
template <int HALF> INLINE void sum_pairs(float *v, int pair) {
    if constexpr (HALF > 0) {
#pragma unroll
        for (int i = 0; i < HALF; i++) {
            const float keep = pair & HALF ? v[HALF + i] : v[i], give = pair & HALF ? v[i] : v[HALF + i];
            v[i] = keep + __shfl_xor_sync(~0u, give, HALF);
        }
        sum_pairs<HALF / 2>(v, pair);
    }
}

// dA, dbias and dD of a pair of channels
struct alignas(8) Gradients {
    float2 A, bias, D;
};

INLINE void merged_backward(const Call &c) {
    __shared__ __align__(16) float shared_B[WARPS][REACH];
    __shared__ __align__(16) float shared_C[WARPS][REACH];
    __shared__ __align__(16) int shared_rows[WARPS][REACH], places[WARPS][REACH];
    __shared__ float4 totals[2][WARPS][PAIRS];  // of a warp's steps: decay and what they pass on to the step before
    __shared__ float2 carry[2][PAIRS];
    __shared__ Gradients gradients[2][WARPS][PAIRS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pair = lane % PAIRS, first = lane / PAIRS * STEPS;
    const int length = (int)c.length, scans = (int)c.scans, channels = (int)c.channels, groups = channels / GROUP;
    const int b = blockIdx.x / groups, group = blockIdx.x % groups, d0 = group * GROUP, d = d0 + pair * 2;
    typedef Stage<DELTA_TYPE> StageDelta;
    typedef Stage<X_TYPE> StageX;
    const char *x = whole(c.x + b * c.x_view.batch + d0 * c.x_view.inner + StageX::piece());
    const char *dy = whole(c.dy + b * c.dy_view.batch + d0 * c.dy_view.inner + StageX::piece());
    const char *delta = whole(c.delta + b * c.delta_view.batch + d0 * c.delta_view.inner + StageDelta::piece());
    const float *B_t = shared_B[warp] + first;
    const float *C_t = shared_C[warp] + first;
    const int *rows = shared_rows[warp] + first, *place_t = places[warp] + first;
    const i64 states_at = ((i64)group * c.batch + b) * length * scans;  // into dB and dC, of token 0
    const int pieces = ROUND_UP(length, STEPS), spans = ROUND_UP(length, SPAN);
    char *sum = dynamic_shared();
    const int begin = ROUND_UP(length, 2) * 128 + warp * (StageDelta::BYTES + 2 * StageX::BYTES);
    const StageDelta stage_delta(begin);
    const StageX stage_x(begin + StageDelta::BYTES), stage_dy(begin + StageDelta::BYTES + StageX::BYTES);

    Span here = {0, spans - 1, spans}, next = here, after;
    States states;
    Pair<START_TYPE> raw_start;
    float2 next_A, next_bias;
    Gradients total = {};
    int last = 0;
    auto visited = [&](const Span &at) {
        const int t = min(at.i * SPAN + warp * REACH + lane, length - 1);
        return c.order ? __ldg(c.order + min(at.k, scans - 1) * length + t) : t;
    };
    auto fetch = [&](int row) {  // for the next span
        const int k = min(next.k, scans - 1), at = k * channels + d;
        int rows[StageDelta::PIECES], x_rows[StageX::PIECES];
        spread<StageDelta>(rows, row), spread<StageX>(x_rows, row);
        stage_delta.copy(beyond(delta, k, (int)c.delta_view.scan), c.delta_view.token, rows);
        stage_x.copy(x, c.x_view.token, x_rows);
        stage_dy.copy(dy, c.dy_view.token, x_rows);
        copy_async_commit();
        states.fetch(c, b, k, k * length + min(next.i * SPAN + warp * REACH + lane, length - 1), row);
        next_A = __ldg((const float2 *)(c.A + at));
        next_bias = c.bias ? __ldg((const float2 *)(c.bias + at)) : make_float2(0.f, 0.f);
        const int piece = min((next.i * SPAN + warp * REACH + first) / STEPS, pieces - 1);
        const i64 kept = ((i64)(b * scans + k) * pieces + piece) * channels + d;
        raw_start.fetch(c.starts + kept * sizeof(typename Element<START_TYPE>::bits));
    };
    clear_sums(sum, length);
    const float2 skip = all_skips(c, d);
    int row = visited(here);
    fetch(row);
    next.retreat();
    int row_next = visited(next);
    after = next;
    after.retreat();

    // what a scan's warps have summed, once all have
    auto store_gradients = [&](int n, int k) {
        if (threadIdx.x >= PAIRS) return;
        Gradients all = {};
        for (int w = 0; w < WARPS; w++) {
            const Gradients &of = gradients[n][w][pair];
            all.A.x += of.A.x, all.A.y += of.A.y, all.bias.x += of.bias.x, all.bias.y += of.bias.y;
            all.D.x += of.D.x, all.D.y += of.D.y;
        }
        const i64 at = (i64)(b * scans + k) * channels + d;
        *(float2 *)(c.dA + at) = make_float2(all.A.x * LN2, all.A.y * LN2);
        *(float2 *)(c.dbias + at) = all.bias, *(float2 *)(c.dD + at) = all.D;
    };

    for (int n = 0; here.k < scans; n ^= 1) {
        const int left = length - here.i * SPAN - warp * REACH - first;  // steps of the scan from the stretch on
        const float2 A = next_A, bias = make_float2(next_bias.x * LOG2E, next_bias.y * LOG2E);
        float2 h = raw_start.value();
        __syncwarp();
        shared_rows[warp][lane] = row;
        const float2 BC = states.value();
        shared_B[warp][lane] = BC.x, shared_C[warp][lane] = BC.y, places[warp][lane] = place(row);
        copy_async_wait<0>();
        __syncwarp();
        Pair<X_TYPE> raw_x[STEPS], raw_dy[STEPS];
        Pair<DELTA_TYPE> raw_delta[STEPS];
        stage_delta.read(raw_delta), stage_x.read(raw_x), stage_dy.read(raw_dy);
        __syncwarp();
        fetch(row_next);
        const int row_after = visited(after);
        if (left + first < REACH) {
#pragma unroll
            for (int j = 0; j < STEPS; j++)
                if (j >= left) raw_delta[j].blank(), raw_dy[j].clear();
        }
        // dt log2(e), its slope log2(e), what the state before a step leaves, dy C; and then, from a zero state after
        // the stretch, g and the decay down to it
        float2 dt[STEPS], slope[STEPS], rest[STEPS], g[STEPS], p[STEPS], w[STEPS];
        float dC[STEPS], dB[STEPS];
#pragma unroll
        for (int j = 0; j < STEPS; j++) {
            const float2 v = raw_delta[j].value(), q = raw_dy[j].value();
            w[j] = raw_x[j].value();
            dt[j] = make_float2(v.x * LOG2E + bias.x, v.y * LOG2E + bias.y);
            if (SOFTPLUS) {
                dt[j].x = softplus2(dt[j].x, slope[j].x);
                dt[j].y = softplus2(dt[j].y, slope[j].y);
            } else {
                slope[j] = j < left ? make_float2(LOG2E, LOG2E) : make_float2(0.f, 0.f);
                if (j >= left) dt[j] = make_float2(0.f, 0.f);
            }
            p[j] = make_float2(exp2_fast(dt[j].x * A.x), exp2_fast(dt[j].y * A.y));
            rest[j] = make_float2(p[j].x * h.x, p[j].y * h.y);
            h = make_float2(rest[j].x + w[j].x * B_t[j] * dt[j].x, rest[j].y + w[j].y * B_t[j] * dt[j].y);
            dC[j] = q.x * h.x + q.y * h.y;
            total.D.x += q.x * w[j].x, total.D.y += q.y * w[j].y;
            g[j] = make_float2(q.x * C_t[j], q.y * C_t[j]);
        }
        float2 to_p = make_float2(1.f, 1.f), to_g = make_float2(0.f, 0.f);
#pragma unroll
        for (int j = STEPS - 1; j >= 0; j--) {
            const float2 a = p[j];
            g[j].x += to_g.x, g[j].y += to_g.y;
            p[j] = to_p;
            to_g = make_float2(a.x * g[j].x, a.y * g[j].y);
            to_p.x *= a.x, to_p.y *= a.y;
        }
#pragma unroll
        for (int by = PAIRS; by < 32; by *= 2) {
            const float2 q = make_float2(__shfl_down_sync(~0u, to_p.x, by), __shfl_down_sync(~0u, to_p.y, by));
            const float2 r = make_float2(__shfl_down_sync(~0u, to_g.x, by), __shfl_down_sync(~0u, to_g.y, by));
            if (lane + by < 32) {
                to_g = make_float2(to_p.x * r.x + to_g.x, to_p.y * r.y + to_g.y);
                to_p.x *= q.x, to_p.y *= q.y;
            }
        }
        if (lane < PAIRS) totals[n][warp][pair] = make_float4(to_p.x, to_g.x, to_p.y, to_g.y);
        sum_pairs<STEPS / 2>(dC, pair);
        const bool own = here.i * SPAN + warp * REACH + lane < length;
        const i64 own_at = states_at + (i64)row * scans + here.k;
        if (own) c.dC[own_at] = dC[0];
        __syncthreads();

        if (here.i == spans - 1 && here.k) store_gradients(n ^ 1, here.k - 1);
        float2 s = carry[n ^ 1][pair];  // what comes from after the warp's steps, then from after the stretch
        const i64 state = (i64)(b * scans + here.k) * channels + d;
        if (here.i == spans - 1) s = c.gradient ? *(const float2 *)(c.gradient + state) : make_float2(0.f, 0.f);
#pragma unroll 4
        for (int v = WARPS - 1; v > warp; v--) {
            const float4 all = totals[n][v][pair];
            s = make_float2(all.x * s.x + all.y, all.z * s.y + all.w);
        }
        if (warp == 0 && lane < PAIRS) {
            const float2 end = make_float2(to_p.x * s.x + to_g.x, to_p.y * s.y + to_g.y);
            carry[n][pair] = end;
            if (c.last && here.i == 0) *(float2 *)(c.last + state) = end;
        }
        to_p = make_float2(__shfl_down_sync(~0u, to_p.x, PAIRS), __shfl_down_sync(~0u, to_p.y, PAIRS));
        to_g = make_float2(__shfl_down_sync(~0u, to_g.x, PAIRS), __shfl_down_sync(~0u, to_g.y, PAIRS));
        if (lane < 24) s = make_float2(to_p.x * s.x + to_g.x, to_p.y * s.y + to_g.y);

        typedef typename Element<DELTA_TYPE>::bits bits;
        char *ddelta = whole(c.ddelta + (((i64)b * length * scans + here.k) * channels + d) * sizeof(bits));
        const int token = (int)sizeof(bits) * scans * channels;
        const float2 A_ln2 = make_float2(A.x * LN2, A.y * LN2);
        const float2 skip_now = here.k ? make_float2(0.f, 0.f) : skip;
        auto dx = [&](int j) {
            const float2 q = raw_dy[j].value();
            const float2 g_j = make_float2(p[j].x * s.x + g[j].x, p[j].y * s.y + g[j].y);
            const float2 input = make_float2(g_j.x * B_t[j], g_j.y * B_t[j]);  // gradient of dt x, ln(2)
            const float2 r = make_float2(g_j.x * rest[j].x, g_j.y * rest[j].y);
            const float2 v = make_float2((w[j].x * input.x + A_ln2.x * r.x) * slope[j].x,
                                         (w[j].y * input.y + A_ln2.y * r.y) * slope[j].y);
            total.A.x += r.x * dt[j].x, total.A.y += r.y * dt[j].y;
            total.bias.x += v.x, total.bias.y += v.y;
            dB[j] = g_j.x * dt[j].x * w[j].x + g_j.y * dt[j].y * w[j].y;
            if (j < left) Pair<DELTA_TYPE>::store(ddelta + offset(rows[j], token), v);
            return make_float2(input.x * dt[j].x + skip_now.x * q.x, input.y * dt[j].y + skip_now.y * q.y);
        };
        Sums sums;
        if (left + first >= REACH) {
            sums.load<true>(sum + pair * 8, place_t, STEPS);
            sums.add<true>(STEPS, dx);
        } else {
            sums.load<false>(sum + pair * 8, place_t, left);
            sums.add<false>(left, dx);
        }
        sum_pairs<STEPS / 2>(dB, pair);
        if (own) c.dB[own_at] = dB[0] * LN2;
        if (here.i == 0) {
#pragma unroll
            for (int by = PAIRS; by < 32; by *= 2) {
                total.A.x += __shfl_xor_sync(~0u, total.A.x, by), total.A.y += __shfl_xor_sync(~0u, total.A.y, by);
                total.bias.x += __shfl_xor_sync(~0u, total.bias.x, by);
                total.bias.y += __shfl_xor_sync(~0u, total.bias.y, by);
                total.D.x += __shfl_xor_sync(~0u, total.D.x, by), total.D.y += __shfl_xor_sync(~0u, total.D.y, by);
            }
            if (lane < PAIRS) gradients[n][warp][pair] = total;
            total = {};
        }
        last = n, row = row_next, row_next = row_after;
        here = next, next = after, after.retreat();
    }
    copy_async_wait<0>();
    __syncthreads();
    store_gradients(last, scans - 1);
    finish(c, sum, c.dx);
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) KERNEL(const ARGUMENT argument) { ENTRY(argument); }

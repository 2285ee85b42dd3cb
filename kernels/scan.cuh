// What the scan's kernels share: their argument, types of elements, exponentials. Behind intrinsics.cuh.
//
// Macros: KERNEL, ENTRY, ARGUMENT (its name, what it runs, on what); THREADS, RESIDENT (blocks a processor); SCANS of a
// block; N, STATES, SPLIT, TILE; KEEP_DECAY: the backward keeps a tile's decays rather than compute them twice; SOFTPLUS;
// GATED: y is multiplied by silu(z); X_TYPE, DELTA_TYPE, B_TYPE, C_TYPE, DY_TYPE, Z_TYPE (0 float, 1 bfloat16, 2 half);
// X_BY_TOKEN and so on: that tensor's tokens, not its channels or states, are neighbours in memory; EVERY: steps from one
// kept state to the next, 0 if none are kept, START_TYPE: their type; and for scan_sum.cu VECTOR and WIDE, neighbours of
// 32 and of 16 bits that a thread sums.

#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f
#define ROUND_UP(a, b) (((a) + (b) - 1) / (b))

constexpr int WARPS = THREADS / 32;

struct View { i64 batch, scan; int token, inner; };  // strides in bytes

struct Call {
    // what the operator is given, in its order
    const char *x, *delta;
    const float *A;
    const char *B, *C;
    const float *D, *bias, *initial;  // initial: (batch, scans, channels, N), or null
    const int *order;                 // (scans, length) or null
    const char *z;                    // the gate, where GATED
    // a forward's
    char *y;             // (batch, length, scans, channels), as dx, ddelta and dz
    float *last;         // (batch, scans, channels, N): last state, or gradient of the initial state, or null
    char *starts;        // (batch, scans, length / EVERY, channels, N): state before every so many steps
    float *ends, *sums;  // (batch, scans, segments, channels, N or nothing): what a segment receives from its neighbour
    // a backward's
    const char *dy;
    const float *gradient;  // of the last state, or null
    char *dx, *ddelta, *dz;
    float *dA, *dD, *dbias;  // (batch, segments, scans, channels, N or nothing)
    float *dB, *dC;          // (channel blocks, batch, length, scans, N)
    View x_view, delta_view, B_view, C_view, dy_view, z_view;
    i64 batch, length, scans, channels, segments, segment;  // segment: its steps, a multiple of TILE
    int row;  // scans * channels
};

// out[o, i] = sum over the terms j of in[o, j, i]; where row is not 0, each `row` elements of out begin `pitch` further on
struct Job { i64 outer, terms, inner, blocks, row, pitch; int in_type, out_type; };
struct Sum { const void *in[6]; void *out[6]; Job job[6]; };

template <int TYPE> struct Element { typedef unsigned short bits; };
template <> struct Element<0> { typedef unsigned bits; };

template <int TYPE, int COUNT> struct alignas(COUNT * sizeof(typename Element<TYPE>::bits)) Pack {
    typename Element<TYPE>::bits v[COUNT];
};

template <int TYPE> INLINE unsigned load(const char *p) { return __ldg((const typename Element<TYPE>::bits *)p); }
// What the kernel itself overwrites later
template <int TYPE> INLINE unsigned load_before(const char *p) { return *(const typename Element<TYPE>::bits *)p; }

template <int TYPE> INLINE float decode(unsigned bits) {
    if (TYPE == 0) return __uint_as_float(bits);
    if (TYPE == 1) return __uint_as_float(bits << 16);
    return half_to_float((unsigned short)bits);
}

template <int TYPE> INLINE typename Element<TYPE>::bits encode(float f) {
    if (TYPE == 0) return __float_as_uint(f);
    return TYPE == 1 ? float_to_bfloat16(f) : float_to_half(f);
}

// log(1 + e) / e for 0 <= e <= 1, BINARY the binary logarithm: relative error 3e-8; 8e-6 for a half delta, whose own is
// 2e-4, and 6e-5 for a bfloat16 one, whose own is 2e-3
template <bool BINARY> INLINE float log_over(float e) {
    constexpr float S = BINARY ? LOG2E : 1.f;
    float p;
    if (DELTA_TYPE == 0) {
        p = S * 5.232693702e-3f;
        p = p * e - S * 2.950524011e-2f;
        p = p * e + S * 7.822596093e-2f;
        p = p * e - S * 1.366324728e-1f;
        p = p * e + S * 1.910600790e-1f;
        p = p * e - S * 2.484298267e-1f;
        p = p * e + S * 3.331909690e-1f;
        p = p * e - S * 4.999949315e-1f;
        return p * e + S * 9.999999699e-1f;
    }
    if (DELTA_TYPE == 1) {
        p = S * 4.134730239e-2f;
        p = p * e - S * 1.574272070e-1f;
        p = p * e + S * 3.063009293e-1f;
        p = p * e - S * 4.969778053e-1f;
        return p * e + S * 9.999432779e-1f;
    }
    p = S * -2.386914931e-2f;
    p = p * e + S * 1.012222947e-1f;
    p = p * e - S * 2.100487171e-1f;
    p = p * e + S * 3.252067002e-1f;
    p = p * e - S * 4.993613699e-1f;
    return p * e + S * 9.999915985e-1f;
}

// log(1 + exp(v)) = max(v, 0) + log(1 + e), e = exp(-|v|) at most 1, and its slope; and the same to the base of 2
INLINE float softplus(float v, float &slope) {
    const float e = exp2_fast(-fabsf(v) * LOG2E), r = reciprocal_fast(1.f + e);
    slope = v > 0.f ? r : e * r;
    return e * log_over<false>(e) + fmaxf(v, 0.f);
}

INLINE float softplus2(float v) {
    const float e = exp2_fast(-fabsf(v));
    return e * log_over<true>(e) + fmaxf(v, 0.f);
}

// Its slope too, times log2(e)
INLINE float softplus2(float v, float &slope) {
    const float e = exp2_fast(-fabsf(v)), r = reciprocal_fast(e * LN2 + LN2);
    slope = v > 0.f ? r : e * r;
    return e * log_over<true>(e) + fmaxf(v, 0.f);
}

INLINE float sigmoid(float v) {
    const float e = exp2_fast(-fabsf(v) * LOG2E);
    return (v > 0 ? 1.f : e) * reciprocal_fast(1.f + e);
}

/* Everything of an encoder layer but its matrix products, in a few passes over rows. See compiled_layer.py.
 *
 * Products read and write `elem`: float, or bfloat16 where BFLOAT16 is defined. Sums, residuals, normalizations, softmax
 * and adapters are float. Matrices are row-major; d and f are multiples of LANES, ranks of RANK_STEP (zeros pad them).
 * Results do not depend on the number of threads. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16
#define ROWS 4
#define RANK_STEP 4
#define LOWEST -3.4028235e38f

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));

#define INLINE static inline __attribute__((always_inline))

INLINE vf load(const float *p) { vf v; memcpy(&v, p, sizeof v); return v; }
INLINE void store(float *p, vf v) { memcpy(p, &v, sizeof v); }
/* Keeps the compiler from reading a value again at each of its uses. */
INLINE vf in_register(vf v) {
#ifdef __AVX512F__
    __asm__("" : "+v"(v));
#endif
    return v;
}
INLINE vf splat(float x) { return (vf){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE vf choose(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }
INLINE vf where(vi mask, vf a) { return (vf)((vi)a & mask); }

typedef float vf8 __attribute__((vector_size(32)));
typedef float vf4 __attribute__((vector_size(16)));
typedef int32_t vi8 __attribute__((vector_size(32)));

INLINE float sum_lanes(vf v) {
    vf8 half[2];
    memcpy(half, &v, sizeof half);
    vf8 eight = half[0] + half[1];
    vf4 quarter[2];
    memcpy(quarter, &eight, sizeof quarter);
    vf4 four = quarter[0] + quarter[1];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

INLINE float max_lanes(vf v) {
    vf8 half[2];
    memcpy(half, &v, sizeof half);
    float highest = half[0][0];
    vf8 eight = (vf8)(((vi8)half[0] & (half[0] > half[1])) | ((vi8)half[1] & ~(half[0] > half[1])));
    for (int i = 0; i < 8; i++) highest = eight[i] > highest ? eight[i] : highest;
    return highest;
}

#ifdef BFLOAT16
typedef uint16_t elem;
INLINE vf load_elem(const elem *p) {
    vh h;
    memcpy(&h, p, sizeof h);
#ifdef __AVX512F__
    return (vf)((vu)_mm512_cvtepu16_epi32((__m256i)h) << 16);
#else
    return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}
INLINE void store_elem(elem *p, vf v) {
#ifdef __AVX512BF16__
    __m256bh h = _mm512_cvtneps_pbh((__m512)v);
    memcpy(p, &h, sizeof h);
#else
    vu u = (vu)v;
    vi nan = v != v;
    u = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    vh h = __builtin_convertvector((u & ~(vu)nan) | (0x7fc0 & (vu)nan), vh);
    memcpy(p, &h, sizeof h);
#endif
}
INLINE float widen(elem x) { uint32_t u = (uint32_t)x << 16; float f; memcpy(&f, &u, 4); return f; }
INLINE elem narrow(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return x != x ? 0x7fc0 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}
#else
typedef float elem;
INLINE vf load_elem(const elem *p) { return load(p); }
INLINE void store_elem(elem *p, vf v) { store(p, v); }
INLINE float widen(elem x) { return x; }
INLINE elem narrow(float x) { return x; }
#endif

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* exp(x) for x <= 88, relative error 2e-7; 0 below -87. */
INLINE vf exp_(vf x) {
    vi tiny = x < -87.0f;
    x = choose(tiny, splat(-87.0f), x);
    vf shifted = x * 1.44269504088896341f + 12582912.0f;
    vf n = shifted - 12582912.0f;
    vf r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vi exponent = ((vi)shifted - 0x4b400000) << 23;
    return where(~tiny, (vf)((vi)p + exponent));
}

/* The normal distribution: Phi(x) and exp(-x^2 / 2). erfc by Abramowitz and Stegun 7.1.26, absolute error 1.5e-7. */
INLINE vf normal_cdf(vf x, vf *bell) {
    vf z = (vf)((vi)x & 0x7fffffff) * 0.70710678118654752f;
    vf t = 1.0f / (1.0f + 0.3275911f * z);
    vf p = splat(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    *bell = exp_(-z * z);
    vf upper = 0.5f * p * t * *bell;
    return choose(x < 0.0f, upper, 1.0f - upper);
}

/* Dropout. Whether an element is kept is a hash of the site's seed, the row and the column: 16 bits for each, compared
 * with `threshold`, the probability of dropping times 65536. A pass backward hashes again; no mask is stored. */
typedef struct { uint32_t first, second; } key;

INLINE key row_key(uint64_t seed, int64_t row) {
    uint64_t z = seed + 0x9e3779b97f4a7c15ull * (uint64_t)(row + 1);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    z ^= z >> 31;
    return (key){(uint32_t)z, (uint32_t)(z >> 32)};
}

/* Masks of the 32 columns from 32 * pair. */
INLINE void kept_pair(key k, int pair, int32_t threshold, vi *low, vi *high) {
    vu x = (vu){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + (uint32_t)(pair * LANES) + k.first;
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x ^= k.second;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    x ^= x >> 16;
    *low = (vi)(x & 0xffff) >= threshold;
    *high = (vi)(x >> 16) >= threshold;
}

INLINE vi kept_block(key k, int block, int32_t threshold) {
    vi low, high;
    kept_pair(k, block >> 1, threshold, &low, &high);
    return block & 1 ? high : low;
}

INLINE void drop_row(float *row, int64_t d, key k, int32_t threshold) {
    for (int64_t pair = 0; pair * 2 * LANES < d; pair++) {
        vi low, high;
        kept_pair(k, pair, threshold, &low, &high);
        float *p = row + pair * 2 * LANES;
        store(p, where(low, load(p)));
        if ((pair * 2 + 1) * LANES < d) store(p + LANES, where(high, load(p + LANES)));
    }
}

INLINE void read_row(const elem *from, float *row, int64_t d) {
    for (int64_t c = 0; c < d; c += LANES) store(row + c, load_elem(from + c));
}

INLINE void write_row(const float *row, elem *to, int64_t d) {
    for (int64_t c = 0; c < d; c += LANES) store_elem(to + c, load(row + c));
}

/* Adapters of one group: for each of n members low (T, r) and M (r, d); with seeds, each row's part is dropped. */
typedef struct {
    const float *low, *M;
    int64_t n, r;
    const uint64_t *seeds;
    int32_t threshold;
} expansion;

/* rows += sum over members of low M, for ROWS rows of d floats from row t of T. */
INLINE void expand_rows(float *rows, const expansion *e, int64_t t, int64_t count, int64_t T, int64_t d) {
    for (int64_t m = 0; m < e->n; m++) {
        key keys[ROWS];
        if (e->seeds)
            for (int i = 0; i < ROWS; i++) keys[i] = row_key(e->seeds[m], t + i);
        const float *low[ROWS], *M = e->M + m * e->r * d;
        for (int i = 0; i < ROWS; i++) low[i] = e->low + (m * T + least(t + i, t + count - 1)) * e->r;
        for (int64_t c = 0; c < d; c += 2 * LANES) {
            int two = c + LANES < d;
            vf first[ROWS], second[ROWS];
            for (int i = 0; i < ROWS; i++) first[i] = second[i] = splat(0.0f);
            for (int64_t k = 0; k < e->r; k++) {
                vf a = load(M + k * d + c), b = load(M + k * d + c + (two ? LANES : 0));
                for (int i = 0; i < ROWS; i++) {
                    first[i] += low[i][k] * a;
                    second[i] += low[i][k] * b;
                }
            }
            for (int i = 0; i < ROWS; i++) {
                float *row = rows + i * d + c;
                if (e->seeds) {
                    vi keep_first, keep_second;
                    kept_pair(keys[i], c / (2 * LANES), e->threshold, &keep_first, &keep_second);
                    first[i] = where(keep_first, first[i]);
                    second[i] = where(keep_second, second[i]);
                }
                store(row, load(row) + first[i]);
                if (two) store(row + LANES, load(row + LANES) + second[i]);
            }
        }
    }
}

/* low[m] = factors[m] D(X[m]) A[m]^T: X (T, d), its members `stride` elements apart (0: one X for all), A (n, r, d),
 * low (n, T, r). D drops by `seeds`, or nothing where they are NULL. */
void project(const elem *X, const float *A, float *low, int64_t T, int64_t d, int64_t r, int64_t n, int64_t stride,
             const uint64_t *seeds, int32_t threshold, const float *factors, int threads) {
    int64_t blocks = (T + ROWS - 1) / ROWS;
#pragma omp parallel num_threads(threads)
    {
        float *rows = malloc(ROWS * d * sizeof(float));
#pragma omp for schedule(static) collapse(2)
        for (int64_t m = 0; m < n; m++)
            for (int64_t block = 0; block < blocks; block++) {
                int64_t t = block * ROWS, count = least(ROWS, T - t);
                for (int64_t i = 0; i < ROWS; i++) {
                    read_row(X + m * stride + least(t + i, T - 1) * d, rows + i * d, d);
                    if (seeds) drop_row(rows + i * d, d, row_key(seeds[m], t + i), threshold);
                }
                for (int64_t first = 0; first < r; first += RANK_STEP) {
                    const float *a = A + (m * r + first) * d;
                    vf sums[ROWS][RANK_STEP];
                    for (int i = 0; i < ROWS; i++)
                        for (int j = 0; j < RANK_STEP; j++) sums[i][j] = splat(0.0f);
                    for (int64_t c = 0; c < d; c += LANES) {
                        vf x[ROWS];
                        for (int i = 0; i < ROWS; i++) x[i] = in_register(load(rows + i * d + c));
                        for (int j = 0; j < RANK_STEP; j++) {
                            vf w = load(a + j * d + c);
                            for (int i = 0; i < ROWS; i++) sums[i][j] += x[i] * w;
                        }
                    }
                    for (int i = 0; i < count; i++)
                        for (int j = 0; j < RANK_STEP; j++)
                            low[(m * T + t + i) * r + first + j] = factors[m] * sum_lanes(sums[i][j]);
                }
            }
        free(rows);
    }
}

INLINE void add_row(float *row, const float *addend, int64_t d) {
    if (addend)
        for (int64_t c = 0; c < d; c += LANES) store(row + c, load(row + c) + load(addend + c));
}

/* Y[m] += bias[m] + D(low[m] M[m]) in place: Y (n, T, d), bias (n, d) or NULL, and for the first n_low members low
 * (n_low, T, r) and M (n_low, r, d). */
void expand(elem *Y, const float *bias, const float *low, const float *M, int64_t T, int64_t d, int64_t n,
            int64_t n_low, int64_t r, const uint64_t *seeds, int32_t threshold, int threads) {
    int64_t blocks = (T + ROWS - 1) / ROWS;
#pragma omp parallel num_threads(threads)
    {
        float *rows = malloc(ROWS * d * sizeof(float));
#pragma omp for schedule(static) collapse(2)
        for (int64_t m = 0; m < n; m++)
            for (int64_t block = 0; block < blocks; block++) {
                int64_t t = block * ROWS, count = least(ROWS, T - t);
                expansion e = {NULL, NULL, 0, r, NULL, threshold};
                if (m < n_low) e = (expansion){low + m * T * r, M + m * r * d, 1, r, seeds ? seeds + m : NULL, threshold};
                for (int64_t i = 0; i < count; i++) {
                    read_row(Y + (m * T + t + i) * d, rows + i * d, d);
                    add_row(rows + i * d, bias ? bias + m * d : NULL, d);
                }
                expand_rows(rows, &e, t, count, T, d);
                for (int64_t i = 0; i < count; i++) write_row(rows + i * d, Y + (m * T + t + i) * d, d);
            }
        free(rows);
    }
}

/* `ranks` rows of low^T D(X) for `wide` blocks of columns from `column`; wide is even. */
INLINE void reduce_block(const float *low, const elem *X, float *out, int64_t T, int64_t d, int64_t r, int64_t column,
                         const key *keys, int32_t threshold, int ranks, int wide) {
    vf sums[2 * RANK_STEP][4];
    for (int j = 0; j < ranks; j++)
        for (int w = 0; w < wide; w++) sums[j][w] = splat(0.0f);
    for (int64_t t = 0; t < T; t++) {
        vf x[4];
        for (int w = 0; w < wide; w++) {
            int64_t c = column + w * LANES;
            x[w] = in_register(load_elem(X + t * d + (c < d ? c : column)));
        }
        if (keys)
            for (int w = 0; w < wide; w += 2) {
                vi a, b;
                kept_pair(keys[t], column / (2 * LANES) + w / 2, threshold, &a, &b);
                x[w] = where(a, x[w]);
                x[w + 1] = where(b, x[w + 1]);
            }
        for (int j = 0; j < ranks; j++)
            for (int w = 0; w < wide; w++) sums[j][w] += low[t * r + j] * x[w];
    }
    for (int j = 0; j < ranks; j++)
        for (int w = 0; w < wide; w++)
            if (column + w * LANES < d) store(out + j * d + column + w * LANES, sums[j][w]);
}

/* out[m] = low[m]^T D(X[m]): low (n, T, r), X (T, d) members `stride` apart, out (n, r, d). */
void reduce(const float *low, const elem *X, float *out, int64_t T, int64_t d, int64_t r, int64_t n, int64_t stride,
            const uint64_t *seeds, int32_t threshold, int threads) {
    int64_t blocks = (d + 4 * LANES - 1) / (4 * LANES);
    key *keys = NULL;
    if (seeds) {
        keys = malloc(n * T * sizeof(key));
        for (int64_t m = 0; m < n; m++)
            for (int64_t t = 0; t < T; t++) keys[m * T + t] = row_key(seeds[m], t);
    }
#pragma omp parallel for schedule(static) collapse(2) num_threads(threads)
    for (int64_t m = 0; m < n; m++)
        for (int64_t block = 0; block < blocks; block++) {
            const key *own = keys ? keys + m * T : NULL;
            const elem *x = X + m * stride;
            int64_t column = block * 4 * LANES, first = 0;
            for (; first + 2 * RANK_STEP <= r; first += 2 * RANK_STEP)
                for (int64_t c = column; c < least(column + 4 * LANES, d); c += 2 * LANES)
                    reduce_block(low + m * T * r + first, x, out + (m * r + first) * d, T, d, r, c, own, threshold,
                                 2 * RANK_STEP, 2);
            if (first < r)
                reduce_block(low + m * T * r + first, x, out + (m * r + first) * d, T, d, r, column, own, threshold,
                             RANK_STEP, 4);
        }
    free(keys);
}

/* out = residual + product + sum over members of D(low M); residual and low may be NULL. Shape (T, d). */
void add_gradients(const float *residual, const elem *product, const float *low, const float *M, int64_t n, int64_t r,
                   const uint64_t *seeds, int32_t threshold, float *out, int64_t T, int64_t d, int threads) {
    expansion e = {low, M, low ? n : 0, r, seeds, threshold};
#pragma omp parallel num_threads(threads)
    {
        float *rows = malloc(ROWS * d * sizeof(float));
#pragma omp for schedule(static)
        for (int64_t t = 0; t < T; t += ROWS) {
            int64_t count = least(ROWS, T - t);
            for (int64_t i = 0; i < count; i++) {
                read_row(product + (t + i) * d, rows + i * d, d);
                add_row(rows + i * d, residual ? residual + (t + i) * d : NULL, d);
            }
            expand_rows(rows, &e, t, count, T, d);
            memcpy(out + t * d, rows, count * d * sizeof(float));
        }
        free(rows);
    }
}

/* h = residual + scale D(Y + shift + low M); x = (h - mean) rstd over d; out = x weight + bias, as floats and as elem.
 * Keeps x (T, d) and rstd (T). shift (d), low and out_elem may be NULL; threshold 0 drops nothing. */
void add_norm(const elem *Y, const float *shift, const float *low, const float *M, int64_t r, uint64_t seed, int32_t threshold,
              float scale, const float *residual, const float *weight, const float *bias, float eps, float *out,
              elem *out_elem, float *x, float *rstd, int64_t T, int64_t d, int threads) {
    expansion e = {low, M, low ? 1 : 0, r, NULL, 0};
#pragma omp parallel num_threads(threads)
    {
        float *rows = malloc(ROWS * d * sizeof(float));
#pragma omp for schedule(static)
        for (int64_t t = 0; t < T; t += ROWS) {
            int64_t count = least(ROWS, T - t);
            for (int64_t i = 0; i < count; i++) {
                read_row(Y + (t + i) * d, rows + i * d, d);
                add_row(rows + i * d, shift, d);
            }
            expand_rows(rows, &e, t, count, T, d);
            for (int64_t i = 0; i < count; i++) {
                float *row = rows + i * d;
                if (threshold) drop_row(row, d, row_key(seed, t + i), threshold);
                vf sum = splat(0.0f), squares = splat(0.0f);
                for (int64_t c = 0; c < d; c += LANES) {
                    vf h = scale * load(row + c) + load(residual + (t + i) * d + c);
                    store(row + c, h);
                    sum += h;
                }
                float mean = sum_lanes(sum) / d;
                for (int64_t c = 0; c < d; c += LANES) {
                    vf h = load(row + c) - mean;
                    squares += h * h;
                }
                float inverse = 1.0f / sqrtf(sum_lanes(squares) / d + eps);
                rstd[t + i] = inverse;
                for (int64_t c = 0; c < d; c += LANES) {
                    vf normal = (load(row + c) - mean) * inverse;
                    store(x + (t + i) * d + c, normal);
                    vf y = normal * load(weight + c) + load(bias + c);
                    store(out + (t + i) * d + c, y);
                    if (out_elem) store_elem(out_elem + (t + i) * d + c, y);
                }
            }
        }
        free(rows);
    }
}

/* Invert add_norm: from G = residual + product + D(low M) at its output, dh (T, d) for the residual, and for the branch
 * scale D'(dh) as elem. product and low may be NULL. */
void norm_backward(const float *residual, const elem *product, const float *low, const float *M, int64_t r,
                   const uint64_t *seeds, int32_t member_threshold, const float *x, const float *rstd,
                   const float *weight, uint64_t seed, int32_t threshold, float scale, float *dh, elem *branch,
                   int64_t T, int64_t d, int threads) {
    expansion e = {low, M, low ? 1 : 0, r, seeds, member_threshold};
#pragma omp parallel num_threads(threads)
    {
        float *rows = malloc(ROWS * d * sizeof(float));
#pragma omp for schedule(static)
        for (int64_t t = 0; t < T; t += ROWS) {
            int64_t count = least(ROWS, T - t);
            for (int64_t i = 0; i < count; i++) {
                memcpy(rows + i * d, residual + (t + i) * d, d * sizeof(float));
                if (product)
                    for (int64_t c = 0; c < d; c += LANES)
                        store(rows + i * d + c, load(rows + i * d + c) + load_elem(product + (t + i) * d + c));
            }
            expand_rows(rows, &e, t, count, T, d);
            for (int64_t i = 0; i < count; i++) {
                float *row = rows + i * d;
                const float *normal = x + (t + i) * d;
                vf sum = splat(0.0f), along = splat(0.0f);
                for (int64_t c = 0; c < d; c += LANES) {
                    vf g = load(row + c) * load(weight + c);
                    store(row + c, g);
                    sum += g;
                    along += g * load(normal + c);
                }
                float mean = sum_lanes(sum) / d, part = sum_lanes(along) / d;
                for (int64_t c = 0; c < d; c += LANES) {
                    vf g = rstd[t + i] * (load(row + c) - mean - part * load(normal + c));
                    store(dh + (t + i) * d + c, g);
                    store(row + c, scale * g);
                }
                if (threshold) drop_row(row, d, row_key(seed, t + i), threshold);
                write_row(row, branch + (t + i) * d, d);
            }
        }
        free(rows);
    }
}

/* h = H + bias + low M; out = gelu(h), and slope = gelu'(h), which may be H. Shape (T, f); bias (f) and low may be
 * NULL. */
void gelu(const elem *H, const float *bias, const float *low, const float *M, int64_t r, elem *out, elem *slope,
          int64_t T, int64_t f, int threads) {
    expansion e = {low, M, low ? 1 : 0, r, NULL, 0};
#pragma omp parallel num_threads(threads)
    {
        float *rows = malloc(ROWS * f * sizeof(float));
#pragma omp for schedule(static)
        for (int64_t t = 0; t < T; t += ROWS) {
            int64_t count = least(ROWS, T - t);
            for (int64_t i = 0; i < count; i++) {
                read_row(H + (t + i) * f, rows + i * f, f);
                add_row(rows + i * f, bias, f);
            }
            expand_rows(rows, &e, t, count, T, f);
            for (int64_t i = 0; i < count; i++)
                for (int64_t c = 0; c < f; c += LANES) {
                    vf h = load(rows + i * f + c), bell, cdf = normal_cdf(h, &bell);
                    store_elem(out + (t + i) * f + c, h * cdf);
                    store_elem(slope + (t + i) * f + c, cdf + h * (0.398942280401432678f * bell));
                }
        }
        free(rows);
    }
}

/* out = (G + D(low M)) slope. Shape (T, f); low may be NULL, out may be G. */
void gelu_backward(const elem *G, const float *low, const float *M, int64_t r, const uint64_t *seeds,
                   int32_t threshold, const elem *slope, elem *out, int64_t T, int64_t f, int threads) {
    expansion e = {low, M, low ? 1 : 0, r, seeds, threshold};
#pragma omp parallel num_threads(threads)
    {
        float *rows = malloc(ROWS * f * sizeof(float));
#pragma omp for schedule(static)
        for (int64_t t = 0; t < T; t += ROWS) {
            int64_t count = least(ROWS, T - t);
            for (int64_t i = 0; i < count; i++) read_row(G + (t + i) * f, rows + i * f, f);
            expand_rows(rows, &e, t, count, T, f);
            for (int64_t i = 0; i < count; i++)
                for (int64_t c = 0; c < f; c += LANES)
                    store_elem(out + (t + i) * f + c, load(rows + i * f + c) * load_elem(slope + (t + i) * f + c));
        }
        free(rows);
    }
}

INLINE int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

/* Copies a head's `rows` x `size` part of a matrix with rows of d to floats, rows of `width`, zeros behind. */
INLINE void read_head(const elem *from, float *to, int64_t rows, int64_t size, int64_t d, int64_t width) {
    for (int64_t i = 0; i < rows; i++) {
        int64_t c = 0;
        for (; c + LANES <= size; c += LANES) store(to + i * width + c, load_elem(from + i * d + c));
        for (; c < size; c++) to[i * width + c] = widen(from[i * d + c]);
        for (; c < width; c++) to[i * width + c] = 0.0f;
    }
}

INLINE void write_head(const float *from, elem *to, int64_t rows, int64_t size, int64_t d, int64_t width) {
    for (int64_t i = 0; i < rows; i++) {
        int64_t c = 0;
        for (; c + LANES <= size; c += LANES) store_elem(to + i * d + c, load(from + i * width + c));
        for (; c < size; c++) to[i * d + c] = narrow(from[i * width + c]);
    }
}

/* to (width, height) = from^T; zeros stand for rows from `rows` to `height`. */
INLINE void transpose(const float *from, float *to, int64_t rows, int64_t height, int64_t width) {
    for (int64_t c = 0; c < width; c++) {
        for (int64_t i = 0; i < rows; i++) to[c * height + i] = from[i * width + c];
        for (int64_t i = rows; i < height; i++) to[c * height + i] = 0.0f;
    }
}

/* out (rows, columns) = factor a B, with a[i][k] = a[i * row_step + k * inner_step], B (inner, columns); rows are
 * computed by ROWS, so that a and out reach to a multiple of it; columns is a multiple of LANES. */
INLINE void multiply(const float *a, int64_t row_step, int64_t inner_step, const float *B, int64_t rows, int64_t inner,
                     int64_t columns, float factor, float *out) {
    for (int64_t i = 0; i < rows; i += ROWS)
        for (int64_t c = 0; c < columns; c += LANES) {
            vf sums[ROWS];
            for (int j = 0; j < ROWS; j++) sums[j] = splat(0.0f);
            for (int64_t k = 0; k < inner; k++) {
                vf b = in_register(load(B + k * columns + c));
                for (int j = 0; j < ROWS; j++) sums[j] += a[(i + j) * row_step + k * inner_step] * b;
            }
            for (int j = 0; j < ROWS; j++) store(out + (i + j) * columns + c, factor * sums[j]);
        }
}

/* weights (rows, wide) = softmax over the `width` first columns; those behind become 0. */
INLINE void softmax(float *weights, int64_t rows, int64_t width, int64_t wide, const uint8_t *real) {
    for (int64_t i = 0; i < rows; i++) {
        float *row = weights + i * wide;
        if (real)
            for (int64_t j = 0; j < width; j++)
                if (!real[j]) row[j] = LOWEST;
        for (int64_t j = width; j < wide; j++) row[j] = -INFINITY;
        vf top = load(row), total = splat(0.0f);
        for (int64_t c = LANES; c < wide; c += LANES) top = choose(load(row + c) > top, load(row + c), top);
        float highest = max_lanes(top);
        for (int64_t c = 0; c < wide; c += LANES) {
            vf w = exp_(load(row + c) - highest);
            store(row + c, w);
            total += w;
        }
        float inverse = 1.0f / sum_lanes(total);
        for (int64_t c = 0; c < wide; c += LANES) store(row + c, inverse * load(row + c));
    }
}

INLINE void drop_weights(float *weights, int64_t rows, int64_t wide, uint64_t seed, int64_t first, int32_t threshold) {
    if (threshold)
        for (int64_t i = 0; i < rows; i++) drop_row(weights + i * wide, wide, row_key(seed, first + i), threshold);
}

/* Where the tokens of an example lie: rows `all` to `all` + `width` of K and V, rows `wanted` to `wanted` + `queries` of
 * Q, one query where only first tokens are wanted; `area` is where its heads' weights start in P. */
typedef struct { int64_t all, width, wanted, queries, area; } place;

INLINE place find_place(const int64_t *bounds, const int64_t *areas, int64_t example, int64_t heads, int64_t first_only) {
    int64_t all = bounds[example], width = bounds[example + 1] - all;
    return (place){all, width, first_only ? example : all, first_only ? 1 : width, heads * areas[example]};
}

/* context = scale D(P) V with P = softmax(Q K^T / sqrt(size)) over the real tokens of each example; heads side by side in
 * rows of d. Examples lie one after the other: K and V (T, d) with example e in rows bounds[e] to bounds[e + 1], real (T)
 * or NULL, Q likewise or, where first_only, (batch, d). P holds queries x width weights per example and head, areas[e] of
 * them per head before example e; `widest` is the longest example. */
void attend(const elem *Q, const elem *K, const elem *V, const uint8_t *real, const int64_t *bounds,
            const int64_t *areas, uint64_t seed, int32_t threshold, float scale, elem *context, float *P, int64_t batch,
            int64_t heads, int64_t first_only, int64_t widest, int64_t size, int threads) {
    int64_t d = heads * size, deep = padded(size), broad = padded(widest), tall = first_only ? padded(1) : broad;
    float temperature = 1.0f / sqrtf((float)size);
#pragma omp parallel num_threads(threads)
    {
        float *q = calloc(2 * tall * deep + widest * deep + broad * deep + tall * broad, sizeof(float));
        float *k = q + tall * deep, *kt = k + widest * deep, *weights = kt + broad * deep, *sums = weights + tall * broad;
#pragma omp for schedule(dynamic, 4)
        for (int64_t pair = 0; pair < batch * heads; pair++) {
            int64_t head = pair % heads, column = head * size;
            place p = find_place(bounds, areas, pair / heads, heads, first_only);
            int64_t wide = padded(p.width), first = heads * p.wanted + head * p.queries;
            read_head(Q + p.wanted * d + column, q, p.queries, size, d, deep);
            read_head(K + p.all * d + column, k, p.width, size, d, deep);
            transpose(k, kt, p.width, wide, deep);
            multiply(q, deep, 1, kt, p.queries, size, wide, temperature, weights);
            softmax(weights, p.queries, p.width, wide, real ? real + p.all : NULL);
            for (int64_t i = 0; i < p.queries; i++)
                memcpy(P + p.area + (head * p.queries + i) * p.width, weights + i * wide, p.width * sizeof(float));
            drop_weights(weights, p.queries, wide, seed, first, threshold);
            read_head(V + p.all * d + column, k, p.width, size, d, deep);
            multiply(weights, wide, 1, k, p.queries, p.width, deep, scale, sums);
            write_head(sums, context + p.wanted * d + column, p.queries, size, d, deep);
        }
        free(q);
    }
}

/* dQ, dK and dV of attend from G = dL/d(context), all laid out as there. */
void attend_backward(const elem *G, const elem *Q, const elem *K, const elem *V, const float *P, const int64_t *bounds,
                     const int64_t *areas, uint64_t seed, int32_t threshold, float scale, elem *dQ, elem *dK, elem *dV,
                     int64_t batch, int64_t heads, int64_t first_only, int64_t widest, int64_t size, int threads) {
    int64_t d = heads * size, deep = padded(size), broad = padded(widest), tall = first_only ? padded(1) : broad;
    float temperature = 1.0f / sqrtf((float)size);
#pragma omp parallel num_threads(threads)
    {
        float *q = calloc(2 * tall * deep + widest * deep + 2 * broad * deep + 2 * tall * broad, sizeof(float));
        float *g = q + tall * deep, *k = g + tall * deep, *vt = k + widest * deep, *kept = vt + broad * deep;
        float *dS = kept + tall * broad, *sums = dS + tall * broad;
#pragma omp for schedule(dynamic, 4)
        for (int64_t pair = 0; pair < batch * heads; pair++) {
            int64_t head = pair % heads, column = head * size;
            place p = find_place(bounds, areas, pair / heads, heads, first_only);
            int64_t wide = padded(p.width), first = heads * p.wanted + head * p.queries;
            int64_t wanted = p.wanted * d + column, all = p.all * d + column;
            read_head(Q + wanted, q, p.queries, size, d, deep);
            read_head(G + wanted, g, p.queries, size, d, deep);
            read_head(V + all, k, p.width, size, d, deep);
            transpose(k, vt, p.width, wide, deep);
            read_head(K + all, k, p.width, size, d, deep);
            multiply(g, deep, 1, vt, p.queries, size, wide, scale, dS);
            drop_weights(dS, p.queries, wide, seed, first, threshold);
            for (int64_t i = 0; i < p.queries; i++) {
                float *weights = kept + i * wide, *row = dS + i * wide;
                memcpy(weights, P + p.area + (head * p.queries + i) * p.width, p.width * sizeof(float));
                for (int64_t c = p.width; c < wide; c++) weights[c] = 0.0f;
                vf along = splat(0.0f);
                for (int64_t c = 0; c < wide; c += LANES) along += load(row + c) * load(weights + c);
                float mean = sum_lanes(along);
                for (int64_t c = 0; c < wide; c += LANES)
                    store(row + c, temperature * load(weights + c) * (load(row + c) - mean));
            }
            drop_weights(kept, p.queries, wide, seed, first, threshold);
            multiply(dS, wide, 1, k, p.queries, p.width, deep, 1.0f, sums);
            write_head(sums, dQ + wanted, p.queries, size, d, deep);
            multiply(dS, 1, wide, q, p.width, p.queries, deep, 1.0f, sums);
            write_head(sums, dK + all, p.width, size, d, deep);
            multiply(kept, 1, wide, g, p.width, p.queries, deep, scale, sums);
            write_head(sums, dV + all, p.width, size, d, deep);
        }
        free(q);
    }
}

/* out = scale D(X), as floats and as elem; threshold 0 drops nothing. out_elem may be NULL. */
void drop(const float *X, uint64_t seed, int32_t threshold, float scale, float *out, elem *out_elem, int64_t T,
          int64_t d, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t t = 0; t < T; t++) {
        float *row = out + t * d;
        for (int64_t c = 0; c < d; c += LANES) store(row + c, scale * load(X + t * d + c));
        if (threshold) drop_row(row, d, row_key(seed, t), threshold);
        if (out_elem) write_row(row, out_elem + t * d, d);
    }
}

/* G (r, wide) = B^T B of B (rows, r), zeros behind its r columns; padded_row has `wide` floats, zeros behind r. */
INLINE void gram_of_columns(const float *B, int64_t rows, int64_t r, int64_t wide, float *padded_row, float *G) {
    memset(G, 0, r * wide * sizeof(float));
    for (int64_t j = 0; j < rows; j++) {
        memcpy(padded_row, B + j * r, r * sizeof(float));
        for (int64_t c = 0; c < wide; c += LANES) {
            vf row = load(padded_row + c);
            for (int64_t a = 0; a < r; a++) store(G + a * wide + c, load(G + a * wide + c) + padded_row[a] * row);
        }
    }
}

/* G (r, wide) = A A^T of A (r, d); its columns behind r are left as they are. */
INLINE void gram_of_rows(const float *A, int64_t r, int64_t d, int64_t wide, float *G) {
    for (int64_t a = 0; a < r; a++)
        for (int64_t b = a; b < r; b++) {
            const float *x = A + a * d, *y = A + b * d;
            vf total = splat(0.0f);
            int64_t c = 0;
            for (; c + LANES <= d; c += LANES) total += load(x + c) * load(y + c);
            float rest = sum_lanes(total);
            for (; c < d; c++) rest += x[c] * y[c];
            G[a * wide + b] = G[b * wide + a] = rest;
        }
}

/* out (r, d) += S A of S (r, wide) and A (r, d). */
INLINE void add_mixed_rows(const float *S, const float *A, float *out, int64_t r, int64_t d, int64_t wide) {
    for (int64_t a = 0; a < r; a++) {
        int64_t c = 0;
        for (; c + LANES <= d; c += LANES) {
            vf total = load(out + a * d + c);
            for (int64_t b = 0; b < r; b++) total += S[a * wide + b] * load(A + b * d + c);
            store(out + a * d + c, total);
        }
        for (; c < d; c++)
            for (int64_t b = 0; b < r; b++) out[a * d + c] += S[a * wide + b] * A[b * d + c];
    }
}

/* out (rows, r) += B S of B (rows, r) and S (r, wide); sums has `wide` floats. */
INLINE void add_mixed_columns(const float *B, const float *S, float *out, int64_t rows, int64_t r, int64_t wide,
                              float *sums) {
    for (int64_t j = 0; j < rows; j++) {
        for (int64_t c = 0; c < wide; c += LANES) {
            vf total = splat(0.0f);
            for (int64_t a = 0; a < r; a++) total += B[j * r + a] * load(S + a * wide + c);
            store(sums + c, total);
        }
        for (int64_t a = 0; a < r; a++) out[j * r + a] += sums[a];
    }
}

/* Gradients and values of the terms c ||B A||_F^2 for A (r, d_in), B (d_out, r) of `count` matrices, sizes (count, 3):
 * dA += 2 c (B^T B) A, dB += 2 c B (A A^T), values[m] = c ||B A||^2; dA and dB may be NULL. */
void shrink(const float *const *A, const float *const *B, float *const *dA, float *const *dB, const int64_t *sizes,
            const float *doubled, double *values, int64_t count, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t m = 0; m < count; m++) {
        int64_t r = sizes[3 * m], d_in = sizes[3 * m + 1], d_out = sizes[3 * m + 2];
        int64_t wide = (r + LANES - 1) / LANES * LANES;
        float *BtB = calloc(2 * r * wide + 2 * wide, sizeof(float)), *AAt = BtB + r * wide, *row = AAt + r * wide;
        gram_of_columns(B[m], d_out, r, wide, row, BtB);
        gram_of_rows(A[m], r, d_in, wide, AAt);
        double value = 0.0;
        for (int64_t i = 0; i < r * wide; i++) value += (double)BtB[i] * AAt[i];
        values[m] = 0.5 * doubled[m] * value;
        for (int64_t i = 0; i < r * wide; i++) BtB[i] *= doubled[m];
        for (int64_t i = 0; i < r * wide; i++) AAt[i] *= doubled[m];
        if (dA[m]) add_mixed_rows(BtB, A[m], dA[m], r, d_in, wide);
        if (dB[m]) add_mixed_columns(B[m], AAt, dB[m], d_out, r, wide, row + wide);
        free(BtB);
    }
}

/* c ||G - I||_F of a Gram matrix (r, wide); G becomes 2 c (G - I) / ||G - I||_F, or 0 where that norm is. */
INLINE double weigh_excess(float *G, int64_t r, int64_t wide, float c) {
    double squares = 0.0;
    for (int64_t a = 0; a < r; a++) G[a * wide + a] -= 1.0f;
    for (int64_t i = 0; i < r * wide; i++) squares += (double)G[i] * G[i];
    double norm = sqrt(squares);
    float factor = norm > 0.0 ? (float)(2.0 * c / norm) : 0.0f;
    for (int64_t i = 0; i < r * wide; i++) G[i] *= factor;
    return c * norm;
}

/* Gradients and values of the terms c (||A A^T - I||_F + ||B^T B - I||_F), arguments as those of shrink. */
void orthogonalize(const float *const *A, const float *const *B, float *const *dA, float *const *dB,
                   const int64_t *sizes, float c, double *values, int64_t count, int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t m = 0; m < count; m++) {
        int64_t r = sizes[3 * m], d_in = sizes[3 * m + 1], d_out = sizes[3 * m + 2];
        int64_t wide = (r + LANES - 1) / LANES * LANES;
        float *G = calloc(r * wide + 2 * wide, sizeof(float)), *row = G + r * wide;
        gram_of_rows(A[m], r, d_in, wide, G);
        values[m] = weigh_excess(G, r, wide, c);
        if (dA[m]) add_mixed_rows(G, A[m], dA[m], r, d_in, wide);
        gram_of_columns(B[m], d_out, r, wide, row, G);
        values[m] += weigh_excess(G, r, wide, c);
        if (dB[m]) add_mixed_columns(B[m], G, dB[m], d_out, r, wide, row + wide);
        free(G);
    }
}

/* kept (T, d): 1 where an element of the site is kept. For tests. */
void draw_kept(uint64_t seed, int32_t threshold, uint8_t *kept, int64_t T, int64_t d) {
    for (int64_t t = 0; t < T; t++)
        for (int64_t c = 0; c < d; c++)
            kept[t * d + c] = kept_block(row_key(seed, t), c / LANES, threshold)[c % LANES] != 0;
}

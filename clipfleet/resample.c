/* Pillow's resampling of 8-bit pixels, bit for bit, with the vector instructions that Pillow does without. For x86-64.
 *
 * What is computed, in which order and how it is rounded is that of src/libImaging/Resample.c in Pillow (LICENSE.pillow).
 *
 * Pillow resizes in two passes, one for each axis. An output is a sum of 32-bit integers, coefficient times pixel, with
 * coefficients scaled by 2^22, rounded after each pass. The order of such a sum does not matter and it may wrap on its
 * way, so this gives the same bytes. Processors multiply and add pairs of 16-bit integers in one instruction, so a
 * coefficient c is split: c = high * 4096 + low.
 *
 * A pixel is 4 bytes, as in Pillow's memory: red, green, blue and one that is carried along.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <immintrin.h>

enum { SCALE_BITS = 22, LOW_BITS = 12, HALF = 1 << (SCALE_BITS - 1) };
enum { BLOCK = 8, ROWS = 4 }; /* what across_avx2 takes in one go: taps of a row, and rows */
enum { WORTH_SPREADING = 32 }; /* rows for which spread() pays; its table is 4 times that of the weights */
enum { STRIPE = 256 };        /* bytes of a row that down() adds up at a time */
enum { AT_ONCE = 8 };         /* outputs of the second pass for which the first one makes rows, which stay in the cache */

typedef struct {
    int taps;       /* of each output, with zeros up to a multiple of BLOCK: may reach beyond the source's end */
    int *first;     /* source position of an output's first tap */
    int32_t *kept;  /* coefficients, outputs x taps */
    int16_t *spread; /* the same for across_avx2, once it was needed */
} weights;

static void free_weights(weights *w) {
    free(w->first);
    free(w->kept);
    free(w->spread);
}

static double triangle(double x) {
    x = fabs(x);
    return x < 1.0 ? 1.0 - x : 0.0;
}

static double cubic(double x) {
    const double a = -0.5;
    x = fabs(x);
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
    return 0.0;
}

/* For the outputs [start, start + count) of a resize from `length` to `target`. The order of operations is Pillow's: it
 * decides the last bit. Returns 0 without memory. */
static int make_weights(weights *w, int length, int target, int start, int count, int bicubic) {
    const double scale = (double)length / target, stretch = scale < 1.0 ? 1.0 : scale;
    const double support = (bicubic ? 2.0 : 1.0) * stretch, step = 1.0 / stretch;
    const int most = (int)ceil(support) * 2 + 1;
    double *values = malloc(most * sizeof(double));
    w->taps = (most + BLOCK - 1) / BLOCK * BLOCK;
    w->first = malloc(count * sizeof(int));
    w->kept = calloc((size_t)count * w->taps, sizeof(int32_t));
    if (!values || !w->first || !w->kept) {
        free(values);
        return 0;
    }
    for (int i = 0; i < count; i++) {
        const double center = (start + i + 0.5) * scale;
        int low = (int)(center - support + 0.5), high = (int)(center + support + 0.5);
        if (low < 0) low = 0;
        if (high > length) high = length;
        double sum = 0.0;
        for (int k = 0; k < high - low; k++) {
            const double at = (k + low - center + 0.5) * step;
            values[k] = bicubic ? cubic(at) : triangle(at);
            sum += values[k];
        }
        for (int k = 0; k < high - low; k++) {
            const double value = (sum != 0.0 ? values[k] / sum : values[k]) * (1 << SCALE_BITS);
            w->kept[(size_t)i * w->taps + k] = (int32_t)(value < 0 ? value - 0.5 : value + 0.5);
        }
        w->first[i] = low;
    }
    free(values);
    return 1;
}

static inline uint8_t clip(int32_t sum) {
    const int32_t value = sum >> SCALE_BITS;
    return value < 0 ? 0 : value > 255 ? 255 : (uint8_t)value;
}

static inline int taps_inside(const weights *w, int i, int length) {
    return w->first[i] + w->taps <= length ? w->taps : length - w->first[i];
}

static void across_plain(const uint8_t *source, size_t stride, int length, int rows, const weights *w, int count,
                         uint8_t *result) {
    for (int y = 0; y < rows; y++, source += stride)
        for (int i = 0; i < count; i++, result += 4) {
            const int32_t *kept = w->kept + (size_t)i * w->taps;
            const uint8_t *from = source + (size_t)w->first[i] * 4;
            const int taps = taps_inside(w, i, length);
            int32_t sums[4] = {HALF, HALF, HALF, HALF};
            for (int k = 0; k < taps; k++)
                for (int c = 0; c < 4; c++) sums[c] += kept[k] * from[k * 4 + c];
            for (int c = 0; c < 4; c++) result[c] = clip(sums[c]);
        }
}

/* The coefficients as across_avx2 multiplies them. For each block of 8 taps: the low parts of taps (0 1 | 4 5) and of
 * (2 3 | 6 7), then the high parts, every pair four times, once for each byte of a pixel. NULL without memory. */
static const int16_t *spread(weights *w, int count) {
    const size_t blocks = (size_t)count * w->taps / BLOCK;
    void *memory = NULL;
    if (w->spread) return w->spread;
    if (posix_memalign(&memory, 32, blocks * 64 * sizeof(int16_t))) return NULL;
    int16_t *to = w->spread = memory;
    for (size_t b = 0; b < blocks; b++)
        for (int part = 0; part < 4; part++)
            for (int lane = 0; lane < 16; lane++) {
                const int32_t value = w->kept[b * BLOCK + (part & 1) * 2 + (lane & 8) / 2 + (lane & 1)];
                *to++ = (int16_t)(part < 2 ? value & ((1 << LOW_BITS) - 1) : value >> LOW_BITS);
            }
    return w->spread;
}

/* `rows` is a multiple of ROWS. Reads whole blocks, so up to the furthest tap even where its coefficient is zero. */
__attribute__((target("avx2"))) static void across_avx2(const uint8_t *source, size_t stride, int rows,
                                                        const weights *w, const int16_t *spread_kept, int count,
                                                        uint8_t *result) {
    /* in each half of a vector, four pixels: pairs of the first two, and of the last two, widened to 16 bits */
    const __m256i early = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1));
    const __m256i late = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(8, -1, 12, -1, 9, -1, 13, -1, 10, -1, 14, -1, 11, -1, 15, -1));
    const size_t result_stride = (size_t)count * 4;
    const int blocks = w->taps / BLOCK;
    for (int y = 0; y < rows; y += ROWS, source += ROWS * stride, result += ROWS * result_stride) {
        const __m256i *kept = (const __m256i *)spread_kept;
        for (int i = 0; i < count; i++) {
            const uint8_t *from = source + (size_t)w->first[i] * 4;
            __m256i low[ROWS], high[ROWS];
            for (int r = 0; r < ROWS; r++) low[r] = high[r] = _mm256_setzero_si256();
            for (int b = 0; b < blocks; b++, kept += 4, from += BLOCK * 4)
                for (int r = 0; r < ROWS; r++) {
                    const __m256i pixels = _mm256_loadu_si256((const __m256i *)(from + r * stride));
                    const __m256i a = _mm256_shuffle_epi8(pixels, early), z = _mm256_shuffle_epi8(pixels, late);
                    low[r] = _mm256_add_epi32(low[r], _mm256_madd_epi16(a, kept[0]));
                    low[r] = _mm256_add_epi32(low[r], _mm256_madd_epi16(z, kept[1]));
                    high[r] = _mm256_add_epi32(high[r], _mm256_madd_epi16(a, kept[2]));
                    high[r] = _mm256_add_epi32(high[r], _mm256_madd_epi16(z, kept[3]));
                }
            for (int r = 0; r < ROWS; r++) {
                const __m256i both = _mm256_add_epi32(low[r], _mm256_slli_epi32(high[r], LOW_BITS));
                __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
                sum = _mm_srai_epi32(_mm_add_epi32(sum, _mm_set1_epi32(HALF)), SCALE_BITS);
                sum = _mm_packus_epi16(_mm_packs_epi32(sum, sum), sum); /* saturates: that is clip() */
                const int pixel = _mm_cvtsi128_si32(sum);
                memcpy(result + r * result_stride + (size_t)i * 4, &pixel, 4);
            }
        }
    }
}

/* The pass along `rows` rows of `length` pixels, behind which `more` follow: result is (rows, count) pixels. Returns 0
 * without memory. */
static int across(const uint8_t *source, size_t stride, int length, int rows, int more, weights *w, int count, int plain,
                  uint8_t *result) {
    int done = 0;
    if (!plain && __builtin_cpu_supports("avx2")) {
        int furthest = length;
        for (int i = 0; i < count; i++)
            if (w->first[i] + w->taps > furthest) furthest = w->first[i] + w->taps;
        /* a block that reaches beyond its row must not reach beyond the last one */
        const size_t beyond = (size_t)(furthest - length) * 4;
        const int last = beyond ? (int)((beyond + stride - 1) / stride) : 0;
        const int whole = rows + more > last ? rows + more - last : 0;
        if (w->spread || whole >= WORTH_SPREADING) done = (rows < whole ? rows : whole) / ROWS * ROWS;
        if (done) {
            const int16_t *kept = spread(w, count);
            if (!kept) return 0;
            across_avx2(source, stride, done, w, kept, count, result);
        }
    }
    across_plain(source + done * stride, stride, length, rows - done, w, count, result + (size_t)done * count * 4);
    return 1;
}

/* The pass down columns of `length` pixels for the outputs [at, at + count): result is (count, bytes), source starts at the
 * first output's first row. Compilers make vector instructions of this one, of those that the function it is part of may
 * use. */
__attribute__((always_inline)) static inline void add_rows(const uint8_t *restrict source, size_t stride, int length,
                                                           size_t bytes, const weights *w, int at, int count,
                                                           uint8_t *restrict result) {
    int32_t sums[STRIPE];
    for (int i = 0; i < count; i++) {
        const int32_t *kept = w->kept + (size_t)(at + i) * w->taps;
        const int taps = taps_inside(w, at + i, length);
        for (size_t start = 0; start < bytes; start += STRIPE) {
            const int wide = bytes - start < STRIPE ? (int)(bytes - start) : STRIPE;
            const uint8_t *from = source + (size_t)(w->first[at + i] - w->first[at]) * stride + start;
            for (int j = 0; j < STRIPE; j++) sums[j] = HALF;
            for (int k = 0; k < taps; k++, from += stride) {
                const int32_t c = kept[k];
                for (int j = 0; j < wide; j++) sums[j] += c * from[j];
            }
            for (int j = 0; j < wide; j++) result[(size_t)i * bytes + start + j] = clip(sums[j]);
        }
    }
}

__attribute__((target("avx2"))) static void down_avx2(const uint8_t *source, size_t stride, int length, size_t bytes,
                                                      const weights *w, int at, int count, uint8_t *result) {
    add_rows(source, stride, length, bytes, w, at, count, result);
}

static void down(const uint8_t *source, size_t stride, int length, size_t bytes, const weights *w, int at, int count,
                 int plain, uint8_t *result) {
    if (!plain && __builtin_cpu_supports("avx2"))
        down_avx2(source, stride, length, bytes, w, at, count, result);
    else
        add_rows(source, stride, length, bytes, w, at, count, result);
}

/* Both passes over (tall, wide) pixels, the height first. Returns 0 without memory. */
static int down_then_across(const uint8_t *source, size_t stride, int tall, int wide, weights *x, int columns, weights *y,
                            int rows, int plain, uint8_t *result) {
    uint8_t *between = malloc((size_t)rows * wide * 4);
    if (!between) return 0;
    down(source, stride, tall, (size_t)wide * 4, y, 0, rows, plain, between);
    const int done = across(between, (size_t)wide * 4, wide, rows, 0, x, columns, plain, result);
    free(between);
    return done;
}

/* Both passes, the width first: rows are made for a few outputs at a time, and those that the next ones take too are kept.
 * A photograph's would be some megabytes at once. */
static int across_then_down(const uint8_t *source, size_t stride, int tall, int wide, weights *x, int columns, weights *y,
                            int rows, int plain, uint8_t *result) {
    const size_t row = (size_t)columns * 4;
    int most = 0;
    for (int i = 0; i < rows; i++) {
        const int last = i + AT_ONCE < rows ? i + AT_ONCE - 1 : rows - 1;
        const int span = y->first[last] + taps_inside(y, last, tall) - y->first[i];
        if (span > most) most = span;
    }
    uint8_t *between = malloc((most + ROWS) * row);
    if (!between) return 0;
    int from = 0, to = 0, done = 1; /* the rows that lie there */
    for (int i = 0; i < rows && done; i += AT_ONCE) {
        const int count = rows - i < AT_ONCE ? rows - i : AT_ONCE, last = i + count - 1;
        const int kept = to > y->first[i] ? to - y->first[i] : 0;
        memmove(between, between + (to - kept - from) * row, kept * row);
        from = y->first[i];
        if (!kept) to = from;
        int more = y->first[last] + taps_inside(y, last, tall) - to;
        if (more > 0) { /* rounded up to whole groups: the next outputs find some of theirs made */
            more = (more + ROWS - 1) / ROWS * ROWS;
            if (more > tall - to) more = tall - to;
            done = across(source + to * stride, stride, wide, more, tall - to - more, x, columns, plain,
                          between + kept * row);
            to += more;
        }
        if (done) down(between, row, tall, row, y, i, count, plain, result + (size_t)i * row);
    }
    free(between);
    return done;
}

/* Resize `source` (height, width) to (new_height, new_width) and give the part of it that starts at (top, left) and has
 * the size (rows, columns), as 3 bytes a pixel. Only what that part needs is computed. `height_first` says which pass
 * is the first, `plain` does without vector instructions. Returns 1, or 0 without memory. */
int clipfleet_resample_1(const uint8_t *source, int width, int height, int new_width, int new_height, int left, int top,
                       int columns, int rows, int bicubic, int height_first, int plain, uint8_t *result) {
    weights x = {0}, y = {0};
    uint8_t *small = malloc((size_t)rows * columns * 4);
    const size_t stride = (size_t)width * 4;
    int done = 0;
    if (small && make_weights(&x, width, new_width, left, columns, bicubic) &&
        make_weights(&y, height, new_height, top, rows, bicubic)) {
        /* the source's part that any output takes */
        const int west = x.first[0], east = x.first[columns - 1] + taps_inside(&x, columns - 1, width);
        const int north = y.first[0], south = y.first[rows - 1] + taps_inside(&y, rows - 1, height);
        source += north * stride + (size_t)west * 4;
        for (int i = 0; i < columns; i++) x.first[i] -= west;
        for (int i = 0; i < rows; i++) y.first[i] -= north;
        done = (height_first ? down_then_across : across_then_down)(source, stride, south - north, east - west, &x, columns,
                                                                    &y, rows, plain, small);
        if (done)
            for (size_t i = 0; i < (size_t)rows * columns; i++) memcpy(result + i * 3, small + i * 4, 3);
    }
    free(small);
    free_weights(&x);
    free_weights(&y);
    return done;
}

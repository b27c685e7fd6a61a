/* The windows of two output pixels as pairs of 16-bit numbers (dsp/product.h), padding as the zero point. A template's part:
 *
 *     POINTWISE 1   a kernel of 1 x 1 without padding, one group
 *     SEGMENT > 0   any number of channels, one group: SEGMENT neighbouring bytes for each kernel row and column of KERNEL_HEIGHT and
 *                   SEGMENTS (1 where a kernel row is one segment); the words of all segments come first, then the bytes that
 *                   are left of each
 *     else          the channels of a group fill whole words, also where they are packed (X_BITS 4 or 2)
 */
#ifndef PLANISH_DSP_GATHER_H
#define PLANISH_DSP_GATHER_H

#include "dsp/conv2d.h"
#include "dsp/halves.h"
#include "dsp/product.h"

#define EXPAND PLANISH_NAME(planish_expand_, X_BITS)

/* the first tap of an output pixel's window, in the input; column counts the outputs of its row */
typedef struct {
    int32_t top, left, column;
} pixel_t;

static inline int inside(int32_t position, int32_t size)
{
    return (uint32_t)position < (uint32_t)size;
}

#if POINTWISE

/* word i of a pixel's channels */
static inline const int8_t *pixel_at(const planish_dsp_conv2d_layer *l, const int8_t *x, pixel_t p)
{
    return x + (p.top * l->in_width + p.left) * (l->in_channels * X_BITS / 8);
}

static inline void gather(const planish_dsp_conv2d_layer *l, const int8_t *x, pixel_t a, pixel_t b, uint32_t *pairs,
                          int8_t *work)
{
    (void)work;
    (void)EXPAND(pixel_at(l, x, a), pixel_at(l, x, b), pairs, l->units * X_BITS / 8);
}

static inline void prepare(const planish_dsp_conv2d_layer *l, int8_t *work)
{
    (void)l;
    (void)work;
}

#elif SEGMENT

enum { PIECES = KERNEL_HEIGHT * SEGMENTS, WORDS = SEGMENT / 4, REST = SEGMENT % 4, WINDOW = PIECES * SEGMENT };

/* where a window's segments lie */
typedef struct {
    const int8_t *first;
    int32_t row_step, step;
} window_t;

static inline uint32_t load(const int8_t *p)
{
    uint32_t word;
    __builtin_memcpy(&word, p, 4); /* at any address: one LDR on these cores */
    return word;
}

/* a window that reaches into the padding, copied to `to` */
static __attribute__((noinline)) void copy_window(const planish_dsp_conv2d_layer *l, const int8_t *x, pixel_t p, int8_t *to)
{
    int32_t channels = l->in_channels, i, j, c;
    for (i = 0; i < l->kernel_height; i++) {
        int32_t row = p.top + i * l->dilation_height;
        for (j = 0; j < l->kernel_width; j++) {
            int32_t column = p.left + j * l->dilation_width;
            if (inside(row, l->in_height) && inside(column, l->in_width)) {
                const int8_t *from = x + (row * l->in_width + column) * channels;
                for (c = 0; c < channels; c++) {
                    *to++ = from[c];
                }
            } else {
                for (c = 0; c < channels; c++) {
                    *to++ = (int8_t)l->x_zero_point;
                }
            }
        }
    }
}

static inline window_t window_of(const planish_dsp_conv2d_layer *l, const int8_t *x, pixel_t p, int8_t *copy)
{
    int32_t channels = l->in_channels;
    window_t found;
    if (p.top >= 0 && p.top + (KERNEL_HEIGHT - 1) * l->dilation_height < l->in_height && p.left >= 0
        && p.left + (l->kernel_width - 1) * l->dilation_width < l->in_width) {
        found.first = x + (p.top * l->in_width + p.left) * channels;
        found.row_step = l->dilation_height * l->in_width * channels;
        found.step = l->dilation_width * channels;
    } else {
        copy_window(l, x, p, copy);
        found.first = copy;
        found.row_step = SEGMENTS * SEGMENT;
        found.step = SEGMENT;
    }
    return found;
}

/* byte k of what is left of all segments; 0 behind the last */
static inline uint32_t rest_of(window_t w, int32_t k)
{
    int32_t piece = REST ? k / (REST ? REST : 1) : PIECES;
    if (piece >= PIECES) {
        return 0;
    }
    return (uint32_t)w.first[piece / SEGMENTS * w.row_step + piece % SEGMENTS * w.step + 4 * WORDS + k % (REST ? REST : 1)];
}

static inline uint32_t *put(uint32_t *pairs, uint32_t a, uint32_t b)
{
    pairs[0] = planish_even_bytes(a);
    pairs[1] = planish_even_bytes(b);
    pairs[2] = planish_odd_bytes(a);
    pairs[3] = planish_odd_bytes(b);
    return pairs + 4;
}

static inline void gather(const planish_dsp_conv2d_layer *l, const int8_t *x, pixel_t p, pixel_t q, uint32_t *pairs,
                          int8_t *work)
{
    window_t a = window_of(l, x, p, work), b = window_of(l, x, q, work + WINDOW);
    int32_t i, j, k;
    for (i = 0; i < KERNEL_HEIGHT; i++) {
        for (j = 0; j < SEGMENTS; j++) {
            const int8_t *from_a = a.first + i * a.row_step + j * a.step, *from_b = b.first + i * b.row_step + j * b.step;
            for (k = 0; k < WORDS; k++) {
                pairs = put(pairs, load(from_a + 4 * k), load(from_b + 4 * k));
            }
        }
    }
    for (k = 0; k < REST * PIECES; k += 4) {
        pairs[0] = planish_low_halves(rest_of(a, k), rest_of(a, k + 2));
        pairs[1] = planish_low_halves(rest_of(b, k), rest_of(b, k + 2));
        pairs[2] = planish_low_halves(rest_of(a, k + 1), rest_of(a, k + 3));
        pairs[3] = planish_low_halves(rest_of(b, k + 1), rest_of(b, k + 3));
        pairs += 4;
    }
}

static inline void prepare(const planish_dsp_conv2d_layer *l, int8_t *work)
{
    (void)l;
    (void)work;
}

#else

/* all columns of a kernel's row lie in the input */
static inline int covered(const planish_dsp_conv2d_layer *l, int32_t left)
{
    return left >= 0 && left + l->kernel_width <= l->in_width;
}

/* work: a tap in the padding, written by `prepare` */
static inline void gather(const planish_dsp_conv2d_layer *l, const int8_t *x, pixel_t a, pixel_t b, uint32_t *pairs,
                          int8_t *work)
{
    int32_t bytes = l->in_channels * X_BITS / 8, words = bytes / l->groups / 4;
    int contiguous = l->dilation_width == 1 && l->groups == 1 && covered(l, a.left) && covered(l, b.left);
    int32_t i, j;
    for (i = 0; i < l->kernel_height; i++) {
        int32_t row_a = a.top + i * l->dilation_height, row_b = b.top + i * l->dilation_height;
        int in_a = inside(row_a, l->in_height), in_b = inside(row_b, l->in_height);
        int32_t at_a = (row_a * l->in_width + a.left) * bytes, at_b = (row_b * l->in_width + b.left) * bytes;
        if (contiguous && in_a && in_b) {
            pairs = EXPAND(x + at_a, x + at_b, pairs, l->kernel_width * words);
            continue;
        }
        for (j = 0; j < l->kernel_width; j++) {
            int32_t column = j * l->dilation_width;
            const int8_t *from_a = in_a && inside(a.left + column, l->in_width) ? x + at_a + column * bytes : work;
            const int8_t *from_b = in_b && inside(b.left + column, l->in_width) ? x + at_b + column * bytes : work;
            pairs = EXPAND(from_a, from_b, pairs, words);
        }
    }
}

static inline void prepare(const planish_dsp_conv2d_layer *l, int8_t *work)
{
    enum { MASK = (1 << X_BITS) - 1, ONES = 255 / MASK };
    int32_t bytes = l->in_channels * X_BITS / 8 / l->groups, i;
    for (i = 0; i < bytes; i++) {
        work[i] = (int8_t)((l->x_zero_point & MASK) * ONES);
    }
}

#endif

#endif

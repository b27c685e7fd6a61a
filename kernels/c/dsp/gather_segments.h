/* The windows of two output pixels as pairs of 16-bit numbers (dsp/product.h), for any number of channels and one group.
 *
 * A window consists of segments, SEGMENT neighbouring bytes each: KERNEL_HEIGHT rows of SEGMENTS, 1 where a kernel row is without
 * gaps. The whole words of all segments come first, then the bytes that are left of each. A window that reaches into the padding
 * is copied to `work` first.
 */
#ifndef PLANISH_DSP_GATHER_H
#define PLANISH_DSP_GATHER_H

#include "dsp/halves.h"
#include "dsp/pixels.h"
#include "dsp/product.h"

enum { PIECES = KERNEL_HEIGHT * SEGMENTS, WORDS = SEGMENT / 4, REST = SEGMENT % 4, COPY_WORDS = (PIECES * SEGMENT + 3) / 4 };

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

static inline void copy(const int8_t *from, int8_t *to, int32_t count)
{
    for (; count >= 4; count -= 4) {
        uint32_t word = load(from);
        __builtin_memcpy(to, &word, 4);
        from += 4;
        to += 4;
    }
    for (; count > 0; count--) {
        *to++ = *from++;
    }
}

/* the first and the end of the taps, of `taps` from `start` on, that lie inside `size` */
static inline int32_t first_tap(int32_t start, int32_t dilation)
{
    return start >= 0 ? 0 : dilation == 1 ? -start : (dilation - 1 - start) / dilation;
}

static inline int32_t end_of_taps(int32_t start, int32_t dilation, int32_t taps, int32_t size)
{
    int32_t room = size - start; /* the last taps of a window may lie behind the input, its first one too */
    int32_t fitting = room <= 0 ? 0 : dilation == 1 ? room : (room + dilation - 1) / dilation;
    return fitting < taps ? fitting : taps;
}

/* a window that reaches into the padding, copied to `to` (4 * COPY_WORDS) */
static __attribute__((noinline)) void copy_window(const planish_dsp_conv2d_layer *l, const int8_t *x, pixel_t p, int8_t *to)
{
    int32_t channels = l->in_channels, i, j;
    int32_t first = first_tap(p.left, l->dilation_width);
    int32_t end = end_of_taps(p.left, l->dilation_width, l->kernel_width, l->in_width);
    int32_t last_row = end_of_taps(p.top, l->dilation_height, KERNEL_HEIGHT, l->in_height);
    uint32_t fill = (uint32_t)(l->x_zero_point & 255) * 0x01010101u;
    for (i = 0; i < COPY_WORDS; i++) {
        planish_store_word(to + 4 * i, fill);
    }
    for (i = first_tap(p.top, l->dilation_height); i < last_row; i++) {
        int32_t row = (p.top + i * l->dilation_height) * l->in_width + p.left;
        int8_t *row_to = to + i * SEGMENTS * SEGMENT;
#if SEGMENTS == 1
        copy(x + (row + first) * channels, row_to + first * channels, (end - first) * channels);
        (void)j;
#else
        for (j = first; j < end; j++) {
            copy(x + (row + j * l->dilation_width) * channels, row_to + j * SEGMENT, SEGMENT);
        }
#endif
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

static inline uint32_t *put(uint32_t *pairs, uint32_t even_a, uint32_t even_b, uint32_t odd_a, uint32_t odd_b)
{
#if defined(__ARM_FEATURE_DSP) && defined(__ARM_FP)
    /* one instruction, which compilers do not find here */
    register uint32_t r2 __asm__("r2") = even_a, r3 __asm__("r3") = even_b, r4 __asm__("r4") = odd_a, r5 __asm__("r5") = odd_b;
    __asm__ volatile("stmia %0!, {%1, %2, %3, %4}" : "+r"(pairs) : "r"(r2), "r"(r3), "r"(r4), "r"(r5) : "memory");
    return pairs;
#else
    pairs[0] = even_a;
    pairs[1] = even_b;
    pairs[2] = odd_a;
    pairs[3] = odd_b;
    return pairs + 4;
#endif
}

static inline void gather(const planish_dsp_conv2d_layer *l, const int8_t *x, pixel_t p, pixel_t q, uint32_t *pairs,
                          int8_t *work)
{
    window_t a = window_of(l, x, p, work), b = window_of(l, x, q, work + 4 * COPY_WORDS);
    int32_t i, j, k;
    for (i = 0; i < KERNEL_HEIGHT; i++) {
        for (j = 0; j < SEGMENTS; j++) {
            const int8_t *from_a = a.first + i * a.row_step + j * a.step, *from_b = b.first + i * b.row_step + j * b.step;
            for (k = 0; k < WORDS; k++) {
                uint32_t one = load(from_a + 4 * k), two = load(from_b + 4 * k);
                pairs = put(pairs, planish_even_bytes(one), planish_even_bytes(two), planish_odd_bytes(one),
                            planish_odd_bytes(two));
            }
        }
    }
    for (k = 0; k < REST * PIECES; k += 4) {
        pairs = put(pairs, planish_low_halves(rest_of(a, k), rest_of(a, k + 2)),
                    planish_low_halves(rest_of(b, k), rest_of(b, k + 2)),
                    planish_low_halves(rest_of(a, k + 1), rest_of(a, k + 3)),
                    planish_low_halves(rest_of(b, k + 1), rest_of(b, k + 3)));
    }
}

static inline void prepare(const planish_dsp_conv2d_layer *l, int8_t *work)
{
    (void)l;
    (void)work;
}

#endif

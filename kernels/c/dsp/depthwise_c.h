/* A row of outputs of dsp/depthwise_conv2d.c for any kernel. */
#ifndef PLANISH_DSP_DEPTHWISE_C_H
#define PLANISH_DSP_DEPTHWISE_C_H

#include "dsp/depthwise_channel.h"

static inline int32_t low(uint32_t halves)
{
    return (int16_t)halves;
}

static inline int32_t high(uint32_t halves)
{
    return (int32_t)halves >> 16;
}

/* taps of a window that begins with the low half of x[0] */
static inline int32_t even_row(const uint32_t *x, const uint32_t *w, int32_t sum)
{
    int32_t k;
    for (k = 0; k + 1 < KERNEL_WIDTH; k += 2) {
        sum = planish_dot(x[k / 2], w[k], sum);
    }
    if (KERNEL_WIDTH % 2) {
        sum += low(x[KERNEL_WIDTH / 2]) * (KERNEL_WIDTH > 1 ? high(w[PAIRS - 1]) : low(w[0]));
    }
    return sum;
}

#if COLUMN_STRIDE == 1
/* ... with the high half */
static inline int32_t odd_row(const uint32_t *x, const uint32_t *w, int32_t sum)
{
    int32_t k;
    sum += high(x[0]) * low(w[0]);
    for (k = 1; k + 1 < KERNEL_WIDTH; k += 2) {
        sum = planish_dot(x[(k + 1) / 2], w[k], sum);
    }
    if (KERNEL_WIDTH % 2 == 0) {
        sum += low(x[KERNEL_WIDTH / 2]) * high(w[PAIRS - 1]);
    }
    return sum;
}
#else
static inline int32_t odd_row(const uint32_t *x, const uint32_t *w, int32_t sum)
{
    return even_row(x + 1, w, sum);
}
#endif

static inline int8_t code_of(const planish_dsp_depthwise_conv2d_layer *l, const channel_t *channel, int32_t sum)
{
    int32_t least = SATURATE == 0 ? -(1 << (Y_BITS - 1)) : SATURATE == 1 ? 0 : l->low;
    int32_t most = SATURATE < 2 ? (1 << (Y_BITS - 1)) - 1 : l->high;
    int32_t code;
    if (channel->factor < 0) {
        union { uint32_t bits; float value; } factor;
        factor.bits = (uint32_t)channel->factor & 0x7FFFFFFFu;
        code = planish_nearest((float)(sum + (int32_t)channel->start_low) * factor.value) + l->y_zero_point;
    } else {
        code = planish_multiply_add_high(sum, channel->factor, channel->start_low, channel->start_high);
    }
    code = code < least ? least : code;
    return (int8_t)(code > most ? most : code);
}

/* One row of outputs of `count` channels; `turn`: bytes from a channel's weights to those that slot 0 meets. */
static PLANISH_APART void convolve(const planish_dsp_depthwise_conv2d_layer *l, const int8_t *rows,
                                   const channel_t *channel, int32_t count, int32_t turn, int8_t *y)
{
    for (; count > 0; count--) {
        const uint32_t *weight = channel->weight + turn / 4;
        const uint32_t *x = (const uint32_t *)(const void *)rows;
        int8_t *out = y++;
        int32_t column, i;
        for (column = l->out_columns; column > 0; column -= 2) {
            int32_t first = 0, second = 0;
            for (i = 0; i < KERNEL_HEIGHT; i++) {
                const uint32_t *row = x + i * (ROW_BYTES / 4);
                first = even_row(row, weight + i * PAIRS, first);
                second = odd_row(row, weight + i * PAIRS, second);
#if defined(__GNUC__)
                /* row by row, while its words are in registers: compilers would rather finish one sum and keep all words */
                __asm__ volatile("" : "+r"(first), "+r"(second));
#endif
            }
            *out = code_of(l, channel, first);
            if (column > 1) {
                out[channel->step] = code_of(l, channel, second);
            }
            x += COLUMN_STRIDE;
            out += 2 * channel->step;
        }
        rows += PLANE;
        channel++;
    }
}

#endif

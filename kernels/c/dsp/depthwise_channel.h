/* A channel in the work memory of dsp/depthwise_conv2d.c, whose constants this file needs. */
#ifndef PLANISH_DSP_DEPTHWISE_CHANNEL_H
#define PLANISH_DSP_DEPTHWISE_CHANNEL_H

#include "dsp/depthwise_conv2d.h"
#include "dsp/halves.h"

#define PLANE_BYTES (KERNEL_HEIGHT * ROW_BYTES)

enum {
    GROUP = 4,                                       /* channels that are worked on together */
    PAIRS = KERNEL_WIDTH > 1 ? KERNEL_WIDTH - 1 : 1, /* words of a kernel row: (w0, w1), (w1, w2), ... */
    TURNS = ROWS_FIRST ? KERNEL_HEIGHT : 2 * KERNEL_HEIGHT - 1,
    PLANE = PLANE_BYTES /* of one channel's rows in the work memory */
};

/* its argument as text, macros expanded */
#define TEXT(...) TEXT_OF(__VA_ARGS__)
#define TEXT_OF(...) #__VA_ARGS__

/* One channel. Its rows lie in a ring, slot = row % KERNEL_HEIGHT; for kernel rows to meet them in order, the weights of the
 * rows follow each other almost twice, and a row of outputs begins among them where its top row's slot says. */
typedef struct {
    uint32_t start_low, start_high; /* what sum * factor is added to, 64 bits; with a float factor: bias, and nothing */
    uint32_t end;                   /* address in slot 0 where the windows of the last whole four outputs end */
    uint32_t rest;                  /* outputs after that, 0 to 3 */
    int32_t zero_point;
    uint32_t rows; /* address of slot 0 */
    int32_t step;  /* between outputs */
    int32_t factor;
    uint32_t weight[TURNS * PAIRS];
} channel_t;

/* one word (a, b) for each of four channels, `step` bytes apart, from the codes of two columns or taps */
static inline void spread(int8_t *to, int32_t step, uint32_t a, uint32_t b)
{
    uint32_t even_a = planish_even_bytes(a), even_b = planish_even_bytes(b);
    uint32_t odd_a = planish_odd_bytes(a), odd_b = planish_odd_bytes(b);
    planish_store_word(to, planish_low_halves(even_a, even_b));
    planish_store_word(to + step, planish_low_halves(odd_a, odd_b));
    planish_store_word(to + 2 * step, planish_high_halves(even_a, even_b));
    planish_store_word(to + 3 * step, planish_high_halves(odd_a, odd_b));
}

#endif

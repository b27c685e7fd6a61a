/* Channels of a depthwise convolution, their rows as words of two pixels (depthwise_conv2d.c). */
#include "armv6m/depthwise_conv2d.h"

/* words of pairs of pixels until `end`, `step` bytes between pixels; a and b are the codes before them */
#if defined(__ARM_ARCH_6M__)
/* r0 before the pixels, r1 step, r2 to, r4 a, r5 and r6 pixels, r7 2 * step, r12 b, lr end */
#define LOOP(name, words)                                                                                              \
    __attribute__((naked, noinline)) static void name(const int8_t *x __attribute__((unused)), int32_t step __attribute__((unused)), \
                                                      int32_t *to __attribute__((unused)), int32_t *end __attribute__((unused)), \
                                                      int32_t a __attribute__((unused)), int32_t b __attribute__((unused))) \
    {                                                                                                                  \
        __asm__(".syntax unified\n"                                                                                    \
                "push {r4, r5, r6, r7, lr}\n ldr r4, [sp, #20]\n ldr r5, [sp, #24]\n mov r12, r5\n mov lr, r3\n"       \
                "subs r0, r0, r1\n adds r7, r1, r1\n"                                                                  \
                "1: ldrsb r5, [r0, r1]\n ldrsb r6, [r0, r7]\n adds r0, r7\n" words "cmp r2, lr\n bne 1b\n"            \
                "pop {r4, r5, r6, r7, pc}\n");                                                                         \
    }
LOOP(pairs_of_neighbours, "lsls r3, r5, #16\n adds r4, r3\n lsls r3, r6, #16\n adds r5, r3\n stmia r2!, {r4, r5}\n mov r4, r6\n")
LOOP(pairs_two_apart, "lsls r3, r5, #16\n adds r3, r4\n lsls r4, r6, #16\n add r4, r12\n stmia r2!, {r3, r4}\n"
                      "mov r12, r6\n mov r4, r5\n")
#else
static void pairs_of_neighbours(const int8_t *x, int32_t step, int32_t *to, int32_t *end, int32_t a, int32_t b)
{
    (void)b;
    for (; to != end; x += step) {
        *to++ = (int32_t)((uint32_t)a + ((uint32_t)*x << 16));
        a = *x;
    }
}

static void pairs_two_apart(const int8_t *x, int32_t step, int32_t *to, int32_t *end, int32_t a, int32_t b)
{
    for (; to != end; x += step) {
        *to++ = (int32_t)((uint32_t)a + ((uint32_t)*x << 16));
        a = b;
        b = *x;
    }
}
#endif

/* what all rows have in common: their words are padding, `even` pixels, perhaps one more, `behind` words that still hold pixels
 * in their lower half, and padding */
typedef struct {
    int32_t step, first, even, odd, behind;
    uint32_t zero, stride;
} row_shape;

/* the words of a row of one channel but those of nothing but padding, which stay the same */
static inline void words_of(const row_shape *r, const int8_t *x, int32_t *to)
{
    uint32_t a = r->zero, b = a;
    int32_t *end;
    to += r->first;
    if (r->even) {
        end = to + r->even;
        (r->stride == 2 ? pairs_two_apart : pairs_of_neighbours)(x, r->step, to, end, (int32_t)a, (int32_t)a);
        to = end;
        x += r->even * r->step;
        b = (uint32_t)x[-r->step];
        a = r->stride == 2 ? (uint32_t)x[-2 * r->step] : b;
    }
    if (r->odd) {
        uint32_t last = (uint32_t)*x;
        *to++ = (int32_t)(a + (last << 16));
        a = r->stride == 2 ? b : last;
        b = last;
    }
    if (r->behind > 0) {
        *to++ = (int32_t)(a + (r->zero << 16));
    }
    if (r->behind > 1) {
        *to = (int32_t)(b + (r->zero << 16));
    }
}

/* the channel's weights as words; whether the products of a row of the kernel always fit 16 bits */
static int weights_of(const planish_armv6m_depthwise_conv2d_layer *l, const uint8_t *from, int32_t *to)
{
    int fit = 1;
    int32_t k, j;
    uint32_t at = 0, above = 32u - (uint32_t)l->weight_bits;
    PLANISH_SMALL_LOOP
    for (k = l->kernel_rows; k > 0; k--) {
        int32_t sum = 0;
        PLANISH_SMALL_LOOP
        for (j = l->kernel_columns; j > 0; j--) {
            int32_t w = (int32_t)((uint32_t)from[at >> 3] >> (at & 7u) << above) >> above;
            at += (uint32_t)l->weight_bits;
            *to++ = w;
            sum += w < 0 ? -w : w;
        }
        fit = fit && sum <= 255;
    }
    return fit;
}

void planish_armv6m_depthwise(const planish_armv6m_depthwise_conv2d_layer *l, const int8_t *x, int8_t *y, int8_t *scratch,
                              planish_depthwise_outputs *whole, planish_depthwise_outputs *parts)
{
    int32_t weight[PLANISH_DEPTHWISE_ROWS * PLANISH_DEPTHWISE_ROWS];
    int32_t kernel = l->kernel_rows, stride = l->row_stride, columns = l->column_stride, in_rows = l->in_rows;
    int32_t in_step = l->in_row_step, out_step = l->out_row_step, end_row = l->out_rows * stride - l->pad_rows;
    int32_t size = ((l->out_columns - 1) >> 1) * 2 * columns + l->kernel_columns;
    int32_t slot_words = size + columns; /* the first pixels are written before the row's words too */
    int32_t *padding = (int32_t *)(void *)scratch, *slots = padding + slot_words + columns;
    int32_t inside = size + columns - l->pad_columns;
    row_shape shape;
    const int32_t *channel = l->channel;
    const uint8_t *packed = l->weight;
    planish_depthwise_row p;
    int32_t c, row, i, k;
    inside = inside < l->in_columns ? inside : l->in_columns;
    inside = inside < 0 ? 0 : inside;
    shape.step = l->in_column_step;
    shape.stride = (uint32_t)columns;
    shape.zero = (uint32_t)l->x_zero_point;
    shape.first = l->pad_columns - columns;
    shape.even = inside & ~1;
    shape.odd = inside & 1;
    shape.behind = size - shape.first - inside;
    shape.behind = shape.behind < columns ? shape.behind : columns;
    PLANISH_SMALL_LOOP
    for (i = 0; i < slot_words * (kernel + 1); i++) {
        padding[i] = (int32_t)((uint32_t)l->x_zero_point * 65537u);
    }
    p.half = l->scale.half;
    p.limit = l->scale.limit;
    p.before = l->scale.before;
    p.low = l->scale.low;
    p.high = l->scale.high;
    p.scale = &l->scale;
    p.window = l->scale.window;
    p.end = (l->out_columns >> 1) * 8 * l->column_stride;
    p.odd = l->out_columns & 1;
    p.weight = weight;
    p.y_step = l->out_column_step;
    p.fill = 0;
    for (k = 0; k < PLANISH_DEPTHWISE_ROWS; k++) {
        p.rows[k] = padding;
    }
    PLANISH_SMALL_LOOP
    for (c = 0; c < l->channels; c++) {
        planish_depthwise_outputs *outputs = weights_of(l, packed, weight) ? whole : parts;
        int32_t slot = 0, known = 0; /* the kernel's first rows that are in scratch already */
        const int8_t *next = x + c - l->pad_rows * in_step;
        packed += (kernel * l->kernel_columns * l->weight_bits + 7) >> 3;
        p.bias = *channel++;
        p.word = (uint32_t)*channel++;
        p.y = y + c;
        PLANISH_SMALL_LOOP
        for (row = -l->pad_rows; row < end_row; row += stride) {
            const int8_t *in = next;
            for (k = 0; k < known; k++) {
                p.rows[k] = p.rows[k + stride];
                in += in_step;
            }
            PLANISH_SMALL_LOOP
            for (; k < kernel; k++) {
                p.rows[k] = padding;
                if ((uint32_t)(row + k) < (uint32_t)in_rows) {
                    int32_t *to = slots + slot * slot_words;
                    words_of(&shape, in, to);
                    p.rows[k] = to;
                    slot = slot + 1 == kernel ? 0 : slot + 1;
                }
                in += in_step;
            }
            known = kernel > stride ? kernel - stride : 0;
            next += stride * in_step;
            outputs(&p);
            p.y += out_step;
        }
    }
}

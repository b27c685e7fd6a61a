/* Channels of a depthwise convolution, their rows as words of two pixels (depthwise_conv2d.c). */
#include "armv6m/depthwise_conv2d.h"

/* the words of a row of one channel, `size` of them; as many as the column stride before them are written too */
static void words_of(const planish_armv6m_depthwise_conv2d_layer *l, const int8_t *x, int32_t *to, int32_t size)
{
    int32_t step = l->in_column_step, two = l->column_stride == 2, left = l->pad_columns, zero = l->x_zero_point;
    int32_t inside = size + l->column_stride - left;
    const int32_t *end = to + size;
    uint32_t a = (uint32_t)zero, b = a, upper = a << 16;
    to -= l->column_stride;
    inside = inside < l->in_columns ? inside : l->in_columns;
    PLANISH_SMALL_LOOP
    for (; left > 0; left--) {
        *to++ = (int32_t)(a + upper);
    }
    PLANISH_SMALL_LOOP
    for (; inside >= 2; inside -= 2) {
        uint32_t first = (uint32_t)x[0], second = (uint32_t)x[step];
        x += 2 * step;
        to[0] = (int32_t)(a + (first << 16));
        if (two) {
            to[1] = (int32_t)(b + (second << 16));
            a = first;
            b = second;
        } else {
            to[1] = (int32_t)(first + (second << 16));
            a = second;
        }
        to += 2;
    }
    b = two ? b : (uint32_t)zero;
    if (inside > 0) {
        uint32_t last = (uint32_t)*x;
        *to++ = (int32_t)(a + (last << 16));
        a = two ? b : last;
        b = two ? last : b;
    }
    PLANISH_SMALL_LOOP
    while (to < end) {
        *to++ = (int32_t)(a + upper);
        a = b;
        b = (uint32_t)zero;
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
    int32_t kernel = l->kernel_rows, stride = l->row_stride;
    int32_t size = ((l->out_columns - 1) >> 1) * 2 * l->column_stride + l->kernel_columns;
    int32_t slot_words = size + l->column_stride;
    int32_t *padding = (int32_t *)(void *)scratch, *slots = padding + slot_words + l->column_stride;
    const int32_t *channel = l->channel;
    const uint8_t *packed = l->weight;
    planish_depthwise_row p;
    int32_t c, row, i, k;
    PLANISH_SMALL_LOOP
    for (i = 0; i < size; i++) {
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
        const int8_t *next = x + c - l->pad_rows * l->in_row_step;
        packed += (kernel * l->kernel_columns * l->weight_bits + 7) >> 3;
        p.bias = *channel++;
        p.word = (uint32_t)*channel++;
        p.y = y + c;
        PLANISH_SMALL_LOOP
        for (row = -l->pad_rows; row < l->out_rows * stride - l->pad_rows; row += stride) {
            PLANISH_SMALL_LOOP
            for (k = 0; k < kernel; k++) {
                if (k < known) {
                    p.rows[k] = p.rows[k + stride];
                } else if ((uint32_t)(row + k) >= (uint32_t)l->in_rows) {
                    p.rows[k] = padding;
                } else {
                    int32_t *to = slots + slot * slot_words;
                    words_of(l, next + k * l->in_row_step, to, size);
                    p.rows[k] = to;
                    slot = slot + 1 == kernel ? 0 : slot + 1;
                }
            }
            known = kernel > stride ? kernel - stride : 0;
            next += stride * l->in_row_step;
            outputs(&p);
            p.y += l->out_row_step;
        }
    }
}

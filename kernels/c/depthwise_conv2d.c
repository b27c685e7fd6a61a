/* Depthwise convolution: output channel c * multiplier + j reads input channel c. Channels are innermost, four at a time. */
#include "planish.h"

enum { BLOCK = 4 };

/* the taps of one output pixel that lie inside the image */
typedef struct {
    int32_t top, left, row_begin, row_end, column_begin, column_end;
} taps_t;

static taps_t taps_of(const planish_depthwise_conv2d_layer *l, int32_t row, int32_t column)
{
    taps_t t;
    t.top = row * l->stride_height - l->pad_top;
    t.left = column * l->stride_width - l->pad_left;
    t.row_begin = 0;
    t.column_begin = 0;
    while (t.row_begin < l->kernel_height && t.top + t.row_begin * l->dilation_height < 0) {
        t.row_begin++;
    }
    while (t.column_begin < l->kernel_width && t.left + t.column_begin * l->dilation_width < 0) {
        t.column_begin++;
    }
    t.row_end = l->kernel_height;
    t.column_end = l->kernel_width;
    while (t.row_end > t.row_begin && t.top + (t.row_end - 1) * l->dilation_height >= l->in_height) {
        t.row_end--;
    }
    while (t.column_end > t.column_begin && t.left + (t.column_end - 1) * l->dilation_width >= l->in_width) {
        t.column_end--;
    }
    if (t.column_begin == t.column_end) {
        t.row_end = t.row_begin; /* no tap at all: no row either */
    }
    return t;
}

/* sum += (x - x_zero_point) * weight for output channels o .. o + BLOCK - 1; multiplier 1 */
static inline void block(const planish_depthwise_conv2d_layer *l, const int8_t *x, const taps_t *t, int32_t o,
                         int32_t x_zero_point, int32_t *sum)
{
    int32_t channels = l->in_channels;
    int32_t x_step = l->dilation_width * channels;
    int32_t sum0 = sum[0], sum1 = sum[1], sum2 = sum[2], sum3 = sum[3];
    int32_t i, j;
    for (i = t->row_begin; i < t->row_end; i++) {
        int32_t row = t->top + i * l->dilation_height;
        int32_t column = t->left + t->column_begin * l->dilation_width;
        const int8_t *source = x + (row * l->in_width + column) * channels + o;
        const int8_t *weight = l->weight + (i * l->kernel_width + t->column_begin) * channels + o;
        for (j = t->column_end - t->column_begin; j > 0; j--) {
            sum0 += (source[0] - x_zero_point) * weight[0];
            sum1 += (source[1] - x_zero_point) * weight[1];
            sum2 += (source[2] - x_zero_point) * weight[2];
            sum3 += (source[3] - x_zero_point) * weight[3];
            source += x_step;
            weight += channels;
        }
    }
    sum[0] = sum0;
    sum[1] = sum1;
    sum[2] = sum2;
    sum[3] = sum3;
}

/* the same for one output channel, any multiplier, weight zero point and width of the codes */
static int32_t single(const planish_depthwise_conv2d_layer *l, const int8_t *x, const taps_t *t, int32_t o)
{
    int32_t channel = o / l->multiplier;
    int32_t outputs = l->in_channels * l->multiplier;
    int32_t weight_zero_point = l->weight_zero_point ? l->weight_zero_point[o] : 0;
    int32_t sum = l->bias[o];
    int32_t i, j;
    for (i = t->row_begin; i < t->row_end; i++) {
        int32_t row = t->top + i * l->dilation_height;
        for (j = t->column_begin; j < t->column_end; j++) {
            int32_t column = t->left + j * l->dilation_width;
            int32_t at = (row * l->in_width + column) * l->in_channels + channel;
            int32_t code = l->x_bits < 8 ? planish_unpack(x, at, l->x_bits) : x[at];
            int32_t weight = l->weight[(i * l->kernel_width + j) * outputs + o];
            sum += (code - l->x_zero_point) * (weight - weight_zero_point);
        }
    }
    return sum;
}

void planish_depthwise_conv2d(const planish_depthwise_conv2d_layer *l, const int8_t *x, int8_t *y)
{
    int32_t outputs = l->in_channels * l->multiplier;
    int32_t blocked = l->multiplier == 1 && !l->weight_zero_point && l->x_bits == 8 && l->y_bits == 8 ? outputs / BLOCK * BLOCK : 0;
    float low = (float)(l->low - l->y_zero_point);
    float high = (float)(l->high - l->y_zero_point);
    int32_t row, column, o, c;

    for (row = 0; row < l->out_height; row++) {
        for (column = 0; column < l->out_width; column++) {
            taps_t t = taps_of(l, row, column);
            int whole = t.row_begin == 0 && t.column_begin == 0 && t.row_end == l->kernel_height
                        && t.column_end == l->kernel_width;
            for (o = 0; o < blocked; o += BLOCK) {
                const int32_t *bias = (whole ? l->folded_bias : l->bias) + o;
                int32_t sum[BLOCK];
                for (c = 0; c < BLOCK; c++) {
                    sum[c] = bias[c];
                }
                if (whole) {
                    block(l, x, &t, o, 0, sum);
                } else {
                    block(l, x, &t, o, l->x_zero_point, sum);
                }
                for (c = 0; c < BLOCK; c++) {
                    y[o + c] = planish_requantize(sum[c], l->rescale[o + c], low, high, l->y_zero_point);
                }
            }
            for (; o < outputs; o++) {
                int8_t code = planish_requantize(single(l, x, &t, o), l->rescale[o], low, high, l->y_zero_point);
                if (l->y_bits < 8) {
                    planish_pack(y, (row * l->out_width + column) * outputs + o, l->y_bits, code);
                } else {
                    y[o] = code;
                }
            }
            if (l->y_bits == 8) {
                y += outputs;
            }
        }
    }
}

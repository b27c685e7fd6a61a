/* Two-dimensional convolution, dense or in groups.
 *
 * Two pixels are computed at a time: the window of each is one row of memory (gathered into scratch, padding filled with
 * the zero point), and two rows of weights meet two windows, so that every code loaded is used twice.
 */
#include "planish.h"

static void gather(const planish_conv2d_layer *l, const int8_t *x, int32_t group, int32_t pixel, int32_t depth,
                   int8_t *window)
{
    int32_t top = pixel / l->out_width * l->stride_height - l->pad_top;
    int32_t left = pixel % l->out_width * l->stride_width - l->pad_left;
    int8_t zero_point = (int8_t)l->x_zero_point;
    int32_t i, j, c;
    for (i = 0; i < l->kernel_height; i++) {
        int32_t row = top + i * l->dilation_height;
        for (j = 0; j < l->kernel_width; j++) {
            int32_t column = left + j * l->dilation_width;
            if (row >= 0 && row < l->in_height && column >= 0 && column < l->in_width) {
                int32_t first = (row * l->in_width + column) * l->in_channels + group * depth;
                if (l->x_bits < 8) {
                    for (c = 0; c < depth; c++) {
                        window[c] = (int8_t)planish_unpack(x, first + c, l->x_bits);
                    }
                } else {
                    for (c = 0; c < depth; c++) {
                        window[c] = x[first + c];
                    }
                }
            } else {
                for (c = 0; c < depth; c++) {
                    window[c] = zero_point;
                }
            }
            window += depth;
        }
    }
}

/* without scratch a window is the pixel itself: a 1 x 1 kernel without padding */
static inline const int8_t *window_of(const planish_conv2d_layer *l, const int8_t *x, int32_t group, int32_t pixel,
                                      int32_t depth, int8_t *scratch)
{
    if (scratch) {
        gather(l, x, group, pixel, depth, scratch);
        return scratch;
    }
    return x + group * depth + (pixel / l->out_width * l->stride_height * l->in_width + pixel % l->out_width * l->stride_width)
                   * l->in_channels;
}

static inline void store(const planish_conv2d_layer *l, int8_t *y, int32_t pixel, int32_t o, int8_t code)
{
    if (l->y_bits < 8) {
        planish_pack(y, pixel * l->out_channels + o, l->y_bits, code);
    } else {
        y[pixel * l->out_channels + o] = code;
    }
}

static int32_t sum_of(const int8_t *window, int32_t size)
{
    int32_t total = 0, k;
    for (k = 0; k < size; k++) {
        total += window[k];
    }
    return total;
}

static inline void convolve(const planish_conv2d_layer *l, const int8_t *x, int8_t *y, int8_t *scratch)
{
    int32_t depth = l->in_channels / l->groups;
    int32_t outputs = l->out_channels / l->groups;
    int32_t size = l->kernel_height * l->kernel_width * depth;
    int32_t pixels = l->out_height * l->out_width;
    float low = (float)(l->low - l->y_zero_point);
    float high = (float)(l->high - l->y_zero_point);
    int32_t group, pixel, o, k;

    for (group = 0; group < l->groups; group++) {
        for (pixel = 0; pixel < pixels; pixel += 2) {
            /* an odd pixel or output at the end is computed twice */
            int32_t second = pixel + 1 < pixels ? pixel + 1 : pixel;
            const int8_t *a = window_of(l, x, group, pixel, depth, scratch);
            const int8_t *b = second == pixel ? a : window_of(l, x, group, second, depth, scratch ? scratch + size : scratch);
            int32_t sum_a = l->weight_zero_point ? sum_of(a, size) : 0;
            int32_t sum_b = l->weight_zero_point ? sum_of(b, size) : 0;
            for (o = group * outputs; o < (group + 1) * outputs; o += 2) {
                int32_t next = o + 1 < (group + 1) * outputs ? o + 1 : o;
                const int8_t *v = l->weight + o * size;
                const int8_t *w = l->weight + next * size;
                int32_t av = l->bias[o], bv = l->bias[o], aw = l->bias[next], bw = l->bias[next];
                for (k = 0; k < size; k++) {
                    av += a[k] * v[k];
                    aw += a[k] * w[k];
                    bv += b[k] * v[k];
                    bw += b[k] * w[k];
                }
                if (l->weight_zero_point) {
                    av -= l->weight_zero_point[o] * sum_a;
                    bv -= l->weight_zero_point[o] * sum_b;
                    aw -= l->weight_zero_point[next] * sum_a;
                    bw -= l->weight_zero_point[next] * sum_b;
                }
                store(l, y, pixel, o, planish_requantize(av, l->rescale[o], low, high, l->y_zero_point));
                store(l, y, pixel, next, planish_requantize(aw, l->rescale[next], low, high, l->y_zero_point));
                store(l, y, second, o, planish_requantize(bv, l->rescale[o], low, high, l->y_zero_point));
                store(l, y, second, next, planish_requantize(bw, l->rescale[next], low, high, l->y_zero_point));
            }
        }
    }
}

void planish_conv2d(const planish_conv2d_layer *layer, const int8_t *x, int8_t *y, int8_t *scratch)
{
    convolve(layer, x, y, scratch);
}

void planish_pointwise_conv2d(const planish_pointwise_conv2d_layer *layer, const int8_t *x, int8_t *y)
{
    convolve(layer, x, y, 0);
}

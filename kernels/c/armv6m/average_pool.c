/* Mean over a window: an integer sum and one product, and where the code is in doubt the formula of planish_average_pool. */
#include "armv6m/average_pool.h"

/* the taps of a window that lie inside the image, along one axis */
typedef struct {
    int32_t position, count; /* of the first tap, and how many */
} taps_t;

static taps_t taps_of(int32_t position, int32_t taps, int32_t dilation, int32_t size)
{
    taps_t t = {position, 0};
    for (; taps > 0 && t.position < 0; taps--) {
        t.position += dilation;
    }
    for (position = t.position; taps > 0 && position < size; taps--) {
        position += dilation;
        t.count++;
    }
    return t;
}

/* the formula: every operation rounds to float */
static int32_t in_full(const planish_average_pool_layer *l, const int8_t *x, taps_t rows, taps_t columns, int32_t count)
{
    int32_t row_step = l->dilation_height * l->in_width * l->channels, column_step = l->dilation_width * l->channels, i, j;
    float sum = 0.0f;
    for (i = 0; i < rows.count; i++) {
        for (j = 0; j < columns.count; j++) {
            sum += l->x_scale * (float)(x[i * row_step + j * column_step] - l->x_zero_point);
        }
    }
    sum = sum / (float)count;
    sum = sum / l->y_scale;
    sum += (float)(l->y_zero_point + 128);
    return planish_round(planish_clamp(sum, (float)(l->low + 128), (float)(l->high + 128))) - 128;
}

void planish_armv6m_average_pool(const planish_armv6m_average_pool_layer *layer, const int8_t *x, int8_t *y)
{
    const planish_average_pool_layer *l = &layer->formula;
    int32_t row_step = l->dilation_height * l->in_width * l->channels, column_step = l->dilation_width * l->channels;
    int32_t row, column, channel, i, j;
    for (row = 0; row < l->out_height; row++) {
        taps_t rows = taps_of(row * l->stride_height - l->pad_top, l->kernel_height, l->dilation_height, l->in_height);
        for (column = 0; column < l->out_width; column++) {
            taps_t columns = taps_of(column * l->stride_width - l->pad_left, l->kernel_width, l->dilation_width, l->in_width);
            const int8_t *window = x + (rows.position * l->in_width + columns.position) * l->channels;
            int32_t taps = rows.count * columns.count;
            int32_t count = l->include_pad ? l->kernel_height * l->kernel_width : taps;
            uint32_t word = layer->words[count];
            PLANISH_SMALL_LOOP
            for (channel = 0; channel < l->channels; channel++) {
                const int8_t *line = window + channel;
                int32_t sum = -taps * l->x_zero_point, code;
                PLANISH_SMALL_LOOP
                for (i = rows.count; i > 0; i--) {
                    const int8_t *tap = line;
                    PLANISH_SMALL_LOOP
                    for (j = columns.count; j > 0; j--) {
                        sum += *tap;
                        tap += column_step;
                    }
                    line += row_step;
                }
                code = planish_quick_code(sum, word, &layer->scale);
                if (code == PLANISH_IN_DOUBT) {
                    code = in_full(l, window + channel, rows, columns, count);
                }
                *y++ = (int8_t)code;
            }
        }
    }
}

/* Mean over a window, in real values: each is rounded to float, and they are added row by row. Four channels at a time. */
#include "dsp/halves.h"
#include "dsp/pools.h"

static inline int8_t code_of(float sum, float count, float y_scale, float zero, int32_t low, int32_t high)
{
    int32_t code;
    sum = sum / count;
    sum = sum / y_scale;
    code = planish_nearest(sum + zero) - 128;
    code = code < low ? low : code;
    return (int8_t)(code > high ? high : code);
}

void planish_dsp_average_pool(const planish_dsp_average_pool_layer *l, const int8_t *x, int8_t *y)
{
    int32_t row_step = l->dilation_height * l->in_width * l->channels, column_step = l->dilation_width * l->channels;
    /* copies: y might lie over the layer, for all that the compiler knows */
    int32_t zero = l->x_zero_point, channels = l->channels, low = l->low, high = l->high;
    uint32_t zeros = 0x10001u * (uint16_t)-zero;
    float scale = l->x_scale, y_scale = l->y_scale, y_zero = (float)(l->y_zero_point + 128);
    int32_t row, column, channel, i, j;
    for (row = 0; row < l->out_height; row++) {
        planish_taps rows = planish_taps_of(row * l->stride_height - l->pad_top, l->kernel_height, l->dilation_height,
                                            l->in_height);
        for (column = 0; column < l->out_width; column++) {
            planish_taps columns = planish_taps_of(column * l->stride_width - l->pad_left, l->kernel_width,
                                                   l->dilation_width, l->in_width);
            const int8_t *window = x + (rows.position * l->in_width + columns.position) * channels;
            int32_t taps = (rows.end - rows.first) * (columns.end - columns.first);
            float count = (float)(l->include_pad ? l->kernel_height * l->kernel_width : taps);
            channel = 0;
            if (channels % 4 == 0) {
                PLANISH_ROLLED
                for (; channel < channels; channel += 4) {
                    const int8_t *line = window + channel;
                    float sum0 = 0.0f, sum1 = 0.0f, sum2 = 0.0f, sum3 = 0.0f;
                    PLANISH_ROLLED
                    for (i = rows.first; i < rows.end; i++) {
                        const int8_t *tap = line;
                        PLANISH_ROLLED
                        for (j = columns.first; j < columns.end; j++) {
                            uint32_t word = planish_load_word(tap);
                            uint32_t even = planish_add_even_bytes(zeros, word), odd = planish_add_odd_bytes(zeros, word);
                            sum0 += scale * (float)(int16_t)even;
                            sum1 += scale * (float)(int16_t)odd;
                            sum2 += scale * (float)((int32_t)even >> 16);
                            sum3 += scale * (float)((int32_t)odd >> 16);
                            tap += column_step;
                        }
                        line += row_step;
                    }
                    y[channel] = code_of(sum0, count, y_scale, y_zero, low, high);
                    y[channel + 1] = code_of(sum1, count, y_scale, y_zero, low, high);
                    y[channel + 2] = code_of(sum2, count, y_scale, y_zero, low, high);
                    y[channel + 3] = code_of(sum3, count, y_scale, y_zero, low, high);
                }
            }
            PLANISH_ROLLED
            for (; channel < channels; channel++) {
                const int8_t *line = window + channel;
                float sum = 0.0f;
                PLANISH_ROLLED
                for (i = rows.first; i < rows.end; i++) {
                    const int8_t *tap = line;
                    PLANISH_ROLLED
                    for (j = columns.first; j < columns.end; j++) {
                        sum += scale * (float)(*tap - zero);
                        tap += column_step;
                    }
                    line += row_step;
                }
                y[channel] = code_of(sum, count, y_scale, y_zero, low, high);
            }
            y += channels;
        }
    }
}

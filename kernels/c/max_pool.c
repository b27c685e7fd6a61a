/* Largest code of a window; padding never wins. */
#include "planish.h"

void planish_max_pool(const planish_max_pool_layer *l, const int8_t *x, int8_t *y)
{
    int32_t row, column, channel, i, j;
    for (row = 0; row < l->out_height; row++) {
        for (column = 0; column < l->out_width; column++) {
            int32_t top = row * l->stride_height - l->pad_top;
            int32_t left = column * l->stride_width - l->pad_left;
            for (channel = 0; channel < l->channels; channel++) {
                y[channel] = -128;
            }
            for (i = 0; i < l->kernel_height; i++) {
                int32_t in_row = top + i * l->dilation_height;
                if (in_row < 0 || in_row >= l->in_height) {
                    continue;
                }
                for (j = 0; j < l->kernel_width; j++) {
                    int32_t in_column = left + j * l->dilation_width;
                    const int8_t *source;
                    if (in_column < 0 || in_column >= l->in_width) {
                        continue;
                    }
                    source = x + (in_row * l->in_width + in_column) * l->channels;
                    for (channel = 0; channel < l->channels; channel++) {
                        y[channel] = source[channel] > y[channel] ? source[channel] : y[channel];
                    }
                }
            }
            if (l->table) {
                for (channel = 0; channel < l->channels; channel++) {
                    y[channel] = planish_look_up(l->table, y[channel]);
                }
            }
            y += l->channels;
        }
    }
}

/* Mean over a window, in real values: each is rounded to float, and they are added row by row. */
#include "planish.h"

void planish_average_pool(const planish_average_pool_layer *l, const int8_t *x, int8_t *y)
{
    float low = (float)(l->low + 128), high = (float)(l->high + 128);
    float zero = (float)(l->y_zero_point + 128);
    int32_t row, column, channel, i, j;
    for (row = 0; row < l->out_height; row++) {
        for (column = 0; column < l->out_width; column++) {
            int32_t top = row * l->stride_height - l->pad_top;
            int32_t left = column * l->stride_width - l->pad_left;
            for (channel = 0; channel < l->channels; channel++) {
                float sum = 0.0f;
                int32_t count = 0;
                for (i = 0; i < l->kernel_height; i++) {
                    int32_t in_row = top + i * l->dilation_height;
                    if (in_row < 0 || in_row >= l->in_height) {
                        continue;
                    }
                    for (j = 0; j < l->kernel_width; j++) {
                        int32_t in_column = left + j * l->dilation_width;
                        if (in_column < 0 || in_column >= l->in_width) {
                            continue;
                        }
                        sum += l->x_scale
                               * (float)(x[(in_row * l->in_width + in_column) * l->channels + channel] - l->x_zero_point);
                        count++;
                    }
                }
                if (l->include_pad) {
                    count = l->kernel_height * l->kernel_width;
                }
                sum = sum / (float)count;
                sum = sum / l->y_scale;
                *y++ = (int8_t)(planish_round(planish_clamp(sum + zero, low, high)) - 128);
            }
        }
    }
}

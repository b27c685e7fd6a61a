/* Mean of each channel over all pixels. */
#include "planish.h"

void planish_global_average_pool(const planish_global_average_pool_layer *l, const int8_t *x, int8_t *y)
{
    float low = (float)(l->low - l->y_zero_point);
    float high = (float)(l->high - l->y_zero_point);
    int32_t channel, pixel;
    for (channel = 0; channel < l->channels; channel++) {
        int32_t sum = -l->x_zero_point * l->pixels;
        for (pixel = 0; pixel < l->pixels; pixel++) {
            sum += x[pixel * l->channels + channel];
        }
        y[channel] = planish_requantize(sum, l->rescale, low, high, l->y_zero_point);
    }
}

/* The same codes, in ONNX order (channel by channel), under another shape. */
#include "planish.h"

void planish_reshape(const planish_reshape_layer *l, const int8_t *x, int8_t *y)
{
    int32_t in_channel = 0, in_pixel = 0, out_channel, out_pixel;
    for (out_channel = 0; out_channel < l->out_channels; out_channel++) {
        for (out_pixel = 0; out_pixel < l->out_pixels; out_pixel++) {
            int8_t code = x[in_pixel * l->in_channels + in_channel];
            y[out_pixel * l->out_channels + out_channel] = planish_look_up(l->table, code);
            in_pixel++;
            if (in_pixel == l->in_pixels) {
                in_pixel = 0;
                in_channel++;
            }
        }
    }
}

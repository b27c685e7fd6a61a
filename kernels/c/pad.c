/* Constant padding: the output is filled, then the input's box is copied into it. */
#include "planish.h"

enum { MOST = 6 };

void planish_pad(const planish_pad_layer *l, const int8_t *x, int8_t *y)
{
    int32_t index[MOST] = {0, 0, 0, 0, 0, 0};
    int32_t last = l->dimensions - 1;
    int32_t source = l->x_offset, target = l->y_offset;
    int32_t width = l->sizes[last], size = l->size;
    int8_t value = (int8_t)l->value;
    int32_t d, i;
    for (i = 0; i < size; i++) {
        y[i] = value;
    }
    for (;;) {
        planish_copy(l->table, x + source, y + target, width);
        for (d = last - 1; d >= 0; d--) {
            index[d]++;
            source += l->x_strides[d];
            target += l->y_strides[d];
            if (index[d] < l->sizes[d]) {
                break;
            }
            source -= index[d] * l->x_strides[d];
            target -= index[d] * l->y_strides[d];
            index[d] = 0;
        }
        if (d < 0) {
            return;
        }
    }
}

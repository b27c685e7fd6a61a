/* Fully connected layer on every row of the input. Four outputs at a time share the loaded inputs. */
#include "planish.h"

enum { BLOCK = 4 };

static inline void store(const planish_fully_connected_layer *l, int8_t *y, int32_t at, int8_t code)
{
    if (l->y_bits < 8) {
        planish_pack(y, at, l->y_bits, code);
    } else {
        y[at] = code;
    }
}

static inline void multiply(const planish_fully_connected_layer *l, const int8_t *x, int8_t *y, int8_t *scratch)
{
    int32_t size = l->in_features;
    float low = (float)(l->low - l->y_zero_point);
    float high = (float)(l->high - l->y_zero_point);
    int32_t row, o, i, k;

    for (row = 0; row < l->rows; row++) {
        const int8_t *codes = scratch ? scratch : x + row * size;
        int32_t total = 0;
        if (scratch) {
            for (k = 0; k < size; k++) {
                scratch[k] = (int8_t)planish_unpack(x, row * size + k, l->x_bits);
            }
        }
        if (l->weight_zero_point) {
            for (k = 0; k < size; k++) {
                total += codes[k];
            }
        }
        for (o = 0; o < l->out_features; o += BLOCK) {
            const int8_t *weight = l->weight + o * size;
            int32_t count = l->out_features - o < BLOCK ? l->out_features - o : BLOCK;
            int32_t sum[BLOCK] = {0, 0, 0, 0};
            if (count == BLOCK) {
                int32_t sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
                for (k = 0; k < size; k++) {
                    sum0 += codes[k] * weight[k];
                    sum1 += codes[k] * weight[size + k];
                    sum2 += codes[k] * weight[2 * size + k];
                    sum3 += codes[k] * weight[3 * size + k];
                }
                sum[0] = sum0;
                sum[1] = sum1;
                sum[2] = sum2;
                sum[3] = sum3;
            } else {
                for (i = 0; i < count; i++) {
                    for (k = 0; k < size; k++) {
                        sum[i] += codes[k] * weight[i * size + k];
                    }
                }
            }
            for (i = 0; i < count; i++) {
                int32_t whole = sum[i] + l->bias[o + i];
                if (l->weight_zero_point) {
                    whole -= l->weight_zero_point[o + i] * total;
                }
                store(l, y, row * l->out_features + o + i, planish_requantize(whole, l->rescale[o + i], low, high, l->y_zero_point));
            }
        }
    }
}

void planish_fully_connected(const planish_fully_connected_layer *layer, const int8_t *x, int8_t *y)
{
    multiply(layer, x, y, 0);
}

void planish_fully_connected_packed(const planish_fully_connected_packed_layer *layer, const int8_t *x, int8_t *y,
                                    int8_t *scratch)
{
    multiply(layer, x, y, scratch);
}

/* Fully connected layer on every row of the input. Four outputs at a time share the loaded inputs. */
#include "planish.h"

enum { BLOCK = 4 };

void planish_fully_connected(const planish_fully_connected_layer *l, const int8_t *x, int8_t *y)
{
    int32_t size = l->in_features;
    float low = (float)(l->low - l->y_zero_point);
    float high = (float)(l->high - l->y_zero_point);
    int32_t row, o, i, k;

    for (row = 0; row < l->rows; row++) {
        int32_t total = 0;
        if (l->weight_zero_point) {
            for (k = 0; k < size; k++) {
                total += x[k];
            }
        }
        for (o = 0; o < l->out_features; o += BLOCK) {
            const int8_t *weight = l->weight + o * size;
            int32_t count = l->out_features - o < BLOCK ? l->out_features - o : BLOCK;
            int32_t sum[BLOCK] = {0, 0, 0, 0};
            if (count == BLOCK) {
                int32_t sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
                for (k = 0; k < size; k++) {
                    sum0 += x[k] * weight[k];
                    sum1 += x[k] * weight[size + k];
                    sum2 += x[k] * weight[2 * size + k];
                    sum3 += x[k] * weight[3 * size + k];
                }
                sum[0] = sum0;
                sum[1] = sum1;
                sum[2] = sum2;
                sum[3] = sum3;
            } else {
                for (i = 0; i < count; i++) {
                    for (k = 0; k < size; k++) {
                        sum[i] += x[k] * weight[i * size + k];
                    }
                }
            }
            for (i = 0; i < count; i++) {
                int32_t whole = sum[i] + l->bias[o + i];
                if (l->weight_zero_point) {
                    whole -= l->weight_zero_point[o + i] * total;
                }
                y[o + i] = planish_requantize(whole, l->rescale[o + i], low, high, l->y_zero_point);
            }
        }
        x += size;
        y += l->out_features;
    }
}

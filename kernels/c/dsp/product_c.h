/* The products of product.h in plain C, from the same packed weights: for compilers without the DSP extension. */
#ifndef PLANISH_DSP_PRODUCT_C_H
#define PLANISH_DSP_PRODUCT_C_H

#include "dsp/product.h"
#include "planish.h"

static inline int32_t planish_half(uint32_t word, int32_t high)
{
    return (int32_t)(int16_t)(uint16_t)(high ? word >> 16 : word);
}

/* weight of output 0-3 at depth 0-3 of a unit, the unit's words given */
static inline int32_t planish_unpack(const uint32_t *unit, int32_t output, int32_t depth, int32_t bits)
{
    int32_t high = depth >> 1, step = depth & 1, h, field;
    if (bits == 8) {
        h = planish_half(unit[2 * step + (output >> 1)], high);
        field = (int32_t)(int8_t)(uint8_t)(uint32_t)h;
        return output & 1 ? field : (h - field) / 256;
    }
    if (bits == 4) {
        h = planish_half(unit[step], high);
        field = (int32_t)((uint32_t)h >> (12 - 4 * output)) & 15;
        return output ? field - 8 : field - 2 * (field & 8);
    }
    h = (int32_t)(unit[0] >> (8 * depth)) & 255;
    field = (h >> (6 - 2 * output)) & 3;
    return output ? field - 2 : field - 2 * (field & 2);
}

static inline void planish_product_c(const planish_product *product, const uint32_t *pairs, int32_t columns, int8_t *y,
                                     int32_t second, int32_t bits)
{
    static const int32_t scale[3][4] = {{64, 16, 4, 1}, {4096, 256, 16, 1}, {256, 1, 256, 1}};
    const int32_t *power = scale[bits >> 2];
    const uint32_t *stream = product->weight;
    int32_t words = bits >> 1; /* of a unit */
    int32_t zero_point = (int32_t)(product->zero_points & 0xFFFFu) - 128;
    int32_t group, column, output, unit, depth;
    for (group = 0; group < product->groups; group++) {
        const uint32_t *weight = stream + 4;
        union { uint32_t word; float value; } factor;
        stream = weight + words * product->units + 4;
        for (column = 0; column < columns; column++) {
            for (output = 0; output < 4; output++) {
                int alone = output == 3 || (bits == 8 && output == 1);
                uint32_t total = weight[output - 4] - (alone ? 0u : weight[output - 3]); /* power times the bias */
                for (unit = 0; unit < product->units; unit++) {
                    for (depth = 0; depth < 4; depth++) {
                        int32_t w = planish_unpack(weight + words * unit, output, depth, bits);
                        int32_t x = planish_half(pairs[columns * (2 * unit + (depth & 1)) + column], depth >> 1);
                        total += (uint32_t)(w * x * power[output]);
                    }
                }
                factor.word = stream[output - 4];
                y[column * second + 4 * group + output] = planish_requantize(
                    (int32_t)total, factor.value, (float)(-128 - zero_point), (float)(127 - zero_point), zero_point);
            }
        }
    }
}

#endif

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

/* the code of one output for the unit's words at weight: x(unit, depth) is at pairs or, without them, at codes */
static inline int8_t planish_product_code(const planish_product *product, const uint32_t *weight, int32_t output, int32_t bits,
                                          const uint32_t *pairs, const int8_t *codes)
{
    static const int32_t powers[3][4] = {{64, 16, 4, 1}, {4096, 256, 16, 1}, {256, 1, 256, 1}};
    int32_t power = powers[bits >> 2][output], words = bits >> 1 /* of a unit */, unit, depth;
    int32_t zero_point = (int32_t)(product->zero_points & 0xFFFFu) - 128;
    int alone = power == 1;
    uint32_t total = weight[output - 4] - (alone ? 0u : weight[output - 3]); /* power times the bias */
    union { uint32_t word; float value; } factor;
    for (unit = 0; unit < product->units; unit++) {
        for (depth = 0; depth < 4; depth++) {
            int32_t w = planish_unpack(weight + words * unit, output, depth, bits);
            int32_t x = pairs ? planish_half(pairs[4 * unit + 2 * (depth & 1)], depth >> 1) : codes[4 * unit + depth];
            total += (uint32_t)(w * x * power);
        }
    }
    factor.word = weight[words * product->units + output];
    return planish_requantize((int32_t)total, factor.value, (float)(-128 - zero_point), (float)(127 - zero_point), zero_point);
}

static inline void planish_product_c(const planish_product *product, const uint32_t *pairs, int8_t *y, int32_t second,
                                     int32_t bits)
{
    const uint32_t *weight = product->weight + 4;
    int32_t group, output;
    for (group = 0; group < product->groups; group++) {
        for (output = 0; output < 4; output++) {
            int8_t *to = y + 4 * group + output;
            to[second] = planish_product_code(product, weight, output, bits, pairs + 1, 0);
            *to = planish_product_code(product, weight, output, bits, pairs, 0);
        }
        weight += (bits >> 1) * product->units + 8;
    }
}

static inline void planish_row_product_c(const planish_product *product, const int8_t *x, int8_t *y, int32_t bits)
{
    const uint32_t *weight = product->weight + 4;
    int32_t group, output;
    for (group = 0; group < product->groups; group++) {
        for (output = 0; output < 4; output++) {
            y[4 * group + output] = planish_product_code(product, weight, output, bits, 0, x);
        }
        weight += (bits >> 1) * product->units + 8;
    }
}

#endif

/* The products of product.h in plain C, from the same packed weights: for compilers without the DSP extension. */
#ifndef PLANISH_DSP_PRODUCT_C_H
#define PLANISH_DSP_PRODUCT_C_H

#include "dsp/product.h"
#include "planish.h"

typedef enum { FORM_8, FORM_8_FAR, FORM_4, FORM_4_FAR, FORM_2 } planish_form;

static inline int32_t planish_half(uint32_t word, int32_t high)
{
    return (int32_t)(int16_t)(uint16_t)(high ? word >> 16 : word);
}

/* words of a unit */
static inline int32_t planish_unit(planish_form form)
{
    return form == FORM_2 ? 1 : form == FORM_4 || form == FORM_4_FAR ? 2 : 4;
}

/* what the sum of an output is multiplied by until it meets its factor */
static inline int32_t planish_power(planish_form form, int32_t output)
{
    static const int32_t powers[5][4] = {
        {256, 1, 256, 1}, {1, 1, 1, 1}, {4096, 256, 16, 1}, {16, 1, 16, 1}, {64, 16, 4, 1},
    };
    return powers[form][output];
}

/* weight of output 0-3 at depth 0-3 of a unit, the unit's words given */
static inline int32_t planish_weight_of(const uint32_t *unit, int32_t output, int32_t depth, planish_form form)
{
    int32_t high = depth >> 1, step = depth & 1, h, low;
    if (form == FORM_8 || form == FORM_8_FAR) {
        h = planish_half(unit[2 * step + (output >> 1)], high);
        low = (int32_t)(int8_t)(uint8_t)(uint32_t)h;
        if (output & 1) {
            return low;
        }
        return form == FORM_8 ? (h - low) / 256 : (h - (low & 255)) / 256;
    }
    if (form == FORM_4) {
        h = (int32_t)((uint32_t)planish_half(unit[step], high) >> (12 - 4 * output)) & 15;
        return output ? h - 8 : h - 2 * (h & 8);
    }
    if (form == FORM_4_FAR) {
        h = (int32_t)(unit[step] >> (16 * high + 8 * (output >> 1) + (output & 1 ? 0 : 4))) & 15;
        return output & 1 ? h - 8 : h - 2 * (h & 8);
    }
    h = (int32_t)(unit[0] >> (8 * depth + 6 - 2 * output)) & 3;
    return output ? h - 2 : h - 2 * (h & 2);
}

/* the code of one output for the weights of its group; the activations are at pairs or, without them, at codes */
static inline int8_t planish_product_code(const planish_product *product, const uint32_t *weight, int32_t output,
                                          planish_form form, const uint32_t *pairs, const int8_t *codes)
{
    int32_t power = planish_power(form, output), words = planish_unit(form), unit, depth;
    int32_t zero_point = (int32_t)(product->zero_points & 0xFFFFu) - 128;
    uint32_t total = weight[output - 4] - (power == 1 ? 0u : weight[output - 3]); /* power times the bias */
    union { uint32_t word; float value; } factor;
    for (unit = 0; unit < product->units; unit++) {
        for (depth = 0; depth < 4; depth++) {
            int32_t w = planish_weight_of(weight + words * unit, output, depth, form);
            int32_t x = pairs ? planish_half(pairs[4 * unit + 2 * (depth & 1)], depth >> 1) : codes[4 * unit + depth];
            total += (uint32_t)(w * x * power);
        }
    }
    factor.word = weight[words * product->units + output];
    return planish_requantize((int32_t)total, factor.value, (float)(-128 - zero_point), (float)(127 - zero_point),
                              zero_point);
}

static inline void planish_product_c(const planish_product *product, const uint32_t *pairs, int8_t *y, int32_t second,
                                     planish_form form)
{
    const uint32_t *weight = product->weight + 4;
    int32_t group, output;
    for (group = 0; group < product->groups; group++) {
        for (output = 0; output < 4; output++) {
            int8_t *to = y + 4 * group + output;
            to[second] = planish_product_code(product, weight, output, form, pairs + 1, 0);
            *to = planish_product_code(product, weight, output, form, pairs, 0);
        }
        weight += planish_unit(form) * product->units + 8;
    }
}

static inline void planish_row_product_c(const planish_product *product, const int8_t *x, int8_t *y, planish_form form)
{
    const uint32_t *weight = product->weight + 4;
    int32_t group, output;
    for (group = 0; group < product->groups; group++) {
        for (output = 0; output < 4; output++) {
            y[4 * group + output] = planish_product_code(product, weight, output, form, 0, x);
        }
        weight += planish_unit(form) * product->units + 8;
    }
}

#endif

/* Requantization in integers; the exact way is float32(sum * rescale) and its rounding to an integer. */
#include "armv6m/requantize.h"

/* value / 2^bits, rounded half to even */
static uint64_t round_shift(uint64_t value, int32_t bits)
{
    uint64_t whole;
    if (bits > 62) {
        return 0;
    }
    whole = value >> bits;
    return (value - (whole << bits)) + (whole & 1u) > ((uint64_t)1 << (bits - 1)) ? whole + 1u : whole;
}

__attribute__((used)) int32_t planish_exact_code(int32_t sum, uint32_t word, const planish_scale *q)
{
    uint32_t magnitude = sum < 0 ? 0u - (uint32_t)sum : (uint32_t)sum;
    int32_t fraction = q->exponent + (int32_t)(word & 255u);
    uint64_t product;
    int32_t extra, code;
    /* float32(sum): sums of more than 24 bits saturate or vanish whichever way they are rounded */
    product = (uint64_t)magnitude * (word >> 8);
    PLANISH_SMALL_LOOP
    for (extra = 0; product >> extra >> 24; extra++) {
    }
    if (extra > 0) { /* float32 keeps 24 bits */
        product = round_shift(product, extra);
        fraction -= extra;
    }
    if (fraction > 0) {
        product = round_shift(product, fraction);
    }
    code = product > 512u ? 512 : (int32_t)product;
    code = (sum < 0 ? -code : code) + q->zero_point;
    code = code < q->low ? q->low : code;
    return code > q->high ? q->high : code;
}

int32_t planish_quick_code(int32_t sum, uint32_t word, const planish_scale *q)
{
    int32_t shifted = (int32_t)((uint32_t)sum << q->before) >> (word & 255u);
    uint32_t product = (uint32_t)shifted * (word >> 16) + q->half;
    if (q->fraction == 23) {
        if ((uint32_t)shifted > q->limit) {
            return shifted < 0 ? q->low : q->high;
        }
        if (product >> 31) {
            return q->high;
        }
        if (product << 9 < q->window) {
            return PLANISH_IN_DOUBT;
        }
        return (int32_t)(product >> 23) - 128;
    }
    if (shifted != (int16_t)shifted || product << 10 < q->window || product >> 30) {
        return PLANISH_IN_DOUBT;
    }
    shifted = (int32_t)(product >> 22) - 128;
    shifted = shifted < q->low ? q->low : shifted;
    return shifted > q->high ? q->high : shifted;
}

int32_t planish_code(int32_t sum, uint32_t word, const planish_scale *q)
{
    int32_t code = planish_quick_code(sum, word, q);
    return code == PLANISH_IN_DOUBT ? planish_exact_code(sum, word, q) : code;
}
